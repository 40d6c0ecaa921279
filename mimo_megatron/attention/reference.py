"""Packed attention by its definition: one dense softmax per piece. The oracle of every other backend.

Softmax and products run in at least float32, and in float64 for float64 inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Query rows that attend to key rows: the last query stands at the last key, so no query sees a key after its own.

    A whole segment has equal ranges; a context-parallel chunk has the keys of everything before it in its segment too.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int

    def __post_init__(self) -> None:
        assert 0 <= self.q_end - self.q_start <= self.k_end - self.k_start, f"a query without a key: {self}"


def reference_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, pieces: Sequence[Piece], causal: bool) -> Tensor:
    """out_TNH: softmax(q k^T / sqrt(H)) v inside each piece; K divides N, query head n reads key head n * K // N."""
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    queries_per_key = q_TNH.shape[1] // k_TKH.shape[1]
    outs = [q_TNH.new_zeros((0, *q_TNH.shape[1:]))]
    for piece in pieces:
        q = q_TNH[piece.q_start : piece.q_end].to(wide)
        k, v = (x[piece.k_start : piece.k_end].to(wide).repeat_interleave(queries_per_key, 1) for x in (k_TKH, v_TKH))
        scores_NQK = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(q.shape[-1])
        if causal:
            seen_QK = torch.ones(scores_NQK.shape[1:], dtype=torch.bool, device=q.device).tril(len(k) - len(q))
            scores_NQK = scores_NQK.masked_fill(~seen_QK, -math.inf)
        outs.append(torch.einsum("nqk,knh->qnh", scores_NQK.softmax(-1), v).to(q_TNH.dtype))
    return torch.cat(outs)
