"""Megatron's pipeline schedules behind one call: run a step's microbatches forward and backward, or forward only.

The step's gradient is sum(loss) / sum(trained tokens) over every microbatch, dp and cp rank: megatron sums, and divides
once by the global count.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mimo_megatron.mcore.module import MegatronModule

Pack = TypeVar("Pack")
Loss = Callable[[Any, Pack], "LossSums"]
"""Of what the last stage gives, which need not be a tensor, and the pack."""


@dataclass(frozen=True)
class LossSums:
    """Of one microbatch, on this rank. The step minimises sum(objective) / sum(count) over all of them."""

    objective: Tensor
    """Scalar with a gradient: what is minimised."""
    loss: Tensor
    """Scalar: the same without terms of other kinds, for the loss curve."""
    count: Tensor
    """Scalar: trained tokens; of a reward model, pairs."""
    num_right: Tensor | None = None
    """Scalar: pairs of which the chosen response has the higher reward. None where tokens are predicted."""


@dataclass(frozen=True)
class StepSums:
    """Over all microbatches and ranks."""

    objective: float
    loss: float
    count: int
    num_right: int = 0


def _as_it_is(pack: Pack, stage: torch.nn.Module) -> Pack:
    return pack


def run_microbatches(
    chunks: Sequence[DistributedDataParallel],
    packs: Sequence[Pack],
    num_slots: int,
    loss: Loss[Pack],
    *,
    place: Callable[[Pack, torch.nn.Module], Pack] = _as_it_is,
    whole_gradients: bool = False,
) -> StepSums:
    """The sums over all microbatches and ranks; gradients are left in the wrappers' buffers.

    ``num_slots`` are those of the stream between stages. ``place(pack, stage)`` gives what the stage needs of a pack
    when its turn comes, to bring it to the device no earlier. The distributed optimizer needs only its own shard of the
    summed gradients; with ``whole_gradients`` every rank gets all of them, to look at.
    """
    return _total(_rows(chunks, packs, num_slots, loss, place, whole_gradients))


def run_alone(
    chunks: Sequence[DistributedDataParallel],
    pack: Pack,
    num_slots: int,
    loss: Loss[Pack],
) -> StepSums | None:
    """This rank's own sums of one microbatch, on the last stage; None on the others.

    The gradients in the buffers are this rank's own as well: of sum(objective), neither summed over ranks nor divided.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    repeats = stages if len(chunks) > 1 else 1  # the interleaved schedule takes a multiple of pp

    def shared_loss(given: Any, pack: Pack) -> LossSums:
        sums = loss(given, pack)
        return replace(sums, objective=sums.objective / repeats)  # gradients add up over the repeats

    with _without(chunks, "finalize_model_grads_func", "no_sync_func"):
        rows = _rows(chunks, [pack] * repeats, num_slots, shared_loss, _as_it_is, False)
    if not rows:
        return None
    sums = _sums(rows[0])
    return replace(sums, objective=sums.objective * repeats)


def _rows(
    chunks: Sequence[DistributedDataParallel],
    packs: Sequence[Pack],
    num_slots: int,
    loss: Loss[Pack],
    place: Callable[[Pack, torch.nn.Module], Pack],
    whole_gradients: bool,
) -> list[Tensor]:
    """Objective, loss, count and pairs ranked right of every microbatch, on the last stage; else an empty list."""

    def forward_step(pending: Iterator[Pack], stage: torch.nn.Module) -> tuple[Any, Callable[[Any], Any]]:
        pack = place(next(pending), stage)

        def reduce_loss(given: Any) -> tuple[Tensor, Tensor, Tensor]:
            sums = loss(given, pack)
            num_right = torch.zeros_like(sums.count) if sums.num_right is None else sums.num_right
            row = (sums.objective.detach(), sums.loss.detach(), sums.count, num_right)
            return sums.objective, sums.count.to(torch.int), torch.stack([one.double() for one in row])

        return stage(pack), reduce_loss

    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            chunk.force_all_reduce = whole_gradients
            stack.enter_context(chunk.no_sync())  # megatron's own start of reductions; ours is ``GradReduction``
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(packs) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(packs),
            seq_length=num_slots,
            micro_batch_size=1,
            forward_only=False,
            force_all_reduce=whole_gradients,
        )


@contextlib.contextmanager
def _without(chunks: Sequence[Any], *names: str) -> Iterator[None]:
    """The chunks' configurations have none of these functions of the schedule while the block lasts."""
    kept = [(chunk.config, name, getattr(chunk.config, name)) for chunk in chunks for name in names]
    for config, name, _ in kept:
        setattr(config, name, None)
    try:
        yield
    finally:
        for config, name, function in kept:
            setattr(config, name, function)


def run_forward(
    chunks: Sequence[MegatronModule], packs: Sequence[Pack], num_slots: int, use: Callable[[Any, Pack], Any]
) -> list[Any]:
    """``use(what the last stage gives, pack)`` of every pack, on the last stage; an empty list on the others."""
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    missing = -len(packs) % num_stages if len(chunks) > 1 else 0  # the interleaved schedule takes a multiple of pp
    filled = [*packs, *[packs[-1]] * missing]

    def forward_step(pending: Iterator[Pack], stage: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        pack = next(pending)
        return stage(pack), lambda given, non_loss_data=False: use(given, pack)

    with torch.no_grad(), _without(chunks, "no_sync_func"):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(filled) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(filled),
            seq_length=num_slots,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )[: len(packs)]


def _total(rows: Sequence[Tensor]) -> StepSums:
    """Sum the last stage's rows over dp x cp, and tell every stage. One host sync."""
    device = torch.cuda.current_device()
    total_4 = torch.stack(list(rows)).sum(0) if rows else torch.zeros(4, dtype=torch.float64, device=device)
    dist.all_reduce(total_4, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total_4, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return _sums(total_4)


def _sums(row_4: Tensor) -> StepSums:
    objective, loss, count, num_right = row_4.tolist()
    # A loss weight that is not finite makes the objective so too, which is what callers judge by.
    return StepSums(objective, loss, int(count) if math.isfinite(count) else 0, int(num_right))
