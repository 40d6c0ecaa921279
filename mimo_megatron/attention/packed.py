"""Attention over packed rows: many runs or segments lie one after another and none sees its neighbour.

Pieces of equal length are computed in one batched call, so the number of calls is that of distinct lengths, not of
pieces: a vision pack has thousands of windows, of at most nine lengths. Invariants: the result does not depend on what
else is packed; grouping is exact and deterministic, forward and backward, and is worked out once per pack on the CPU.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mimo_megatron.attention.reference import Piece, reference_attention
from mimo_megatron.attention.varlen import flash_varlen

Backend = Literal["reference", "sdpa", "varlen"]
__all__ = ["Backend", "Piece", "causal_attention", "varlen_attention"]


def varlen_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], *, backend: Backend = "sdpa"
) -> Tensor:
    """out_TNH: every row attends to all rows of its own run; run i is the rows ``bounds[i]`` to ``bounds[i + 1]``."""
    assert bounds[0] == 0 and bounds[-1] == len(q_TNH) == len(k_TKH), (bounds[0], bounds[-1], len(q_TNH), len(k_TKH))
    if backend == "reference":
        pieces = [Piece(start, end, start, end) for start, end in pairwise(bounds)]
        return reference_attention(q_TNH, k_TKH, v_TKH, pieces, causal=False)
    if backend == "varlen":
        return flash_varlen(q_TNH, k_TKH, v_TKH, bounds, causal=False)
    return _grouped_sdpa(q_TNH, k_TKH, v_TKH, _group_runs(bounds, q_TNH.device), causal=False)


def causal_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, pieces: Sequence[Piece], *, backend: Backend = "sdpa"
) -> Tensor:
    """out_TNH: bottom-right-aligned causal attention inside each piece, with grouped-query heads (K divides N).

    The pieces' query ranges cover all rows of q in order; their key ranges are free, and may overlap.
    """
    if backend == "reference":
        return reference_attention(q_TNH, k_TKH, v_TKH, pieces, causal=True)
    if backend == "varlen":
        assert all((one.q_start, one.q_end) == (one.k_start, one.k_end) for one in pieces), "whole segments only"
        return flash_varlen(q_TNH, k_TKH, v_TKH, (0, *(one.q_end for one in pieces)), causal=True)
    groups = _group_pieces(tuple(pieces), len(k_TKH), q_TNH.device)
    assert groups.num_queries == len(q_TNH), (groups.num_queries, len(q_TNH))
    return _grouped_sdpa(q_TNH, k_TKH, v_TKH, groups, causal=True)


# ---------------------------------------------------------------------------------------------------------------------
# Grouping: on the CPU, once per pack and device
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Which rows to take, range after range. ``index`` is None where that is every row in order: nothing to copy."""

    index: Tensor | None
    inverse: Tensor | None
    """The way back, where ``index`` is a permutation."""
    ranges: tuple[tuple[int, int], ...]
    """The (start, end) ranges themselves, where they are no permutation: some share rows, some rows are in none."""


@dataclass(frozen=True)
class _Groups:
    shapes: tuple[tuple[int, int, int], ...]
    """(pieces, query length, key length) of each batched call."""
    queries: _Rows
    keys: _Rows

    @property
    def num_queries(self) -> int:
        return sum(count * q_length for count, q_length, _ in self.shapes)


@lru_cache(maxsize=32)
def _group_runs(bounds: tuple[int, ...], device: torch.device) -> _Groups:
    edges = np.asarray(bounds)
    starts_and_ends = np.stack([edges[:-1], edges[1:]], axis=1)
    return _group(starts_and_ends, starts_and_ends, len_keys=bounds[-1], device=device)


@lru_cache(maxsize=32)
def _group_pieces(pieces: tuple[Piece, ...], len_keys: int, device: torch.device) -> _Groups:
    table = np.array([(p.q_start, p.q_end, p.k_start, p.k_end) for p in pieces], np.int64).reshape(-1, 4)
    assert (table[1:, 0] == table[:-1, 1]).all() and (table[:1, 0] == 0).all(), "query ranges must follow one another"
    return _group(table[:, :2], table[:, 2:], len_keys=len_keys, device=device)


def _group(queries: np.ndarray, keys: np.ndarray, *, len_keys: int, device: torch.device) -> _Groups:
    filled = queries[:, 1] > queries[:, 0]
    queries, keys = queries[filled], keys[filled]
    lengths = np.stack([queries[:, 1] - queries[:, 0], keys[:, 1] - keys[:, 0]], axis=1)
    distinct, first_piece, kind, counts = np.unique(
        lengths, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    # Kinds in the order they first appear, so that a pack whose equal pieces are neighbours already is left in place.
    by_appearance = np.argsort(first_piece)
    order = np.argsort(first_piece[kind], kind="stable")
    return _Groups(
        shapes=tuple((int(counts[i]), int(distinct[i, 0]), int(distinct[i, 1])) for i in by_appearance),
        queries=_rows(queries[order], int(lengths[:, 0].sum()), device),
        keys=_rows(keys[order], len_keys, device),
    )


def _rows(ranges: np.ndarray, num_rows: int, device: torch.device) -> _Rows:
    lengths = ranges[:, 1] - ranges[:, 0]
    places = np.arange(lengths.sum())
    index = places + np.repeat(ranges[:, 0] - (np.cumsum(lengths) - lengths), lengths)
    if len(index) == num_rows and (index == places).all():
        return _Rows(None, None, ())
    if len(index) == num_rows and (np.bincount(index, minlength=num_rows) == 1).all():
        return _Rows(_on(device, index), _on(device, np.argsort(index)), ())
    return _Rows(_on(device, index), None, tuple((int(start), int(end)) for start, end in ranges))


def _on(device: torch.device, index: np.ndarray) -> Tensor:
    return torch.from_numpy(index).to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Computation
# ---------------------------------------------------------------------------------------------------------------------


class _Take(torch.autograd.Function):
    """``x[rows]``. The gradient of a permutation is the inverse one: no zero fill, no accumulation, no atomics.

    For ranges that share rows it adds range after range, in order; there are few of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: _Rows) -> Tensor:
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


def _take(x: Tensor, rows: _Rows) -> Tensor:
    return x if rows.index is None else _Take.apply(x, rows)


def without_plans(device: torch.device) -> AbstractContextManager[Any]:
    """Within it calls of ``scaled_dot_product_attention`` on a GPU are not cuDNN's, which torch 2.11 prefers on 9.0 and
    10.0: cuDNN plans every shape anew on the host, for tens of milliseconds, and packs bring new lengths every step, as
    every token of generation does.

    Not for masked calls with grouped-query heads: flash takes no masks, and cuDNN may be all that takes both.
    """
    planless = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(planless) if device.type == "cuda" else nullcontext()


def _grouped_sdpa(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, groups: _Groups, causal: bool) -> Tensor:
    if not groups.shapes:
        return q_TNH
    q_parts = _take(q_TNH, groups.queries).split([count * q_length for count, q_length, _ in groups.shapes])
    k_sizes = [count * k_length for count, _, k_length in groups.shapes]
    k_parts, v_parts = (_take(x, groups.keys).split(k_sizes) for x in (k_TKH, v_TKH))
    is_masked = causal and any(q_length != k_length for _, q_length, k_length in groups.shapes)
    outs = []
    with nullcontext() if is_masked else without_plans(q_TNH.device):
        for (count, q_length, k_length), q, k, v in zip(groups.shapes, q_parts, k_parts, v_parts, strict=True):
            mask = None
            if causal and q_length != k_length:
                mask = torch.ones(q_length, k_length, dtype=torch.bool, device=q.device).tril(k_length - q_length)
            # enable_gqa reads the key heads in place. Forward + backward of 1,024 causal tokens, 32 heads on 8, one CPU
            # core, fp32: 323 ms, against 346 ms with repeated key heads and 458 ms with a mask in place of is_causal.
            out = scaled_dot_product_attention(
                q.unflatten(0, (count, q_length)).transpose(1, 2),
                k.unflatten(0, (count, k_length)).transpose(1, 2),
                v.unflatten(0, (count, k_length)).transpose(1, 2),
                attn_mask=mask,
                is_causal=causal and mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
    out_TNH = outs[0] if len(outs) == 1 else torch.cat(outs)
    back = _Rows(groups.queries.inverse, groups.queries.index, ())
    return _take(out_TNH, back)
