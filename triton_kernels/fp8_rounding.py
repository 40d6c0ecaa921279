"""A matrix's largest magnitude, and the matrix in FP8 in both orientations: reference, Triton kernels, public ops.

A linear layer multiplies each operand twice, summing over its columns and over its rows, and the FP8 product reads what
it sums over in succession. ``round_two_ways`` reads the numbers once and writes both orientations, where PyTorch's
operations widen, multiply, clamp, cast and then copy to turn. Sizes are padded with zeros up to a multiple of 16, which
is what the product asks for. Bits are those of PyTorch's operations: ``x * scale`` in fp32, to nearest even, saturated.

Maxima are free of order, and every other element is one program's: two runs give the same bits.

Dims: M rows, K columns, either of which a product may sum over. ``padded(M)`` is a multiple of 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimo_triton_kernels.launching import Blocks, check_device, interprets, launch

ALIGNMENT = 16
"""Of every size of PyTorch's FP8 product on a GPU."""
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MAGNITUDE_BLOCKS = Blocks(rows=4, step=4096, num_warps=8, num_stages=1)
"""Four steps of 16 numbers a thread, whose loads do not wait for one another. Not timed yet."""
ROUNDING_BLOCKS = Blocks(rows=64, step=128, num_warps=4, num_stages=1)
"""Lines of 128 bytes as it stands and of 64 transposed, 64 numbers a thread. Not timed yet."""


# ---- 1. Reference: the definitions. ----


def largest_magnitude_reference(x: Tensor) -> Tensor:
    """0 of nothing; NaN where one is; infinite where one is, and none is NaN."""
    return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def round_reference(x_MK: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return (x_MK.to(torch.promote_types(x_MK.dtype, torch.float32)) * scale).clamp(-limit, limit).to(dtype)


# ---- 2. Kernels. Programs: a stretch of numbers; a tile of R x STEP numbers. ----


@triton.jit
def _largest_magnitude(x_ptr, bits_ptr, size, TURNS: tl.constexpr, STEP: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (TURNS * STEP)
    most_C = tl.zeros((STEP,), tl.float32)
    for turn in tl.static_range(TURNS):
        at_C = first + turn * STEP + tl.arange(0, STEP)
        x_C = tl.abs(tl.load(x_ptr + at_C, mask=at_C < size, other=0.0).to(tl.float32))
        most_C = tl.maximum(most_C, x_C, propagate_nan=tl.PropagateNan.ALL)
    # The bits of float32 that are not negative are in their order, infinity behind all numbers, NaN behind that.
    tl.atomic_max(bits_ptr, tl.max(most_C.to(tl.int32, bitcast=True), 0), sem="relaxed")


@triton.jit
def _round(
    x_ptr, scale_ptr, values_ptr, turned_ptr, num_rows, num_columns, padded_rows, padded_columns, num_blocks,
    LIMIT: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
    AS_IT_STANDS: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row_R = (tl.program_id(0) // num_blocks).to(tl.int64) * R + tl.arange(0, R)
    column_C = tl.program_id(0) % num_blocks * STEP + tl.arange(0, STEP)
    keep_RC = (row_R[:, None] < num_rows) & (column_C[None, :] < num_columns)
    x_RC = tl.load(x_ptr + row_R[:, None] * num_columns + column_C[None, :], mask=keep_RC, other=0.0)
    x_RC = x_RC.to(tl.float32) * tl.load(scale_ptr)
    x_RC = tl.clamp(x_RC, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if ROUNDS_FIRST:
        x_RC = _rounded(x_RC, MANTISSA, LOWEST)
    values_RC = x_RC.to(values_ptr.dtype.element_ty)
    is_stored_RC = (row_R[:, None] < padded_rows) & (column_C[None, :] < padded_columns)
    if AS_IT_STANDS:
        tl.store(values_ptr + row_R[:, None] * padded_columns + column_C[None, :], values_RC, mask=is_stored_RC)
    if TRANSPOSED:
        at_CR = turned_ptr + column_C[:, None].to(tl.int64) * padded_rows + row_R[None, :]
        tl.store(at_CR, tl.trans(values_RC), mask=tl.trans(is_stored_RC))


@triton.jit
def _rounded(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """x in float32, to the nearest of FP8's numbers, of two equally near to the even. For the interpreter, whose
    conversion to FP8 is right of these only.

    A large enough power of two, added and taken away, leaves a number's first bits; below the format's normal numbers,
    which begin with 2^LOWEST, that power no longer sinks. NaN is that of FP8.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, (127 + LOWEST) << 23)
    power = (exponent + ((23 - MANTISSA) << 23)).to(tl.float32, bitcast=True)
    nan: tl.constexpr = 0x7F800000 | ((1 << MANTISSA) - 1) << (23 - MANTISSA)
    magnitude = tl.where(x == x, ((tl.abs(x) + power) - power).to(tl.int32, bitcast=True), nan)
    return (magnitude | (bits & -0x80000000)).to(tl.float32, bitcast=True)


# ---- 3. Public ops: check their contracts, then run. Their gradients are the linear layer's. ----


def largest_magnitude(x: Tensor) -> Tensor:
    """A float32 scalar: of nothing 0, NaN where one is NaN.

    ``x``: contiguous. ValueError where a layout, a dtype or the device is none that the kernel computes.
    """
    _check("largest_magnitude", x)
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    if x.numel():
        turns, step = MAGNITUDE_BLOCKS.rows, MAGNITUDE_BLOCKS.step
        num_programs = triton.cdiv(x.numel(), turns * step)
        launch(_largest_magnitude, num_programs, MAGNITUDE_BLOCKS, x, bits, x.numel(), TURNS=turns, STEP=step)
    return bits.view(torch.float32)


def round_two_ways(
    x_MK: Tensor, scale: Tensor, dtype: torch.dtype, *, as_it_stands: bool = True, transposed: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """``x * scale`` in FP8, [padded(M), padded(K)] and [padded(K), padded(M)], zeros in the padding; each of them None
    where it is not asked for.

    ``scale``: a float32 scalar. Errors are those of ``largest_magnitude``.
    """
    op = "round_two_ways"
    if x_MK.dim() != 2:
        raise ValueError(f"{op}: x is [M, K], got {tuple(x_MK.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"{op}: numbers are rounded to {' or '.join(map(str, DTYPES))}, not to {dtype}")
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(f"{op}: the scale is one float32, got {scale.dtype} {tuple(scale.shape)}")
    _check(op, x_MK, scale)
    num_rows, num_columns = x_MK.shape
    rows, columns = padded(num_rows), padded(num_columns)
    values_MK = x_MK.new_empty(rows, columns, dtype=dtype) if as_it_stands else None
    values_KM = x_MK.new_empty(columns, rows, dtype=dtype) if transposed else None
    wanted = [values for values in (values_MK, values_KM) if values is not None]
    if wanted and x_MK.numel():
        limits, blocks = torch.finfo(dtype), ROUNDING_BLOCKS
        num_blocks = triton.cdiv(columns, blocks.step)
        launch(
            _round, triton.cdiv(rows, blocks.rows) * num_blocks, blocks, x_MK, scale, wanted[0], wanted[-1],
            num_rows, num_columns, rows, columns, num_blocks, LIMIT=limits.max,
            MANTISSA=3 if dtype == torch.float8_e4m3fn else 2, LOWEST=-6 if dtype == torch.float8_e4m3fn else -14,
            # A GPU's conversion is to nearest even (cvt.rn.satfinite); the interpreter's cuts bits off.
            ROUNDS_FIRST=interprets(),
            AS_IT_STANDS=as_it_stands, TRANSPOSED=transposed, R=blocks.rows, STEP=blocks.step,
        )  # fmt: skip
    return values_MK, values_KM


def padded(size: int) -> int:
    """``size``, or the next multiple of 16 above it."""
    return triton.cdiv(size, ALIGNMENT) * ALIGNMENT


def _check(op: str, x: Tensor, *others: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{op}: x is contiguous, got {tuple(x.shape)}, {x.stride()}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{op}: x is float32, float16 or bfloat16, got {x.dtype}")
    check_device(op, x, *others)
