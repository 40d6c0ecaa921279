"""Packed attention by a library's varlen kernel: one call for all pieces, by cumulative lengths of queries and of keys.

The libraries are PyTorch and flash-attn (``libraries.py``). Their causal mask is aligned to the bottom right where a
piece has fewer queries than keys, which is what ``Piece`` means. Queries follow one another as they are. So do keys
where segments are whole; under context parallelism a rank's pieces share keys and leave some out, and their ranges are
copied, piece after piece.

One call over copied keys, not a call for each of a rank's two chunks, whose keys are a range in place: two calls have
to join outputs, and gradients of queries. With 4 query heads to a key head that moves 16 / cp times the keys of the
pack, the copy of keys and values at most 4 + 2 / cp (one sample fills the pack), 4 / cp where samples are short; their
gradients are added range after range either way. The copy is less for cp 2 and for short samples; for cp 8 it is 2.25
times the keys more, 151 MB of 32,768 tokens and 8 heads of 128, 45 µs at an H100's 3.35 TB/s, for half the launches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mimo_megatron.attention.reference import Piece
from mimo_megatron.attention.rows import Rows, rows_of, take


@dataclass(frozen=True)
class Lengths:
    """Of the pieces that have queries: int32 cumulative lengths, [pieces + 1], and the longest."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


Attend = Callable[[Tensor, Tensor, Tensor, Lengths, bool], Tensor]
"""out_TNH of q_TNH, k_SKH, v_SKH, all contiguous, the pieces' lengths, which end at T and S, and whether causal."""


def varlen_by(attend: Attend, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """out_TNH: every row attends to all rows of its segment; bounds begin at 0 and end at T. K divides N."""
    return _call(attend, q_TNH, k_TKH, v_TKH, _segments(bounds, q_TNH.device), causal=False)


def causal_by(attend: Attend, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """out_TNH, causal inside each piece: their queries follow one another, their keys are free. K divides N."""
    return _call(attend, q_TNH, k_SKH, v_SKH, _pieces(tuple(pieces), len(k_SKH), q_TNH.device), causal=True)


@dataclass(frozen=True)
class _Layout:
    lengths: Lengths | None
    """None where no piece has a query."""
    keys: Rows
    num_queries: int


def _call(attend: Attend, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, layout: _Layout, *, causal: bool) -> Tensor:
    assert layout.num_queries == len(q_TNH), (layout.num_queries, len(q_TNH))
    if layout.lengths is None:
        return q_TNH
    # Rows of keys that no piece counts would get a gradient that nothing writes: the kernels' is uninitialised.
    k_SKH, v_SKH = (take(x, layout.keys) for x in (k_SKH, v_SKH))
    return attend(q_TNH.contiguous(), k_SKH.contiguous(), v_SKH.contiguous(), layout.lengths, causal)


@lru_cache(maxsize=32)
def _segments(bounds: tuple[int, ...], device: torch.device) -> _Layout:
    edges = np.asarray(bounds)
    ranges = np.stack([edges[:-1], edges[1:]], axis=1)
    return _layout(ranges, ranges, bounds[-1], device)


@lru_cache(maxsize=32)
def _pieces(pieces: tuple[Piece, ...], num_keys: int, device: torch.device) -> _Layout:
    table = np.array([(p.q_start, p.q_end, p.k_start, p.k_end) for p in pieces], np.int64).reshape(-1, 4)
    assert (table[1:, 0] == table[:-1, 1]).all() and (table[:1, 0] == 0).all(), "query ranges must follow one another"
    return _layout(table[:, :2], table[:, 2:], num_keys, device)


def _layout(queries: np.ndarray, keys: np.ndarray, num_keys: int, device: torch.device) -> _Layout:
    filled = queries[:, 1] > queries[:, 0]
    q_lengths, k_lengths = ((ranges[:, 1] - ranges[:, 0])[filled] for ranges in (queries, keys))
    if not len(q_lengths):
        return _Layout(None, Rows(None, None, ()), 0)
    lengths = Lengths(
        _cumulative(q_lengths, device), _cumulative(k_lengths, device), int(q_lengths.max()), int(k_lengths.max())
    )
    return _Layout(lengths, rows_of(keys[filled], num_keys, device), int(q_lengths.sum()))


def _cumulative(lengths: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device, non_blocking=True)
