"""Collectives with stated gradients."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.parallel.mesh import Axis, Mesh

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


class _GatherShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_XD: Tensor, order_M: Tensor, block: int, mesh: Mesh) -> Tensor:
        ctx.save_for_backward(order_M)
        ctx.num_rows, ctx.block, ctx.mesh = len(local_XD), block, mesh
        own_BD = local_XD.new_zeros(block, local_XD.shape[1])
        own_BD[: len(local_XD)] = local_XD
        gathered = local_XD.new_empty(mesh.tp_cp.size * block, local_XD.shape[1])
        dist.all_gather_into_tensor(gathered, own_BD, group=mesh.tp_cp.group)
        return gathered.index_select(0, order_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (d_x_MD,), (order_M,), mesh = grads, ctx.saved_tensors, ctx.mesh
        d_blocks = d_x_MD.new_zeros(mesh.tp_cp.size * ctx.block, d_x_MD.shape[1]).index_copy_(0, order_M, d_x_MD)
        # By tp_cp rank, tp fastest; only this tp rank's blocks, one of each cp rank, are summed here.
        d_cp_BD = d_blocks.unflatten(0, (mesh.cp.size, mesh.tp.size, ctx.block))[:, mesh.tp.rank]
        if mesh.cp.size == 1:
            return d_cp_BD[0, : ctx.num_rows].contiguous(), None, None, None
        d_own_BD = d_x_MD.new_empty(ctx.block, d_x_MD.shape[1])
        dist.reduce_scatter_tensor(d_own_BD, d_cp_BD.flatten(0, 1).contiguous(), group=mesh.cp.group)
        return d_own_BD[: ctx.num_rows], None, None, None


def gather_shared(local_XD: Tensor, order_M: Tensor, block: int, mesh: Mesh) -> Tensor:
    """[M, D] from the rows of all tp x cp ranks, of which each has any number up to ``block``. Every rank must call it.

    ``order_M[m]`` is where row m stands when the ranks' blocks of ``block`` rows lie one after another.
    Gradient: each rank's rows of the sum over cp of the output's gradients. They are not summed over tp: all tp ranks
    must bring the same.
    """
    return _GatherShared.apply(local_XD, order_M, block, mesh)


class _SumShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        total = local_x.clone()
        dist.all_reduce(total, group=axis.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.axis.group)
        return total, None


def sum_shared(local_x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's ``local_x``. Gradient: the sum over the axis of the output's gradients."""
    return local_x if axis.size == 1 else _SumShared.apply(local_x, axis)


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
