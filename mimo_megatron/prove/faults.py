"""Faults to plant into the ranks of a case: each is a mistake that a training system has shipped, or nearly.

A proof that cannot fail proves nothing: ``mimo-megatron prove --fault NAME`` must end with failed cases. A fault
replaces one function, named by its address, in the rank processes alone; the reference is computed without it.
"""

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore.boot import current_mesh
from mimo_megatron.mcore.schedule import LossSums
from mimo_megatron.parallel.mesh import ALONE, Axis

Make = Callable[[Any], Any]
"""From what is replaced to what replaces it."""


@dataclass(frozen=True)
class Fault:
    name: str
    where: tuple[str, ...]
    """``module:attribute`` of everything that is replaced."""
    make: Make
    case: str
    """Name of a case that must catch it."""
    verdict: str
    """How its verdict must begin."""


def _identity(_original: Any) -> Any:
    return lambda x, *_, **__: x


def _nothing(_original: Any) -> Any:
    return lambda *_, **__: None


def _mean_of_microbatch_means(make_loss: Any) -> Any:
    def make(*args: Any) -> Any:
        loss = make_loss(*args)

        def mean(given: Any, pack: Any) -> LossSums:
            sums = loss(given, pack)
            return replace(sums, objective=sums.objective / sums.count.clamp(min=1), count=torch.ones_like(sums.count))

        return mean

    return make


def _divided_by_dp(encode: Any) -> Any:
    def divided(model: Any, pack: Any) -> Tensor:
        features_MD = encode(model, pack)
        if features_MD.requires_grad:
            features_MD.register_hook(lambda grad: grad / model.mesh.dp.size)
        return features_MD

    return divided


def _contiguous_ranges(_zigzag: Any) -> Any:
    def ranges(num_slots: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        return ((num_slots // size * rank, num_slots // size * (rank + 1)),)

    return SimpleNamespace(local_ranges=ranges)


def _one_row_off(splice: Any) -> Any:
    return lambda hidden_S1D, features_MD, slots_L, rows_L: splice(hidden_S1D, features_MD, slots_L, rows_L.roll(1))


def _shifted_inside_the_slice(lane: Any) -> Any:
    """The next token is looked up in this rank's slice, which is wrong where the slice has a cut."""

    def shifted(batch: Any, cp: Any, ahead: int) -> Any:
        right = lane(batch, cp, ahead)
        return replace(right, token_ids_S=lane(batch, cp, 0).token_ids_S.roll(-ahead)) if ahead else right

    return shifted


def _times_tp(gather_shared: Any) -> Any:
    """All tp ranks bring the same gradient, so their sum is the size of tp times it."""

    def gather(own_XD: Tensor, order_M: Tensor, block: int, mesh: Any) -> Tensor:
        features_MD = gather_shared(own_XD, order_M, block, mesh)
        if features_MD.requires_grad:
            features_MD.register_hook(lambda grad: grad * mesh.tp.size)
        return features_MD

    return gather


def _without_the_others_gradient(sum_shared: Any) -> Any:
    """A reward's gradient comes from the losses of other ranks' pairs as well."""

    def summed(local_x: Tensor, axis: Any) -> Tensor:
        return local_x + (sum_shared(local_x, axis) - local_x).detach()

    return summed


def _of_own_share(over_ranks: Any) -> Any:
    """Every tp rank takes its own part of the vocabulary for the whole."""
    return lambda sums_4R, labels_R, local_vocabulary, tp: over_ranks(
        sums_4R, labels_R, local_vocabulary, Axis(tp.rank, 1)
    )


def _of_own_maximum(_rescaled: Any) -> Any:
    """The sums of a chunk are added as they are, whatever maximum they were taken from."""
    return lambda sums_4R, max_R: (sums_4R[1], sums_4R[2])


def _always(_original: Any) -> Any:
    return lambda *_, **__: True


def _agreed_over_cp_alone(shared_amax: Any) -> Any:
    return lambda tensors, _axis, rounding: shared_amax(tensors, current_mesh().cp, rounding)


def _scaled_by_own_part(transposed_weight: Any) -> Any:
    def transposed(self: Any, w_OI: Tensor, _w_scale: Tensor) -> Any:
        return transposed_weight(self, w_OI, torch.finfo(self.of_forward).max / self.rounding.amax(w_OI))

    return transposed


def _agreed_over_tp_alone(shared_amax: Any) -> Any:
    return lambda tensors, _axis, rounding: shared_amax(tensors, current_mesh().tp, rounding)


def _scaled_on_its_own(linear_maker: Any) -> Any:
    return lambda fp8, product, _axis: linear_maker(fp8, product, ALONE)


def _without_data_parallel_ranks(_parallel_state: Any) -> Any:
    return SimpleNamespace(get_amax_reduction_group=lambda **_: current_mesh().tp_cp.group)


def _of_own_queries(_backward: Any) -> Any:
    """A rank's keys get the gradient of its own queries, and not of the other ranks'."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.work = SimpleNamespace(wait=lambda: None)
        by_rank = torch.empty_like(grads[0]).index_copy_(0, exchange.order_S, grads[0])
        return by_rank.chunk(exchange.axis.size)[exchange.axis.rank], None

    return backward


def _without_the_first_bucket(start_next: Any) -> Any:
    def start(reduction: Any) -> None:
        if reduction._num_started:
            start_next(reduction)
            return
        reduction._num_started = 1
        reduction._order[0][1].grad_reduce_handle = SimpleNamespace(wait=lambda: None)

    return start


def _in_every_microbatch(_no_sync: Any) -> Any:
    @contextlib.contextmanager
    def no_sync(reduction: Any) -> Iterator[None]:
        reduction._is_last_microbatch = True
        yield

    return no_sync


def _one_copy_late(to_host: Any) -> Any:
    """The host's memory holds what was copied before."""
    last: dict[Any, Tensor] = {}

    def copied(offload: Any, source: Tensor) -> Tensor:
        host = to_host(offload, source)
        kind = host.shape, host.stride(), host.dtype
        before, last[kind] = last.get(kind, host), host
        return before

    return copied


FAULTS: tuple[Fault, ...] = (
    Fault(
        "tp sum dropped",
        ("megatron.core.tensor_parallel.layers:reduce_from_tensor_model_parallel_region",),
        _identity,
        "tp2 · mixed",
        "the forward pass",
    ),
    Fault(
        "sum of the norms' gradients under sequence parallelism dropped",
        ("megatron.core.distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads",),
        _nothing,
        "tp2 sp · mixed",
        "the sum of the norms' gradients over tp",
    ),
    Fault(
        "mean of microbatch means",
        ("mimo_megatron.prove.measure:loss_of", "mimo_megatron.train.step:loss_of"),
        _mean_of_microbatch_means,
        "dp2 · mixed",
        "what is divided by",
    ),
    Fault(
        "encoder gradient divided by dp",
        ("mimo_megatron.model.vlm:VisionLanguageModel.encode",),
        _divided_by_dp,
        "dp2 · mixed",
        "how the encoder's gradient is summed over ranks",
    ),
    Fault(
        "positions sliced wrongly under cp",
        ("mimo_megatron.mcore.text:zigzag",),
        _contiguous_ranges,
        "cp2 · mixed",
        "the forward pass",
    ),
    Fault("wrong splice index", ("mimo_megatron.model.vlm:splice",), _one_row_off, "pp2 · mixed", "the forward pass"),
    Fault(
        "next token of a prediction layer looked up in the slice",
        ("mimo_megatron.model.local_pack:_lane",),
        _shifted_inside_the_slice,
        "cp2 · mtp",
        "the forward pass",
    ),
    Fault(
        "sum of the encoder's gradients over tp dropped",
        ("mimo_megatron.mcore.optimizer:sum_marked_over_tp",),
        _nothing,
        "tp2 balanced · mixed",
        "how the encoder's gradient is summed over ranks",
    ),
    Fault(
        "gradient of the gathered features summed over tp too",
        ("mimo_megatron.model.vlm:gather_shared",),
        _times_tp,
        "tp2 sp balanced · mixed",
        "how the encoder's gradient is summed over ranks",
    ),
    Fault(
        "gradient of a pair whose responses end on different ranks dropped",
        ("mimo_megatron.loss.preference:sum_shared",),
        _without_the_others_gradient,
        "cp2 · reward model",
        "every gradient",
    ),
    Fault(
        "replicated weights counted on every tp rank in the gradient norm",
        ("megatron.core.tensor_parallel:param_is_not_tensor_parallel_duplicate",),
        _always,
        "tp2 · mixed",
        "what the gradient norm counts",
    ),
    Fault(
        "sums over a vocabulary in chunks not taken over tp",
        ("mimo_megatron.loss.implicit_logits:_over_ranks",),
        _of_own_share,
        "tp2 · head in chunks",
        "the forward pass",
    ),
    Fault(
        "sums of chunks not brought to one maximum",
        ("mimo_megatron.loss.chunk_softmax:rescaled",),
        _of_own_maximum,
        "dp2 · policy gradient, head in chunks",
        "the forward pass",
    ),
    Fault(
        "activations read back from the host one copy late",
        ("mimo_megatron.offload:ActivationOffload._to_host",),
        _one_copy_late,
        "dp2 · offload",
        "the backward pass",
    ),
    Fault(
        "gradients of keys and values not summed over cp",
        ("mimo_megatron.parallel.collectives:_FinishGather.backward",),
        _of_own_queries,
        "cp2 · mixed",
        "the backward pass",
    ),
    Fault(
        "gradients of one bucket not reduced",
        ("mimo_megatron.mcore.overlap:GradReduction._start_next",),
        _without_the_first_bucket,
        "dp2 · overlap",
        "embedding and head",
    ),
    Fault(
        "gradients reduced before the last microbatch",
        ("mimo_megatron.mcore.overlap:GradReduction.no_sync",),
        _in_every_microbatch,
        "dp2 · overlap",
        "the ranks failed: AssertionError: a gradient came to parameters whose reduction has started",
    ),
    Fault(
        "parameters not gathered after the update",
        ("mimo_megatron.train.step:start_param_gather",),
        _nothing,
        "dp2 · overlap",
        "what the gradient norm counts",
    ),
    Fault(
        "largest magnitude of an FP8 tensor not agreed over tp",
        ("mimo_megatron.fp8.scaling:shared_amax",),
        _agreed_over_cp_alone,
        "tp2 · fp8 current",
        "the forward pass",
    ),
    Fault(
        "largest magnitude of an FP8 tensor not agreed over cp",
        ("mimo_megatron.fp8.scaling:shared_amax",),
        _agreed_over_tp_alone,
        "cp2 · fp8 current",
        "the forward pass",
    ),
    Fault(
        "an FP8 weight rounded for the backward by its own rank's magnitude",
        ("mimo_megatron.fp8.scaling:_OneScale.transposed_weight",),
        _scaled_by_own_part,
        "tp2 · fp8 current",
        "the backward pass",
    ),
    Fault(
        "largest magnitude of the encoder's FP8 tensors not agreed over the ranks that share images out",
        ("mimo_megatron.model.vlm:linear_maker",),
        _scaled_on_its_own,
        "cp2 balanced · fp8 of all parts",
        "the forward pass",
    ),
    Fault(
        "history of FP8 magnitudes without the other data-parallel ranks' packs",
        ("mimo_megatron.mcore.fp8:parallel_state",),
        _without_data_parallel_ranks,
        "dp2 · fp8 delayed, full recompute",
        "the forward pass",
    ),
    Fault(
        "FP8 scales one step late",
        ("mimo_megatron.fp8.scaling:DelayedScaling.end_step",),
        _nothing,
        "pp2 · fp8 delayed, full recompute",
        "the forward pass",
    ),
)


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """``name`` is in effect in this process while the block lasts; the empty name is no fault.

    ``ConfigError`` lists the known names.
    """
    if not name:
        yield
        return
    fault = fault_named(name)
    with contextlib.ExitStack() as undo:
        for address in fault.where:
            path, attribute = address.rsplit("." if "." in address.split(":")[1] else ":", 1)
            owner = pkgutil.resolve_name(path)
            original = getattr(owner, attribute)
            undo.callback(setattr, owner, attribute, original)
            setattr(owner, attribute, fault.make(original))
        yield


def fault_named(name: str) -> Fault:
    for fault in FAULTS:
        if fault.name == name:
            return fault
    raise ConfigError(f"no fault {name!r} to plant; there are: {'; '.join(fault.name for fault in FAULTS)}")
