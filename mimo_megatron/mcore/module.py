"""Megatron's module base, its scatter of a sequence over tp, and a mark on parameters, for the model package."""

from collections.abc import Iterable

from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

__all__ = ["MegatronModule", "is_summed_over_tp", "scatter_slots_over_tp", "sum_gradients_over_tp"]


def scatter_slots_over_tp(hidden_S1D: Tensor) -> Tensor:
    """[S / tp, 1, D]: this tp rank's slots (sequence parallelism). Gradient: gathered, so whole on every tp rank."""
    return tensor_parallel.scatter_to_sequence_parallel_region(hidden_S1D)


def sum_gradients_over_tp(params: Iterable[Parameter]) -> None:
    """Mark whole parameters of which every tp rank computes a part of the gradient: ``optimizer.wrap`` sums them.

    Not megatron's mark ``sequence_parallel``, which is heeded under sequence parallelism only.
    """
    for param in params:
        param.is_summed_over_tp = True  # type: ignore[attr-defined]


def is_summed_over_tp(param: Parameter) -> bool:
    return getattr(param, "is_summed_over_tp", False)
