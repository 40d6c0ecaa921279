"""Collectives with stated gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.parallel.mesh import Axis, Mesh

Thing = TypeVar("Thing")


@dataclass
class _Exchange:
    """A gather of slots on its way, or the sum of its gradients."""

    order_S: Tensor
    axis: Axis
    by_rank: Tensor | None = None
    """All ranks' slices, rank after rank."""
    work: dist.Work | None = None

    def wait(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.by_rank = self.work = None


class _StartGather(torch.autograd.Function):
    """Forward: the gather starts. Backward: the sum of the gradients is waited for."""

    @staticmethod
    def forward(ctx: Any, local_x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        local_x = local_x.contiguous()
        exchange.by_rank = local_x.new_empty(exchange.axis.size * len(local_x), *local_x.shape[1:])
        exchange.work = dist.all_gather_into_tensor(exchange.by_rank, local_x, group=exchange.axis.group, async_op=True)
        return local_x.view_as(local_x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.wait()
        return grads[0], None


class _FinishGather(torch.autograd.Function):
    """Forward: the gather is waited for. Backward: the sum of the gradients starts."""

    @staticmethod
    def forward(ctx: Any, local_x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        by_rank = exchange.by_rank
        assert by_rank is not None
        exchange.wait()
        return by_rank.index_select(0, exchange.order_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange, (d_x,) = ctx.exchange, grads
        exchange.by_rank = d_x.new_empty(d_x.shape).index_copy_(0, exchange.order_S, d_x)
        d_local_x = d_x.new_empty(len(d_x) // exchange.axis.size, *d_x.shape[1:])
        exchange.work = dist.reduce_scatter_tensor(
            d_local_x, exchange.by_rank, group=exchange.axis.group, async_op=True
        )
        return d_local_x, None


def start_gather_slots(local_x: Tensor, order_S: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """A function that gives all ranks' slices of dim 0 in the order of ``order_S`` (see ``zigzag.merge_order``), and
    waits for them. What is computed before it is called runs beside the gather, and what belongs to it in the backward
    pass beside the sum of the gradients.

    Gradient: the sum over the axis of the output's gradients, of which each rank gets its own slice.
    """
    exchange = _Exchange(order_S, axis)
    started_x = _StartGather.apply(local_x, exchange)
    return lambda: _FinishGather.apply(started_x, exchange)


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
