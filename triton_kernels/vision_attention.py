"""Attention of a vision encoder straight from its QKV product: reference, Triton kernels, autograd, public op.

Segments (windows or frames) lie one after another; every row attends to all rows of its own, after the rotary turn of
q and k. A head is 80 wide and computed as 64 + 16, turned in registers (``head_80.py``).

- No segment over 64 rows, on Hopper and later: one kernel each way. A tile holds whole segments, its softmax is plain,
  and the backward computes the weights again from qkv; nothing but the inputs is kept.
- Otherwise keys (in the backward queries too) are turned once into a buffer, since every tile of a long segment reads
  them; softmax with a running maximum; the backward takes d_q by tiles of queries, then d_k and d_v by tiles of keys.
- Every output element is written by one program, without atomics: two runs give the same bits.

Dims: T rows, N heads, H head width (80), E its pairs (40); in kernels R rows of a tile, K rows of the other side.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimo_triton_kernels.head_80 import inner, load_rows, load_turned, outer, store_rows, store_turned_back
from mimo_triton_kernels.launching import Blocks, capability, check_device, launch
from mimo_triton_kernels.rows import tile_of_program
from mimo_triton_kernels.tiles import tiling

HEAD_WIDTH = 80
SCALE = math.log2(math.e) / math.sqrt(HEAD_WIDTH)  # kernels take powers of 2: scores in units of ln 2
LN_2 = tl.constexpr(math.log(2))


@dataclass(frozen=True)
class Plan:
    """Sizes for one generation of GPUs: of those tried, ones that spill nothing (docs/kernels.md). Not timed yet."""

    short: Blocks | None
    """None: the long kernels take short segments too."""
    forward: Blocks
    backward: Blocks


TURN = Blocks(rows=64, step=64, num_warps=4, num_stages=1)
# Before 9.0 keys are turned in the layout of a matrix operand, which every warp holds whole: the short kernels need 255
# registers and 296 (forward) or 464 bytes of stack (backward).
BEFORE_HOPPER = Plan(None, Blocks(128, 64, num_warps=8, num_stages=2), Blocks(64, 16, num_warps=4, num_stages=2))
# The backward with steps of 64: 255 registers and 64 bytes of stack on sm_90.
HOPPER = Plan(
    Blocks(64, 64, num_warps=4, num_stages=1),
    Blocks(128, 64, num_warps=8, num_stages=3),
    Blocks(64, 32, num_warps=4, num_stages=2),
)
# Products of 80 dims that stand in a kernel's code; long ones have a loop over keys without a mask and one with it.
PRODUCTS = dict(
    short_forward=2, short_backward=5, turn_rows=0, long_forward=2 * 2, long_backward_q=2 * 3, long_backward_kv=2 * 4
)


# ---- 1. Reference: the definition. At least fp32 inside; q and k are rounded to the inputs' dtype after the turn. ----


def vision_attention_reference(qkv_T3NH: Tensor, cos_TE: Tensor, sin_TE: Tensor, bounds: tuple[int, ...]) -> Tensor:
    wide = torch.promote_types(qkv_T3NH.dtype, torch.float32)
    cos_T1E, sin_T1E = (x.to(wide).unsqueeze(1) for x in (cos_TE, sin_TE))

    def turn(x_TNH: Tensor) -> Tensor:
        first, second = x_TNH.to(wide).chunk(2, dim=-1)
        turned = torch.cat([first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E], dim=-1)
        return turned.to(x_TNH.dtype).to(wide)

    q_TNH, k_TNH, v_TNH = qkv_T3NH.unbind(1)
    q_TNH, k_TNH, v_TNH = turn(q_TNH), turn(k_TNH), v_TNH.to(wide)
    outs = []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end] for x in (q_TNH, k_TNH, v_TNH))
        weights_NQK = (torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        outs.append(torch.einsum("nqk,knh->qnh", weights_NQK, v))
    return torch.cat(outs).to(qkv_T3NH.dtype)


# ---- 2. Kernels. Program: one tile of one head, heads first, since heads of a row are neighbours in memory. ----


@triton.jit
def _short_forward(
    qkv_ptr, cos_ptr, sin_ptr, tiles_ptr, segment_ptr, out_ptr, num_rows, qkv_stride, scale,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row_R, keep_R, low_R, high_R = tile_of_program(tiles_ptr, segment_ptr, num_rows, N, R)
    head = tl.program_id(0) % N
    q_wide, q_narrow = load_turned(qkv_ptr + head * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    k_wide, k_narrow = load_turned(qkv_ptr + (N + head) * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    v_wide, v_narrow = load_rows(qkv_ptr + (2 * N + head) * 80, row_R, keep_R, qkv_stride)
    is_seen = (row_R[None, :] >= low_R[:, None]) & (row_R[None, :] < high_R[:, None])
    scores = tl.where(is_seen, inner(q_wide, q_narrow, k_wide, k_narrow) * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    zero_wide, zero_narrow = tl.zeros((R, 64), tl.float32), tl.zeros((R, 16), tl.float32)
    out_wide, out_narrow = outer(weights, v_wide, v_narrow, zero_wide, zero_narrow)
    sum_R1 = tl.sum(weights, 1)[:, None]
    store_rows(out_ptr + head * 80, row_R, keep_R, N * 80, out_wide / sum_R1, out_narrow / sum_R1)


@triton.jit
def _short_backward(
    qkv_ptr, cos_ptr, sin_ptr, tiles_ptr, segment_ptr, d_out_ptr, d_qkv_ptr, num_rows, qkv_stride, scale,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # w = softmax(s), d_w = d_out v^T, d_s = w (d_w - sum_k w d_w); d_v = w^T d_out, d_q = d_s k, d_k = d_s^T q
    row_R, keep_R, low_R, high_R = tile_of_program(tiles_ptr, segment_ptr, num_rows, N, R)
    head = tl.program_id(0) % N
    q_wide, q_narrow = load_turned(qkv_ptr + head * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    k_wide, k_narrow = load_turned(qkv_ptr + (N + head) * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    v_wide, v_narrow = load_rows(qkv_ptr + (2 * N + head) * 80, row_R, keep_R, qkv_stride)
    d_out_wide, d_out_narrow = load_rows(d_out_ptr + head * 80, row_R, keep_R, N * 80)
    is_seen = (row_R[None, :] >= low_R[:, None]) & (row_R[None, :] < high_R[:, None])
    scores = tl.where(is_seen, inner(q_wide, q_narrow, k_wide, k_narrow) * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    zero_wide, zero_narrow = tl.zeros((R, 64), tl.float32), tl.zeros((R, 16), tl.float32)
    d_wide, d_narrow = outer(tl.trans(weights.to(q_wide.dtype)), d_out_wide, d_out_narrow, zero_wide, zero_narrow)
    store_rows(d_qkv_ptr + (2 * N + head) * 80, row_R, keep_R, 3 * N * 80, d_wide, d_narrow)
    d_weights = inner(d_out_wide, d_out_narrow, v_wide, v_narrow)
    d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None]) * (scale * LN_2)
    d_scores = d_scores.to(q_wide.dtype)
    d_wide, d_narrow = outer(d_scores, k_wide, k_narrow, zero_wide, zero_narrow)
    store_turned_back(d_qkv_ptr + head * 80, row_R, keep_R, 3 * N * 80, cos_ptr, sin_ptr, d_wide, d_narrow)
    d_wide, d_narrow = outer(tl.trans(d_scores), q_wide, q_narrow, zero_wide, zero_narrow)
    store_turned_back(d_qkv_ptr + (N + head) * 80, row_R, keep_R, 3 * N * 80, cos_ptr, sin_ptr, d_wide, d_narrow)


@triton.jit
def _turn_rows(qkv_ptr, cos_ptr, sin_ptr, turned_ptr, num_rows, qkv_stride, N: tl.constexpr, R: tl.constexpr):
    """Queries or keys, turned, in the order of the two products: what long segments read again and again."""
    row_R = (tl.program_id(0) // N * R + tl.arange(0, R)).to(tl.int64)
    head, keep_R = tl.program_id(0) % N, row_R < num_rows
    wide, narrow = load_turned(qkv_ptr + head * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    store_rows(turned_ptr + head * 80, row_R, keep_R, N * 80, wide, narrow)


@triton.jit
def _absorb_keys(
    q_wide, q_narrow, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, start, end, scale,
    max_R, sum_R, out_wide, out_narrow, STEP: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum of weights and weighted sum of values after the keys from ``start`` to ``end``."""
    for first in range(start, end, STEP):
        key_K = first + tl.arange(0, STEP)
        k_wide, k_narrow = load_rows(k_ptr, key_K.to(tl.int64), key_K < end, k_stride)
        v_wide, v_narrow = load_rows(v_ptr, key_K.to(tl.int64), key_K < end, v_stride)
        scores = inner(q_wide, q_narrow, k_wide, k_narrow) * scale
        if IS_MASKED:
            is_seen = (key_K[None, :] >= low_R[:, None]) & (key_K[None, :] < high_R[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
        new_max_R = tl.maximum(max_R, tl.max(scores, 1))
        weights, shrink_R = tl.exp2(scores - new_max_R[:, None]), tl.exp2(max_R - new_max_R)
        sum_R = sum_R * shrink_R + tl.sum(weights, 1)
        out_wide, out_narrow = out_wide * shrink_R[:, None], out_narrow * shrink_R[:, None]
        out_wide, out_narrow = outer(weights, v_wide, v_narrow, out_wide, out_narrow)
        max_R = new_max_R
    return max_R, sum_R, out_wide, out_narrow


@triton.jit
def _long_forward(
    qkv_ptr, k_turned_ptr, cos_ptr, sin_ptr, tiles_ptr, segment_ptr, out_ptr, log_sum_ptr, num_rows, qkv_stride, scale,
    N: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row_R, keep_R, low_R, high_R = tile_of_program(tiles_ptr, segment_ptr, num_rows, N, R)
    head, at = tl.program_id(0) % N, tiles_ptr + tl.program_id(0) // N * 5
    key_start, key_middle, key_end = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    q_wide, q_narrow = load_turned(qkv_ptr + head * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    k_ptr, v_ptr = k_turned_ptr + head * 80, qkv_ptr + (2 * N + head) * 80
    max_R, sum_R = tl.full((R,), -1e30, tl.float32), tl.zeros((R,), tl.float32)  # finite: a block may hide all its keys
    out_wide, out_narrow = tl.zeros((R, 64), tl.float32), tl.zeros((R, 16), tl.float32)
    max_R, sum_R, out_wide, out_narrow = _absorb_keys(
        q_wide, q_narrow, k_ptr, v_ptr, N * 80, qkv_stride, low_R, high_R, key_start, key_middle, scale,
        max_R, sum_R, out_wide, out_narrow, STEP, False,
    )  # fmt: skip
    max_R, sum_R, out_wide, out_narrow = _absorb_keys(
        q_wide, q_narrow, k_ptr, v_ptr, N * 80, qkv_stride, low_R, high_R, key_middle, key_end, scale,
        max_R, sum_R, out_wide, out_narrow, STEP, True,
    )  # fmt: skip
    store_rows(out_ptr + head * 80, row_R, keep_R, N * 80, out_wide / sum_R[:, None], out_narrow / sum_R[:, None])
    tl.store(log_sum_ptr + head.to(tl.int64) * num_rows + row_R, max_R + tl.log2(sum_R), mask=keep_R)


@triton.jit
def _add_d_q(
    q_wide, q_narrow, d_out_wide, d_out_narrow, k_ptr, v_ptr, k_stride, v_stride, low_R, high_R, log_sum_R, along_R,
    start, end, scale, d_wide, d_narrow, STEP: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of turned queries, with what the keys from ``start`` to ``end`` add."""
    for first in range(start, end, STEP):
        key_K = first + tl.arange(0, STEP)
        k_wide, k_narrow = load_rows(k_ptr, key_K.to(tl.int64), key_K < end, k_stride)
        v_wide, v_narrow = load_rows(v_ptr, key_K.to(tl.int64), key_K < end, v_stride)
        weights = tl.exp2(inner(q_wide, q_narrow, k_wide, k_narrow) * scale - log_sum_R[:, None])
        if IS_MASKED:
            weights = tl.where((key_K[None, :] >= low_R[:, None]) & (key_K[None, :] < high_R[:, None]), weights, 0.0)
        d_weights = inner(d_out_wide, d_out_narrow, v_wide, v_narrow)
        d_scores = weights * (d_weights - along_R[:, None]) * (scale * LN_2)
        d_wide, d_narrow = outer(d_scores, k_wide, k_narrow, d_wide, d_narrow)
    return d_wide, d_narrow


@triton.jit
def _long_backward_q(
    qkv_ptr, k_turned_ptr, cos_ptr, sin_ptr, tiles_ptr, segment_ptr, out_ptr, d_out_ptr, log_sum_ptr, along_ptr,
    d_qkv_ptr, num_rows, qkv_stride, scale, N: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # d_q = d_s k as in _short_backward, where sum_k w d_w = out . d_out, the `along` that d_k needs too
    row_R, keep_R, low_R, high_R = tile_of_program(tiles_ptr, segment_ptr, num_rows, N, R)
    head, at = tl.program_id(0) % N, tiles_ptr + tl.program_id(0) // N * 5
    key_start, key_middle, key_end = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    q_wide, q_narrow = load_turned(qkv_ptr + head * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    out_wide, out_narrow = load_rows(out_ptr + head * 80, row_R, keep_R, N * 80)
    d_out_wide, d_out_narrow = load_rows(d_out_ptr + head * 80, row_R, keep_R, N * 80)
    along_R = tl.sum(out_wide.to(tl.float32) * d_out_wide.to(tl.float32), 1)
    along_R += tl.sum(out_narrow.to(tl.float32) * d_out_narrow.to(tl.float32), 1)
    statistics = head.to(tl.int64) * num_rows + row_R
    tl.store(along_ptr + statistics, along_R, mask=keep_R)
    log_sum_R = tl.load(log_sum_ptr + statistics, mask=keep_R, other=float("inf"))
    k_ptr, v_ptr = k_turned_ptr + head * 80, qkv_ptr + (2 * N + head) * 80
    d_wide, d_narrow = tl.zeros((R, 64), tl.float32), tl.zeros((R, 16), tl.float32)
    d_wide, d_narrow = _add_d_q(
        q_wide, q_narrow, d_out_wide, d_out_narrow, k_ptr, v_ptr, N * 80, qkv_stride, low_R, high_R, log_sum_R, along_R,
        key_start, key_middle, scale, d_wide, d_narrow, STEP, False,
    )  # fmt: skip
    d_wide, d_narrow = _add_d_q(
        q_wide, q_narrow, d_out_wide, d_out_narrow, k_ptr, v_ptr, N * 80, qkv_stride, low_R, high_R, log_sum_R, along_R,
        key_middle, key_end, scale, d_wide, d_narrow, STEP, True,
    )  # fmt: skip
    store_turned_back(d_qkv_ptr + head * 80, row_R, keep_R, 3 * N * 80, cos_ptr, sin_ptr, d_wide, d_narrow)


@triton.jit
def _add_d_kv(
    k_wide, k_narrow, v_wide, v_narrow, q_ptr, d_out_ptr, log_sum_ptr, along_ptr, stride, low_R, high_R, start, end,
    scale, d_k_wide, d_k_narrow, d_v_wide, d_v_narrow, STEP: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of turned keys and of values, with what the queries from ``start`` to ``end`` add."""
    for first in range(start, end, STEP):
        query_K = first + tl.arange(0, STEP)
        is_there_K = query_K < end
        q_wide, q_narrow = load_rows(q_ptr, query_K.to(tl.int64), is_there_K, stride)
        d_out_wide, d_out_narrow = load_rows(d_out_ptr, query_K.to(tl.int64), is_there_K, stride)
        log_sum_K = tl.load(log_sum_ptr + query_K, mask=is_there_K, other=float("inf"))
        along_K = tl.load(along_ptr + query_K, mask=is_there_K, other=0.0)
        weights = tl.exp2(inner(k_wide, k_narrow, q_wide, q_narrow) * scale - log_sum_K[None, :])
        if IS_MASKED:
            is_seen = (query_K[None, :] >= low_R[:, None]) & (query_K[None, :] < high_R[:, None])
            weights = tl.where(is_seen, weights, 0.0)
        d_v_wide, d_v_narrow = outer(weights, d_out_wide, d_out_narrow, d_v_wide, d_v_narrow)
        d_weights = inner(v_wide, v_narrow, d_out_wide, d_out_narrow)
        d_scores = weights * (d_weights - along_K[None, :]) * (scale * LN_2)
        d_k_wide, d_k_narrow = outer(d_scores, q_wide, q_narrow, d_k_wide, d_k_narrow)
    return d_k_wide, d_k_narrow, d_v_wide, d_v_narrow


@triton.jit
def _long_backward_kv(
    qkv_ptr, q_turned_ptr, cos_ptr, sin_ptr, tiles_ptr, segment_ptr, d_out_ptr, log_sum_ptr, along_ptr, d_qkv_ptr,
    num_rows, qkv_stride, scale, N: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # Scores transposed, [keys, queries]: w^T and d_s^T are the left sides of both products as they come.
    row_R, keep_R, low_R, high_R = tile_of_program(tiles_ptr, segment_ptr, num_rows, N, R)
    head, at = tl.program_id(0) % N, tiles_ptr + tl.program_id(0) // N * 5
    start, middle, end = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    k_wide, k_narrow = load_turned(qkv_ptr + (N + head) * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)
    v_wide, v_narrow = load_rows(qkv_ptr + (2 * N + head) * 80, row_R, keep_R, qkv_stride)
    statistics = head.to(tl.int64) * num_rows
    q_ptr, d_out_ptr = q_turned_ptr + head * 80, d_out_ptr + head * 80
    log_sum_ptr, along_ptr = log_sum_ptr + statistics, along_ptr + statistics
    zero_wide, zero_narrow = tl.zeros((R, 64), tl.float32), tl.zeros((R, 16), tl.float32)
    d_k_wide, d_k_narrow, d_v_wide, d_v_narrow = _add_d_kv(
        k_wide, k_narrow, v_wide, v_narrow, q_ptr, d_out_ptr, log_sum_ptr, along_ptr, N * 80, low_R, high_R,
        start, middle, scale, zero_wide, zero_narrow, zero_wide, zero_narrow, STEP, False,
    )  # fmt: skip
    d_k_wide, d_k_narrow, d_v_wide, d_v_narrow = _add_d_kv(
        k_wide, k_narrow, v_wide, v_narrow, q_ptr, d_out_ptr, log_sum_ptr, along_ptr, N * 80, low_R, high_R,
        middle, end, scale, d_k_wide, d_k_narrow, d_v_wide, d_v_narrow, STEP, True,
    )  # fmt: skip
    d_k_ptr, d_v_ptr = d_qkv_ptr + (N + head) * 80, d_qkv_ptr + (2 * N + head) * 80
    store_turned_back(d_k_ptr, row_R, keep_R, 3 * N * 80, cos_ptr, sin_ptr, d_k_wide, d_k_narrow)
    store_rows(d_v_ptr, row_R, keep_R, 3 * N * 80, d_v_wide, d_v_narrow)


# ---- 3. Autograd: launches and saved tensors. ----


def _turned(qkv_T3NH: Tensor, which: int, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Queries (``which`` 0) or keys (1), [T, N, H], turned."""
    num_rows, _, num_heads, _ = qkv_T3NH.shape
    turned_TNH = qkv_T3NH.new_empty(num_rows, num_heads, HEAD_WIDTH)
    launch(
        _turn_rows, triton.cdiv(num_rows, TURN.rows) * num_heads, TURN,
        qkv_T3NH[:, which], cos_TE, sin_TE, turned_TNH, num_rows, qkv_T3NH.stride(0), N=num_heads, R=TURN.rows,
    )  # fmt: skip
    return turned_TNH


class _VisionAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_T3NH: Tensor, cos_TE: Tensor, sin_TE: Tensor, bounds: tuple[int, ...]) -> Tensor:
        num_rows, _, num_heads, _ = qkv_T3NH.shape
        ctx.bounds, sizes = bounds, (num_rows, qkv_T3NH.stride(0), SCALE)
        out_TNH = qkv_T3NH.new_empty(num_rows, num_heads, HEAD_WIDTH)
        plan = HOPPER if capability(qkv_T3NH.device) >= 90 else BEFORE_HOPPER
        if plan.short is not None and _longest(bounds, num_rows) <= plan.short.rows:
            ctx.blocks = blocks = plan.short
            tiles = tiling(bounds, blocks.rows, blocks.step, qkv_T3NH.device)
            launch(
                _short_forward, len(tiles) * num_heads, blocks,
                qkv_T3NH, cos_TE, sin_TE, tiles.tiles_X5, tiles.seen_2T, out_TNH, *sizes, N=num_heads, R=blocks.rows,
            )  # fmt: skip
            ctx.save_for_backward(qkv_T3NH, cos_TE, sin_TE)
            return out_TNH
        blocks, ctx.blocks = plan.forward, plan.backward
        tiles = tiling(bounds, blocks.rows, blocks.step, qkv_T3NH.device)
        log_sum_NT = qkv_T3NH.new_empty(num_heads, num_rows, dtype=torch.float32)
        k_turned_TNH = _turned(qkv_T3NH, 1, cos_TE, sin_TE)
        launch(
            _long_forward, len(tiles) * num_heads, blocks,
            qkv_T3NH, k_turned_TNH, cos_TE, sin_TE, tiles.tiles_X5, tiles.seen_2T, out_TNH, log_sum_NT, *sizes,
            N=num_heads, R=blocks.rows, STEP=blocks.step,
        )  # fmt: skip
        ctx.save_for_backward(qkv_T3NH, cos_TE, sin_TE, out_TNH, log_sum_NT)
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TNH: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_T3NH, cos_TE, sin_TE, *of_long = ctx.saved_tensors
        num_rows, _, num_heads, _ = qkv_T3NH.shape
        sizes, d_out_TNH = (num_rows, qkv_T3NH.stride(0), SCALE), d_out_TNH.contiguous()
        d_qkv_T3NH = qkv_T3NH.new_empty(qkv_T3NH.shape)
        blocks = ctx.blocks
        tiles = tiling(ctx.bounds, blocks.rows, blocks.step, qkv_T3NH.device)
        common = (cos_TE, sin_TE, tiles.tiles_X5, tiles.seen_2T)
        if not of_long:
            launch(
                _short_backward, len(tiles) * num_heads, blocks,
                qkv_T3NH, *common, d_out_TNH, d_qkv_T3NH, *sizes, N=num_heads, R=blocks.rows,
            )  # fmt: skip
            return d_qkv_T3NH, None, None, None
        out_TNH, log_sum_NT = of_long
        along_NT = torch.empty_like(log_sum_NT)
        launch(
            _long_backward_q, len(tiles) * num_heads, blocks,
            qkv_T3NH, _turned(qkv_T3NH, 1, cos_TE, sin_TE), *common, out_TNH, d_out_TNH, log_sum_NT, along_NT,
            d_qkv_T3NH, *sizes, N=num_heads, R=blocks.rows, STEP=blocks.step,
        )  # fmt: skip
        launch(
            _long_backward_kv, len(tiles) * num_heads, blocks,
            qkv_T3NH, _turned(qkv_T3NH, 0, cos_TE, sin_TE), *common, d_out_TNH, log_sum_NT, along_NT,
            d_qkv_T3NH, *sizes, N=num_heads, R=blocks.rows, STEP=blocks.step,
        )  # fmt: skip
        return d_qkv_T3NH, None, None, None


# ---- 4. Public op: checks its contract, then runs. ----


def vision_attention(qkv_T3NH: Tensor, cos_TE: Tensor, sin_TE: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """out_TNH: every row attends to all rows of its segment, after the turn of q and k.

    Segment i is the rows ``bounds[i]`` to ``bounds[i + 1]``. ``qkv_T3NH`` is the product as it comes (rows may be
    strided); the angles' cosines and sines are float32 and get no gradient. ValueError where a shape, a dtype or the
    device is none that the kernels compute.
    """
    if qkv_T3NH.dim() != 4 or qkv_T3NH.shape[1] != 3 or qkv_T3NH.shape[3] != HEAD_WIDTH:
        raise ValueError(f"vision_attention: qkv is [T, 3, N, {HEAD_WIDTH}], got {tuple(qkv_T3NH.shape)}")
    num_rows = len(qkv_T3NH)
    for name, angles in (("cos", cos_TE), ("sin", sin_TE)):
        if angles.shape != (num_rows, HEAD_WIDTH // 2) or angles.dtype != torch.float32:
            want = f"[{num_rows}, {HEAD_WIDTH // 2}] of float32"
            raise ValueError(f"vision_attention: {name} is {want}, got {tuple(angles.shape)} of {angles.dtype}")
    _longest(bounds, num_rows)
    if qkv_T3NH.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"vision_attention: qkv is float32, float16 or bfloat16, got {qkv_T3NH.dtype}")
    check_device("vision_attention", qkv_T3NH, cos_TE, sin_TE)
    if qkv_T3NH.stride()[1:] != (qkv_T3NH.shape[2] * HEAD_WIDTH, HEAD_WIDTH, 1):
        qkv_T3NH = qkv_T3NH.contiguous()
    return _VisionAttention.apply(qkv_T3NH, cos_TE.contiguous(), sin_TE.contiguous(), bounds)


@lru_cache(maxsize=64)
def _longest(bounds: tuple[int, ...], num_rows: int) -> int:
    """Rows of the longest segment. ``ValueError`` where the bounds are none. Found once: a pack has thousands."""
    if bounds[0] != 0 or bounds[-1] != num_rows or any(end < start for start, end in pairwise(bounds)):
        raise ValueError(f"vision_attention: bounds must grow from 0 to {num_rows} rows: {bounds[:3]}..{bounds[-3:]}")
    return max((end - start for start, end in pairwise(bounds)), default=0)
