"""Causal grouped-query attention over the pieces of a text pack: reference, Triton kernels, autograd, public op.

The pieces' query ranges follow one another and cover all queries; key ranges are free, and overlap under context
parallelism. Inside a piece the last query stands at its last key, and no query sees a key after its own.

- Queries are turned in registers (M-RoPE: the caller gives cosines and sines). Keys come turned: they are read by many
  tiles, and under context parallelism they are gathered first.
- Forward: softmax with a running maximum over tiles of queries; blocks of keys before the diagonal have no mask.
- Backward: d_q by tiles of queries, which also writes the turned queries; then d_k and d_v by tiles of keys, through
  all pieces whose keys they are and all query heads that read them.
- Every output element is written by one program, without atomics: two runs give the same bits. Keys that no query sees
  have gradients of zero.

Dims: T queries, S keys, N query heads, K key heads, H head width, E its pairs (H / 2); in kernels R rows of a tile, L
rows of the other side, G query heads to a key head.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimo_triton_kernels.causal_tiles import Piece, key_tiling, query_tiling
from mimo_triton_kernels.launching import Blocks, capability, check_device, interprets, launch
from mimo_triton_kernels.rows import load_rows, load_turned, store_rows, store_turned_back, tile_of_program

HEAD_WIDTHS = (16, 32, 64, 128)
LN_2 = tl.constexpr(math.log(2))


@dataclass(frozen=True)
class Plan:
    """Sizes for one generation of GPUs: of those tried, ones that spill nothing (docs/kernels.md). Not timed yet."""

    forward: Blocks
    backward_q: Blocks
    backward_kv: Blocks


# Of tiles of keys, before 9.0: 64 rows are shared out to warps in pairs that do the same work; steps of 32 take 255
# registers and 112 bytes of stack. Tiles of 128 queries with steps of 64: 255 and 8.
BEFORE_HOPPER = Plan(
    Blocks(128, 32, num_warps=8, num_stages=2),
    Blocks(64, 32, num_warps=4, num_stages=2),
    Blocks(128, 16, num_warps=8, num_stages=2),
)
# Tiles of 64 keys in 4 warps: 255 registers and 72 bytes of stack; of 128 with steps of 64: 255 and 152.
HOPPER = Plan(
    Blocks(128, 64, num_warps=8, num_stages=3),
    Blocks(64, 64, num_warps=4, num_stages=2),
    Blocks(128, 32, num_warps=8, num_stages=2),
)
# With the next queries on their way: 255 registers and 264 bytes of stack (408 with tiles of 64 keys).
BLACKWELL = replace(HOPPER, backward_kv=Blocks(128, 32, num_warps=8, num_stages=1))
# In fp32 products are exact, by fused multiply-adds whose operands all lie in registers: tiles as above take thousands
# of bytes of stack. Forward, tiles of 32 queries in 4 warps: 255 registers and 304 bytes.
EXACT = Plan(
    Blocks(32, 16, num_warps=8, num_stages=2),
    Blocks(32, 16, num_warps=4, num_stages=2),
    Blocks(32, 16, num_warps=4, num_stages=2),
)
# Products over or into a head that stand in a kernel's code, which has a loop without a mask and one with it.
PRODUCTS = dict(causal_forward=2 * 2, causal_backward_q=2 * 3, causal_backward_kv=2 * 4)


# ---- 1. Reference: what model code computes; in fp64 the definition. The turn and softmax are at least in fp32. ----


def causal_attention_reference(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cos_TE: Tensor, sin_TE: Tensor, pieces: tuple[Piece, ...]
) -> Tensor:
    wide, group = torch.promote_types(q_TNH.dtype, torch.float32), q_TNH.shape[1] // k_SKH.shape[1]
    cos_T1E, sin_T1E = (x.to(wide).unsqueeze(1) for x in (cos_TE, sin_TE))
    first, second = q_TNH.to(wide).chunk(2, dim=-1)
    turned = torch.cat([first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E], dim=-1)
    turned_TNH = turned.to(q_TNH.dtype)
    outs = [turned_TNH[:0]]
    for q_start, q_end, k_start, k_end in pieces:
        k, v = (x[k_start:k_end].repeat_interleave(group, dim=1) for x in (k_SKH, v_SKH))
        scores_NQK = torch.einsum("qnh,knh->nqk", turned_TNH[q_start:q_end], k) / math.sqrt(k.shape[-1])
        is_seen_QK = torch.ones(scores_NQK.shape[1:], dtype=torch.bool, device=k.device)
        is_seen_QK = is_seen_QK.tril(k_end - k_start - (q_end - q_start))
        weights_NQK = scores_NQK.masked_fill(~is_seen_QK, -math.inf).softmax(-1, dtype=wide).to(v.dtype)
        outs.append(torch.einsum("nqk,knh->qnh", weights_NQK, v))
    return torch.cat(outs)


# ---- 2. Kernels. Program: one tile of one head, heads first: they share keys, and are neighbours in memory. ----


@triton.jit
def _absorb_keys(
    q, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, start, end, scale, max_R, sum_R, out,
    H: tl.constexpr, STEP: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum of weights and weighted sum of values after the keys from ``start`` to ``end``."""
    for first in range(start, end, STEP):
        key_L = first + tl.arange(0, STEP)
        k = load_rows(k_ptr, key_L.to(tl.int64), key_L < end, k_stride, H)
        v = load_rows(v_ptr, key_L.to(tl.int64), key_L < end, v_stride, H)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if IS_MASKED:
            is_seen = (key_L[None, :] >= low_R[:, None]) & (key_L[None, :] < high_R[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
        new_max_R = tl.maximum(max_R, tl.max(scores, 1))
        weights, shrink_R = tl.exp2(scores - new_max_R[:, None]), tl.exp2(max_R - new_max_R)
        sum_R = sum_R * shrink_R + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink_R[:, None], input_precision="ieee")
        max_R = new_max_R
    return max_R, sum_R, out


@triton.jit
def _causal_forward(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, tiles_ptr, seen_ptr, out_ptr, log_sum_ptr,
    num_rows, q_stride, k_stride, v_stride, scale,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row_R, keep_R, low_R, high_R = tile_of_program(tiles_ptr, seen_ptr, num_rows, N, R)
    head, at = tl.program_id(0) % N, tiles_ptr + tl.program_id(0) // N * 5
    key_start, key_middle, key_end = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    q = load_turned(q_ptr + head * H, row_R, keep_R, q_stride, cos_ptr, sin_ptr, H)
    k_ptr, v_ptr = k_ptr + head // G * H, v_ptr + head // G * H
    max_R, sum_R = tl.full((R,), -1e30, tl.float32), tl.zeros((R,), tl.float32)  # finite: a block may hide all its keys
    out = tl.zeros((R, H), tl.float32)
    max_R, sum_R, out = _absorb_keys(
        q, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, key_start, key_middle, scale, max_R, sum_R, out,
        H, STEP, False,
    )  # fmt: skip
    max_R, sum_R, out = _absorb_keys(
        q, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, key_middle, key_end, scale, max_R, sum_R, out,
        H, STEP, True,
    )  # fmt: skip
    store_rows(out_ptr + head * H, row_R, keep_R, N * H, out / sum_R[:, None], H)
    tl.store(log_sum_ptr + head.to(tl.int64) * num_rows + row_R, max_R + tl.log2(sum_R), mask=keep_R)


@triton.jit
def _add_d_q(
    q, d_out, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, log_sum_R, along_R, start, end, scale, d_q,
    H: tl.constexpr, STEP: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of turned queries, with what the keys from ``start`` to ``end`` add."""
    for first in range(start, end, STEP):
        key_L = first + tl.arange(0, STEP)
        k = load_rows(k_ptr, key_L.to(tl.int64), key_L < end, k_stride, H)
        v = load_rows(v_ptr, key_L.to(tl.int64), key_L < end, v_stride, H)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - log_sum_R[:, None])
        if IS_MASKED:
            weights = tl.where((key_L[None, :] >= low_R[:, None]) & (key_L[None, :] < high_R[:, None]), weights, 0.0)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        d_scores = weights * (d_weights - along_R[:, None]) * (scale * LN_2)
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision="ieee")
    return d_q


@triton.jit
def _causal_backward_q(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, tiles_ptr, seen_ptr, out_ptr, d_out_ptr, log_sum_ptr, along_ptr,
    q_turned_ptr, d_q_ptr, num_rows, q_stride, k_stride, v_stride, scale,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # w = softmax(s), d_w = d_out v^T, d_s = w (d_w - sum_k w d_w), where that sum is out . d_out; d_q = d_s k
    row_R, keep_R, low_R, high_R = tile_of_program(tiles_ptr, seen_ptr, num_rows, N, R)
    head, at = tl.program_id(0) % N, tiles_ptr + tl.program_id(0) // N * 5
    key_start, key_middle, key_end = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    q = load_turned(q_ptr + head * H, row_R, keep_R, q_stride, cos_ptr, sin_ptr, H)
    store_rows(q_turned_ptr + head * H, row_R, keep_R, N * H, q, H)
    out = load_rows(out_ptr + head * H, row_R, keep_R, N * H, H)
    d_out = load_rows(d_out_ptr + head * H, row_R, keep_R, N * H, H)
    along_R = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    statistics = head.to(tl.int64) * num_rows + row_R
    tl.store(along_ptr + statistics, along_R, mask=keep_R)
    log_sum_R = tl.load(log_sum_ptr + statistics, mask=keep_R, other=float("inf"))
    k_ptr, v_ptr = k_ptr + head // G * H, v_ptr + head // G * H
    d_q = tl.zeros((R, H), tl.float32)
    d_q = _add_d_q(
        q, d_out, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, log_sum_R, along_R, key_start, key_middle, scale,
        d_q, H, STEP, False,
    )  # fmt: skip
    d_q = _add_d_q(
        q, d_out, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, log_sum_R, along_R, key_middle, key_end, scale,
        d_q, H, STEP, True,
    )  # fmt: skip
    store_turned_back(d_q_ptr + head * H, row_R, keep_R, N * H, cos_ptr, sin_ptr, d_q, H)


@triton.jit
def _add_d_kv(
    k, v, key_R, q_ptr, d_out_ptr, log_sum_ptr, along_ptr, seen_ptr, num_rows, stride, start, end, scale, d_k, d_v,
    H: tl.constexpr, STEP: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of turned keys and of values, with what the queries from ``start`` to ``end`` of a head add."""
    for first in range(start, end, STEP):
        query_L = first + tl.arange(0, STEP)
        is_there_L = query_L < end
        q = load_rows(q_ptr, query_L.to(tl.int64), is_there_L, stride, H)
        d_out = load_rows(d_out_ptr, query_L.to(tl.int64), is_there_L, stride, H)
        log_sum_L = tl.load(log_sum_ptr + query_L, mask=is_there_L, other=float("inf"))
        along_L = tl.load(along_ptr + query_L, mask=is_there_L, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - log_sum_L[None, :])
        if IS_MASKED:
            low_L = tl.load(seen_ptr + query_L, mask=is_there_L, other=0)
            high_L = tl.load(seen_ptr + num_rows + query_L, mask=is_there_L, other=0)
            weights = tl.where((key_R[:, None] >= low_L[None, :]) & (key_R[:, None] < high_L[None, :]), weights, 0.0)
        d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision="ieee")
        d_weights = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        d_scores = weights * (d_weights - along_L[None, :]) * (scale * LN_2)
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision="ieee")
    return d_k, d_v


@triton.jit
def _causal_backward_kv(
    q_turned_ptr, k_ptr, v_ptr, tiles_ptr, spans_ptr, seen_ptr, d_out_ptr, log_sum_ptr, along_ptr, d_k_ptr, d_v_ptr,
    num_rows, k_stride, v_stride, scale,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # Scores transposed, [keys, queries]: w^T and d_s^T are the left sides of both products as they come.
    key_head, at = tl.program_id(0) % (N // G), tiles_ptr + tl.program_id(0) // (N // G) * 4
    key_R = tl.load(at) + tl.arange(0, R)
    keep_R, first_span, end_span = key_R < tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    k = load_rows(k_ptr + key_head * H, key_R.to(tl.int64), keep_R, k_stride, H)
    v = load_rows(v_ptr + key_head * H, key_R.to(tl.int64), keep_R, v_stride, H)
    d_k, d_v = tl.zeros((R, H), tl.float32), tl.zeros((R, H), tl.float32)
    for span in range(first_span, end_span):
        start, middle, end = (
            tl.load(spans_ptr + 3 * span),
            tl.load(spans_ptr + 3 * span + 1),
            tl.load(spans_ptr + 3 * span + 2),
        )
        for query_head in range(G):
            head = key_head * G + query_head
            statistics = head.to(tl.int64) * num_rows
            q_ptr, head_d_out_ptr = q_turned_ptr + head * H, d_out_ptr + head * H
            d_k, d_v = _add_d_kv(
                k, v, key_R, q_ptr, head_d_out_ptr, log_sum_ptr + statistics, along_ptr + statistics, seen_ptr,
                num_rows, N * H, start, middle, scale, d_k, d_v, H, STEP, True,
            )  # fmt: skip
            d_k, d_v = _add_d_kv(
                k, v, key_R, q_ptr, head_d_out_ptr, log_sum_ptr + statistics, along_ptr + statistics, seen_ptr,
                num_rows, N * H, middle, end, scale, d_k, d_v, H, STEP, False,
            )  # fmt: skip
    width: tl.constexpr = N // G * H
    store_rows(d_k_ptr + key_head * H, key_R.to(tl.int64), keep_R, width, d_k, H)
    store_rows(d_v_ptr + key_head * H, key_R.to(tl.int64), keep_R, width, d_v, H)


# ---- 3. Autograd: launches and saved tensors. ----


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cos_TE: Tensor, sin_TE: Tensor, pieces: tuple[Piece, ...]
    ) -> Tensor:
        num_rows, num_heads, width = q_TNH.shape
        ctx.pieces, ctx.plan = pieces, _plan(capability(q_TNH.device), q_TNH.dtype)
        out_TNH, log_sum_NT = q_TNH.new_empty(q_TNH.shape), q_TNH.new_empty(num_heads, num_rows, dtype=torch.float32)
        blocks = ctx.plan.forward
        tiles = query_tiling(pieces, blocks.rows, blocks.step, q_TNH.device)
        launch(
            _causal_forward, len(tiles) * num_heads, blocks,
            q_TNH, k_SKH, v_SKH, cos_TE, sin_TE, tiles.tiles_X5, tiles.seen_2T, out_TNH, log_sum_NT,
            num_rows, q_TNH.stride(0), k_SKH.stride(0), v_SKH.stride(0), _scale(width),
            N=num_heads, G=num_heads // k_SKH.shape[1], H=width, R=blocks.rows, STEP=blocks.step,
        )  # fmt: skip
        ctx.save_for_backward(q_TNH, k_SKH, v_SKH, cos_TE, sin_TE, out_TNH, log_sum_NT)
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_SKH, v_SKH, cos_TE, sin_TE, out_TNH, log_sum_NT = ctx.saved_tensors
        num_rows, num_heads, width = q_TNH.shape
        group, key_strides = num_heads // k_SKH.shape[1], (k_SKH.stride(0), v_SKH.stride(0))
        d_out_TNH, along_NT = d_out_TNH.contiguous(), torch.empty_like(log_sum_NT)
        q_turned_TNH, d_q_TNH = (q_TNH.new_empty(q_TNH.shape) for _ in range(2))
        d_k_SKH, d_v_SKH = (k_SKH.new_empty(k_SKH.shape) for _ in range(2))
        blocks = ctx.plan.backward_q
        tiles = query_tiling(ctx.pieces, blocks.rows, blocks.step, q_TNH.device)
        launch(
            _causal_backward_q, len(tiles) * num_heads, blocks,
            q_TNH, k_SKH, v_SKH, cos_TE, sin_TE, tiles.tiles_X5, tiles.seen_2T, out_TNH, d_out_TNH, log_sum_NT,
            along_NT, q_turned_TNH, d_q_TNH, num_rows, q_TNH.stride(0), *key_strides, _scale(width),
            N=num_heads, G=group, H=width, R=blocks.rows, STEP=blocks.step,
        )  # fmt: skip
        blocks = ctx.plan.backward_kv
        of_keys = key_tiling(ctx.pieces, len(k_SKH), blocks.rows, blocks.step, q_TNH.device)
        launch(
            _causal_backward_kv, len(of_keys) * (num_heads // group), blocks,
            q_turned_TNH, k_SKH, v_SKH, of_keys.tiles_X4, of_keys.spans_Y3, tiles.seen_2T, d_out_TNH, log_sum_NT,
            along_NT, d_k_SKH, d_v_SKH, num_rows, *key_strides, _scale(width),
            N=num_heads, G=group, H=width, R=blocks.rows, STEP=blocks.step,
        )  # fmt: skip
        return d_q_TNH, d_k_SKH, d_v_SKH, None, None, None


def _plan(capability: int, dtype: torch.dtype) -> Plan:
    """The interpreter takes large tiles in any dtype: it is slow by the step."""
    if dtype == torch.float32 and not interprets():
        return EXACT
    return BEFORE_HOPPER if capability < 90 else HOPPER if capability < 100 else BLACKWELL


def _scale(width: int) -> float:
    """Kernels take powers of 2: scores in units of ln 2."""
    return math.log2(math.e) / math.sqrt(width)


# ---- 4. Public op: checks its contract, then runs. ----


def causal_attention(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cos_TE: Tensor, sin_TE: Tensor, pieces: tuple[Piece, ...]
) -> Tensor:
    """out_TNH: every query, after its turn, attends to the keys of its piece up to its own; K divides N.

    A piece is (q_start, q_end, k_start, k_end), its last query at its last key. Keys are turned already. Rows of q, k
    and v may be strided; the angles' cosines and sines, those of the queries, are float32 and get no gradient.
    ValueError where a shape, a dtype, a piece or the device is none that the kernels compute.
    """
    _check_shapes(q_TNH, k_SKH, v_SKH)
    for name, angles in (("cos", cos_TE), ("sin", sin_TE)):
        want = (len(q_TNH), q_TNH.shape[2] // 2)
        if angles.shape != want or angles.dtype != torch.float32:
            got = f"{tuple(angles.shape)} of {angles.dtype}"
            raise ValueError(f"causal_attention: {name} is {list(want)} of float32, got {got}")
    _check_pieces(pieces, len(q_TNH), len(k_SKH))
    check_device("causal_attention", q_TNH, k_SKH, v_SKH, cos_TE, sin_TE)
    q_TNH, k_SKH, v_SKH = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_TNH, k_SKH, v_SKH))
    return _CausalAttention.apply(q_TNH, k_SKH, v_SKH, cos_TE.contiguous(), sin_TE.contiguous(), pieces)


def _check_shapes(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> None:
    if q_TNH.dim() != 3 or q_TNH.shape[2] not in HEAD_WIDTHS:
        widths = ", ".join(map(str, HEAD_WIDTHS))
        raise ValueError(f"causal_attention: q is [T, N, H], H one of {widths}, got {tuple(q_TNH.shape)}")
    num_heads, width = q_TNH.shape[1:]
    if k_SKH.dim() != 3 or k_SKH.shape != v_SKH.shape or k_SKH.shape[2] != width or num_heads % k_SKH.shape[1]:
        got = f"k {tuple(k_SKH.shape)} and v {tuple(v_SKH.shape)}"
        raise ValueError(f"causal_attention: k and v are [S, K, {width}], K divides {num_heads}, got {got}")
    dtypes = {x.dtype for x in (q_TNH, k_SKH, v_SKH)}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"causal_attention: q, k and v are float32, float16 or bfloat16 alike, got {got}")


@lru_cache(maxsize=64)
def _check_pieces(pieces: tuple[Piece, ...], num_queries: int, num_keys: int) -> None:
    done = 0
    for piece in pieces:
        q_start, q_end, k_start, k_end = piece
        if q_start != done or q_end < q_start:
            raise ValueError(f"causal_attention: query ranges follow one another from 0; {piece} comes after {done}")
        if not 0 <= k_start <= k_end <= num_keys or q_end - q_start > k_end - k_start:
            raise ValueError(f"causal_attention: keys lie in 0..{num_keys}, as many as queries at least: {piece}")
        done = q_end
    if done != num_queries:
        raise ValueError(f"causal_attention: pieces end at query {done} of {num_queries}")
