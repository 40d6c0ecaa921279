"""What attention kernels share: the rows of a program's tile; loads and stores of rows whose width is a power of two.

The rotary turn pairs dims i and i + H / 2 and computes in float32. Each value is turned with its partner, which is read
a second time, from the cache: rows stay in the order of the model, and no value moves between threads.

Dims: R rows of a tile, H head width, E its pairs (H / 2). ``stride`` counts elements from row to row; angles are [T, E]
in float32.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of_program(tiles_ptr, seen_ptr, num_rows, N: tl.constexpr, R: tl.constexpr):
    """The tile's rows and the keys that each sees. Rows past its end see all the tile's keys: finite, never stored."""
    at = tiles_ptr + tl.program_id(0) // N * 5
    start, end, key_start, key_end = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 4)
    row_R = start + tl.arange(0, R)
    keep_R = row_R < end
    low_R = tl.load(seen_ptr + row_R, mask=keep_R, other=key_start)
    high_R = tl.load(seen_ptr + num_rows + row_R, mask=keep_R, other=key_end)
    return row_R.to(tl.int64), keep_R, low_R, high_R


@triton.jit
def load_rows(x_ptr, row_R, keep_R, stride, H: tl.constexpr):
    at = x_ptr + row_R[:, None] * stride + tl.arange(0, H)[None, :]
    return tl.load(at, mask=keep_R[:, None], other=0.0)


@triton.jit
def store_rows(x_ptr, row_R, keep_R, stride, x, H: tl.constexpr):
    at = x_ptr + row_R[:, None] * stride + tl.arange(0, H)[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=keep_R[:, None])


@triton.jit
def load_turned(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, H: tl.constexpr):
    """Rounded to x's dtype after the turn, as the model's own code does."""
    dim_H = tl.arange(0, H)
    keep, at = keep_R[:, None], x_ptr + row_R[:, None] * stride
    angle = row_R[:, None] * (H // 2) + (dim_H % (H // 2))[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=keep, other=0.0), tl.load(sin_ptr + angle, mask=keep, other=0.0)
    own = tl.load(at + dim_H[None, :], mask=keep, other=0.0)
    partner = tl.load(at + ((dim_H + H // 2) % H)[None, :], mask=keep, other=0.0)
    turned = own.to(tl.float32) * cos + partner.to(tl.float32) * tl.where(dim_H[None, :] < H // 2, -sin, sin)
    return turned.to(own.dtype)


@triton.jit
def store_turned_back(x_ptr, row_R, keep_R, stride, cos_ptr, sin_ptr, d_turned, H: tl.constexpr):
    """The gradient of ``load_turned``."""
    E: tl.constexpr = H // 2
    first, second = tl.split(tl.permute(tl.reshape(d_turned, (row_R.shape[0], 2, E)), (0, 2, 1)))
    pair_E, keep = tl.arange(0, E)[None, :], keep_R[:, None]
    angle = row_R[:, None] * E + pair_E
    cos, sin = tl.load(cos_ptr + angle, mask=keep, other=0.0), tl.load(sin_ptr + angle, mask=keep, other=0.0)
    at = x_ptr + row_R[:, None] * stride + pair_E
    tl.store(at, (first * cos + second * sin).to(x_ptr.dtype.element_ty), mask=keep)
    tl.store(at + E, (second * cos - first * sin).to(x_ptr.dtype.element_ty), mask=keep)
