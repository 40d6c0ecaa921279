"""Rows of a pack taken range after range, and their gradients put back: exact, deterministic, planned on the CPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Rows:
    """Which rows to take, range after range. ``index`` is None where that is every row in order: nothing to copy."""

    index: Tensor | None
    inverse: Tensor | None
    """The way back, where ``index`` is a permutation."""
    ranges: tuple[tuple[int, int], ...]
    """The (start, end) ranges themselves, where they are no permutation: some share rows, some rows are in none."""

    @property
    def reversed(self) -> "Rows":
        """Of a permutation: the way back."""
        return Rows(self.inverse, self.index, ())


def rows_of(ranges: np.ndarray, num_rows: int, device: torch.device) -> Rows:
    """``ranges`` are (start, end) of the ``num_rows`` rows there are, int64 ``[R, 2]``."""
    lengths = ranges[:, 1] - ranges[:, 0]
    places = np.arange(lengths.sum())
    index = places + np.repeat(ranges[:, 0] - (np.cumsum(lengths) - lengths), lengths)
    if len(index) == num_rows and (index == places).all():
        return Rows(None, None, ())
    if len(index) == num_rows and (np.bincount(index, minlength=num_rows) == 1).all():
        return Rows(_on(device, index), _on(device, np.argsort(index)), ())
    return Rows(_on(device, index), None, tuple((int(start), int(end)) for start, end in ranges))


def _on(device: torch.device, index: np.ndarray) -> Tensor:
    return torch.from_numpy(index).to(device, non_blocking=True)


def take(x: Tensor, rows: Rows) -> Tensor:
    return x if rows.index is None else _Take.apply(x, rows)


class _Take(torch.autograd.Function):
    """``x[rows]``. The gradient of a permutation is the inverse one: no zero fill, no accumulation, no atomics.

    For ranges that share rows it adds range after range, in order; there are few of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        assert rows.index is not None
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.rows.inverse is not None:
            return grad.index_select(0, ctx.rows.inverse), None
        total, done = grad.new_zeros(ctx.shape), 0
        for start, end in ctx.rows.ranges:
            total[start:end] += grad[done : done + end - start]
            done += end - start
        return total, None
