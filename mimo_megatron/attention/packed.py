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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mimo_megatron.attention import libraries
from mimo_megatron.attention.reference import Piece, reference_attention
from mimo_megatron.attention.rows import Rows, rows_of, take
from mimo_megatron.attention.varlen import causal_by, varlen_by

Backend = Literal["reference", "sdpa", "varlen", "flash"]
__all__ = ["Backend", "Piece", "causal_attention", "varlen_attention"]


def varlen_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], *, backend: Backend = "sdpa"
) -> Tensor:
    """out_TNH: every row attends to all rows of its own run; run i is the rows ``bounds[i]`` to ``bounds[i + 1]``."""
    assert bounds[0] == 0 and bounds[-1] == len(q_TNH) == len(k_TKH), (bounds[0], bounds[-1], len(q_TNH), len(k_TKH))
    if backend == "reference":
        pieces = [Piece(start, end, start, end) for start, end in pairwise(bounds)]
        return reference_attention(q_TNH, k_TKH, v_TKH, pieces, causal=False)
    if backend in ("varlen", "flash"):
        library = libraries.find(backend, q_TNH.shape[-1], causal=False)
        return varlen_by(library.attend, q_TNH, k_TKH, v_TKH, bounds)
    return _grouped_sdpa(q_TNH, k_TKH, v_TKH, _group_runs(bounds, q_TNH.device), causal=False)


def causal_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, pieces: Sequence[Piece], *, backend: Backend = "sdpa"
) -> Tensor:
    """out_TNH: bottom-right-aligned causal attention inside each piece, with grouped-query heads (K divides N).

    The pieces' query ranges cover all rows of q in order; their key ranges are free, and may overlap.
    """
    if backend == "reference":
        return reference_attention(q_TNH, k_TKH, v_TKH, pieces, causal=True)
    if backend in ("varlen", "flash"):
        library = libraries.find(backend, q_TNH.shape[-1], causal=True)
        return causal_by(library.attend, q_TNH, k_TKH, v_TKH, pieces)
    groups = _group_pieces(tuple(pieces), len(k_TKH), q_TNH.device)
    assert groups.num_queries == len(q_TNH), (groups.num_queries, len(q_TNH))
    return _grouped_sdpa(q_TNH, k_TKH, v_TKH, groups, causal=True)


# ---------------------------------------------------------------------------------------------------------------------
# Grouping: on the CPU, once per pack and device
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Groups:
    shapes: tuple[tuple[int, int, int], ...]
    """(pieces, query length, key length) of each batched call."""
    queries: Rows
    keys: Rows

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
        queries=rows_of(queries[order], int(lengths[:, 0].sum()), device),
        keys=rows_of(keys[order], len_keys, device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Computation
# ---------------------------------------------------------------------------------------------------------------------


def without_plans(device: torch.device) -> AbstractContextManager[Any]:
    """Within it calls of ``scaled_dot_product_attention`` on a GPU are not cuDNN's, which torch 2.11 prefers on 9.0 and
    10.0: cuDNN plans every shape anew on the host, for tens of milliseconds, and packs bring new lengths every step, as
    every token of generation does.

    Not for masked calls with grouped-query heads: flash takes no masks and the memory-efficient kernel no grouped
    heads, so that only whole tables of scores would be left. Key heads repeated for the latter would be kept for the
    backward. The libraries' kernels (``varlen.py``) need no mask.
    """
    planless = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(planless) if device.type == "cuda" else nullcontext()


def _grouped_sdpa(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, groups: _Groups, causal: bool) -> Tensor:
    if not groups.shapes:
        return q_TNH
    q_parts = take(q_TNH, groups.queries).split([count * q_length for count, q_length, _ in groups.shapes])
    k_sizes = [count * k_length for count, _, k_length in groups.shapes]
    k_parts, v_parts = (take(x, groups.keys).split(k_sizes) for x in (k_TKH, v_TKH))
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
    return take(out_TNH, groups.queries.reversed)
