"""A head of 80 as 64 + 16, the sizes that matrix units have: loads, stores, the rotary turn and products of such rows.

Nothing is padded. The turn pairs dims i and i + 40; products of two turned rows sum over dims, so their order is free:
pairs 0..31 become the 64, pairs 32..39 the 16, each pair side by side, and a row is turned in its registers. Values and
outputs keep their order.

Dims: R rows of a tile, K rows of the other side. ``stride`` counts elements from row to row; angles are [T, 40] fp32.
"""

import triton
import triton.language as tl


@triton.jit
def _load_pairs(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, FIRST: tl.constexpr, PAIRS: tl.constexpr):
    """[R, 2 * PAIRS]: turned, pair after pair, in x's dtype."""
    pair = FIRST + tl.arange(0, PAIRS)
    keep = keep_R[:, None]
    at = x_ptr + row_R[:, None] * stride + pair[None, :]
    first, second = tl.load(at, mask=keep, other=0.0), tl.load(at + 40, mask=keep, other=0.0)
    angle = row_R[:, None] * 40 + pair[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=keep, other=0.0), tl.load(sin_ptr + angle, mask=keep, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned = tl.join(a * cos - b * sin, b * cos + a * sin)
    return tl.reshape(turned, (row_R.shape[0], 2 * PAIRS)).to(first.dtype)


@triton.jit
def load_turned(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr):
    wide = _load_pairs(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, 0, 32)
    narrow = _load_pairs(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, 32, 8)
    return wide, narrow


@triton.jit
def _store_pairs(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, d_turned, FIRST: tl.constexpr, PAIRS: tl.constexpr):
    """The gradient of ``_load_pairs``: turned back."""
    pair = FIRST + tl.arange(0, PAIRS)
    keep = keep_R[:, None]
    angle = row_R[:, None] * 40 + pair[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=keep, other=0.0), tl.load(sin_ptr + angle, mask=keep, other=0.0)
    a, b = tl.split(tl.reshape(d_turned, (row_R.shape[0], PAIRS, 2)))
    at = x_ptr + row_R[:, None] * stride + pair[None, :]
    tl.store(at, (a * cos + b * sin).to(x_ptr.dtype.element_ty), mask=keep)
    tl.store(at + 40, (b * cos - a * sin).to(x_ptr.dtype.element_ty), mask=keep)


@triton.jit
def store_turned_back(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, wide, narrow):
    _store_pairs(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, wide, 0, 32)
    _store_pairs(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, narrow, 32, 8)


@triton.jit
def load_rows(x_ptr, row_R, keep_R, stride):
    at = x_ptr + row_R[:, None] * stride
    wide = tl.load(at + tl.arange(0, 64)[None, :], mask=keep_R[:, None], other=0.0)
    narrow = tl.load(at + 64 + tl.arange(0, 16)[None, :], mask=keep_R[:, None], other=0.0)
    return wide, narrow


@triton.jit
def store_rows(x_ptr, row_R, keep_R, stride, wide, narrow):
    at = x_ptr + row_R[:, None] * stride
    tl.store(at + tl.arange(0, 64)[None, :], wide.to(x_ptr.dtype.element_ty), mask=keep_R[:, None])
    tl.store(at + 64 + tl.arange(0, 16)[None, :], narrow.to(x_ptr.dtype.element_ty), mask=keep_R[:, None])


@triton.jit
def inner(a_wide, a_narrow, b_wide, b_narrow):
    """[R, K] in fp32: a b^T over all 80 dims."""
    product = tl.dot(a_wide, tl.trans(b_wide), input_precision="ieee")
    return tl.dot(a_narrow, tl.trans(b_narrow), product, input_precision="ieee")


@triton.jit
def outer(weights, x_wide, x_narrow, sum_wide, sum_narrow):
    """sum + weights x, the weights rounded to x's dtype, as the matrix units take them."""
    weights = weights.to(x_wide.dtype)
    sum_wide = tl.dot(weights, x_wide, sum_wide, input_precision="ieee")
    sum_narrow = tl.dot(weights, x_narrow, sum_narrow, input_precision="ieee")
    return sum_wide, sum_narrow
