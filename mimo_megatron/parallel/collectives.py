"""Collectives with stated gradients."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.parallel.mesh import Axis

Thing = TypeVar("Thing")


class _GatherSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_x: Tensor, order_S: Tensor, axis: Axis) -> Tensor:
        ctx.order_S, ctx.axis = order_S, axis
        parts = [torch.empty_like(local_x) for _ in range(axis.size)]
        dist.all_gather(parts, local_x.contiguous(), group=axis.group)
        return torch.cat(parts).index_select(0, order_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (d_x,) = grads
        gathered = torch.empty_like(d_x).index_copy_(0, ctx.order_S, d_x)
        dist.all_reduce(gathered, group=ctx.axis.group)
        return gathered.chunk(ctx.axis.size)[ctx.axis.rank].contiguous(), None, None


def gather_slots(local_x: Tensor, order_S: Tensor, axis: Axis) -> Tensor:
    """All ranks' slices of dim 0, put into the order of ``order_S`` (see ``zigzag.merge_order``).

    Gradient: the sum over the axis of the output's gradients, of which each rank keeps its own slice.
    """
    if axis.size == 1:
        return local_x
    return _GatherSlots.apply(local_x, order_S, axis)


def sum_over(values: Sequence[int], axis: Axis, device: torch.device | None = None) -> list[int]:
    """Element by element, the sum of every rank's ``values`` over the axis. One host sync where its size is above 1."""
    if axis.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=axis.group)
    return total.tolist()


def gather_objects(thing: Thing, axis: Axis) -> list[Thing]:
    """Every rank's small picklable ``thing``, by rank."""
    things: list[Any] = [None] * axis.size
    dist.all_gather_object(things, thing, group=axis.group)
    return things


def gather_last_dim(local_x: Tensor, axis: Axis) -> Tensor:
    """All ranks' parts side by side along the last dim. No gradient."""
    if axis.size == 1:
        return local_x
    parts = [torch.empty_like(local_x) for _ in range(axis.size)]
    dist.all_gather(parts, local_x.contiguous(), group=axis.group)
    return torch.cat(parts, -1)
