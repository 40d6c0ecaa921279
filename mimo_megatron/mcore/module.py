"""Megatron's module base and its scatter of a sequence over tp, for the model package."""

from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

__all__ = ["MegatronModule", "scatter_slots_over_tp"]


def scatter_slots_over_tp(hidden_S1D: Tensor) -> Tensor:
    """[S / tp, 1, D]: this tp rank's slots (sequence parallelism). Gradient: gathered, so whole on every tp rank."""
    return tensor_parallel.scatter_to_sequence_parallel_region(hidden_S1D)
