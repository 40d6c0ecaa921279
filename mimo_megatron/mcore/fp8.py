"""Linear layers with FP8 products of ours, megatron's two and PyTorch's, and the state of delayed scaling over a run.

Communication stays megatron's: slots are gathered and gradients summed in the layer's own dtype, as without FP8.
Transformer Engine's layers are not here: they bring their own FP8, which ``transformer_config`` switches on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module

from mimo_megatron import platform
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.errors import ConfigError
from mimo_megatron.fp8.linear import PRODUCTS, Fp8Linear, fp8_linear
from mimo_megatron.fp8.quantise import E4M3, E5M2
from mimo_megatron.fp8.rounding import TORCH, KernelRounding, Rounding, why_no_kernels
from mimo_megatron.fp8.scaling import BlockScaling, CurrentScaling, DelayedScaling, Scaling
from mimo_megatron.log import get_logger
from mimo_megatron.mcore.boot import current_mesh
from mimo_megatron.mcore.weights import global_parameters
from mimo_megatron.parallel.mesh import Axis

ProductName = Literal["scaled_mm", "twin"]
STATE_PREFIX = "fp8."
"""Of delayed scaling's tensors in a checkpoint; behind it the layer's global name."""


def rounding_name(fp8: Fp8Config, product: ProductName) -> Literal["torch", "triton"]:
    """What rounds for that product on this machine. ``ConfigError`` where the recipe's choice cannot."""
    if fp8.rounding == "triton":
        if product != "scaled_mm":
            raise ConfigError(
                "train.fp8.rounding=triton rounds for scaled_mm, and the twin multiplies here: set "
                "train.fp8.engine=scaled_mm, or train.fp8.rounding=auto"
            )
        KernelRounding()
        return "triton"
    is_chosen = fp8.rounding == "auto" and product == "scaled_mm" and not platform.current().is_cpu
    return "triton" if is_chosen and not why_no_kernels() else "torch"


def scaling_of(fp8: Fp8Config, axis: Axis, product: ProductName) -> Scaling:
    """Of one layer, on this rank; ``axis``: the ranks that hold parts of its tensors."""
    forward, backward = E4M3, E5M2 if fp8.number_format == "hybrid" else E4M3
    if fp8.scaling == "blockwise":
        return BlockScaling(forward, backward)
    rounding: Rounding = KernelRounding() if rounding_name(fp8, product) == "triton" else TORCH
    if fp8.scaling == "delayed":
        return DelayedScaling(forward, backward, fp8.history, fp8.margin, rounding)
    return CurrentScaling(forward, backward, axis, rounding)


class _Fp8Products:
    """The part of a linear layer of megatron's that multiplies; ``[S, 1, I]`` -> ``[S, 1, O / tp]`` or, of a row
    parallel layer, this rank's share of the sum ``[S, 1, O]``. The bias is added in the layer's dtype."""

    scaling: Scaling
    product: ProductName

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        out_TO = fp8_linear(input.flatten(0, 1), weight, self.scaling, PRODUCTS[self.product])
        out_S1O = out_TO.unflatten(0, input.shape[:2])
        return out_S1O if bias is None else out_S1O + bias


class Fp8ColumnParallelLinear(_Fp8Products, ColumnParallelLinear):
    def __init__(self, *args: Any, fp8: Fp8Config, product: ProductName, **options: Any):
        super().__init__(*args, **options)
        self.scaling, self.product = scaling_of(fp8, current_mesh().tp_cp, product), product


class Fp8RowParallelLinear(_Fp8Products, RowParallelLinear):
    def __init__(self, *args: Any, fp8: Fp8Config, product: ProductName, **options: Any):
        super().__init__(*args, **options)
        self.scaling, self.product = scaling_of(fp8, current_mesh().tp_cp, product), product


def linear_maker(fp8: Fp8Config, product: ProductName, axis: Axis) -> Callable[[int, int], torch.nn.Linear]:
    """Makes linear layers that are not cut over tp; their rows may be shared out over ``axis``."""
    return lambda inputs, outputs: Fp8Linear(
        inputs, outputs, scaling=scaling_of(fp8, axis, product), product=PRODUCTS[product]
    )


def end_step(chunks: Iterable[Module]) -> None:
    """The step's largest magnitudes, of all its microbatches and ranks, become history, and the next step's scales
    follow. Called once after every step; a collective over the ranks of a stage where scaling is delayed."""
    scalings = [scaling for _, scaling in _delayed(chunks)]
    if not scalings:
        return
    seen_L3 = torch.stack([scaling.seen_3 for scaling in scalings])
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    dist.all_reduce(seen_L3, dist.ReduceOp.MAX, group=group)
    for scaling, seen_3 in zip(scalings, seen_L3, strict=True):
        scaling.end_step(seen_3)


def sharded_state(chunks: Iterable[Module]) -> dict[str, ShardedTensor]:
    """Delayed scaling's tensors in megatron's sharded form, by their keys in a checkpoint. The same on all tp, dp and
    cp ranks of a stage, so that any layout loads them."""
    replica = (
        0,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return {
        key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica) for key, tensor in _state(chunks).items()
    }


def load_state(chunks: Iterable[Module], loaded: dict[str, Tensor]) -> None:
    """Set delayed scaling's tensors from what ``sharded_state`` described and megatron filled."""
    for key, tensor in _state(chunks).items():
        tensor.copy_(loaded[key])


def is_saved(chunks: Iterable[Module], folder: Path) -> bool:
    """Whether the checkpoint holds the state that these stages want. Where it does not, scaling begins anew, which is
    logged: it is of a run without FP8, or with another scaling."""
    wanted = _state(chunks).keys()
    if not wanted:
        return False
    missing = wanted - load_tensors_metadata(str(folder)).keys()
    if missing:
        get_logger().warning(
            "%s has no history of %d FP8 tensors, %s among them: delayed scaling begins with scales of 1",
            folder, len(missing), min(missing),
        )  # fmt: skip
    return not missing


def history_problems(chunks: Iterable[Module], folder: Path) -> list[str]:
    """What to say where the checkpoint's histories are of another length than these stages keep. Nothing where it lacks
    some: then all begin anew (``is_saved``)."""
    own = _state(chunks)
    saved = load_tensors_metadata(str(folder)) if own else {}
    if own.keys() - saved.keys():
        return []
    for key in sorted(own):
        if (there := tuple(saved[key].global_shape)) != (here := tuple(own[key].shape)):
            return [
                f"{folder} was saved with train.fp8.history={there[0]}, and the recipe says {here[0]} ({key}): "
                f"set train.fp8.history={there[0]}"
            ]
    return []


def _state(chunks: Iterable[Module]) -> dict[str, Tensor]:
    return {
        f"{STATE_PREFIX}{name}.{kind}": tensor
        for name, scaling in _delayed(chunks)
        for kind, tensor in (("amax_history", scaling.history_H3), ("scale", scaling.scale_3))
    }


def _delayed(chunks: Iterable[Module]) -> Iterator[tuple[str, DelayedScaling]]:
    """(global name of the layer, its scaling), of this rank's stages."""
    for chunk in _bare(chunks):
        names = {id(param): name for name, param in global_parameters([chunk])}
        for module in chunk.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, DelayedScaling):
                yield names[id(module.weight)].removesuffix(".weight"), scaling


def _bare(chunks: Iterable[Module]) -> Sequence[Module]:
    """Without megatron's data-parallel wrapper."""
    return [getattr(chunk, "module", chunk) for chunk in chunks]
