"""Rounding to FP8, scales and tiles, bit for bit against numbers worked out another way."""

import itertools
import math

import pytest
import torch

from mimo_megatron.fp8.quantise import (
    E4M3,
    E5M2,
    ROW_TILE,
    SQUARE_TILE,
    largest,
    quantise,
    quantise_tiles,
    round_to,
    scale_of,
)

ONE = torch.tensor(1.0)
FORMATS = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}
"""Bits of exponent, bits of mantissa, bias."""


def value_of(code: int, dtype: torch.dtype) -> float:
    """What a byte stands for, by the formats' definition (Micikevicius et al., arXiv 2209.05433)."""
    exponent_bits, mantissa_bits, bias = FORMATS[dtype]
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (2**mantissa_bits - 1)
    if dtype is E4M3 and code & 0x7F == 0x7F:
        return math.nan
    if dtype is E5M2 and exponent == 2**exponent_bits - 1:
        return math.nan if mantissa else math.inf
    sign = -1.0 if code & 0x80 else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def bits(values: torch.Tensor) -> list[int]:
    return values.contiguous().view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("wide", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_to_the_nearest_and_of_two_equally_near_to_the_even(dtype, wide):
    codes = [code for code in range(0x80) if math.isfinite(value_of(code, dtype))]
    numbers = [value_of(code, dtype) for code in codes]
    assert max(numbers) == largest(dtype)
    assert bits(round_to(torch.tensor(numbers, dtype=wide), ONE, dtype)) == codes
    middles = [(low + high) / 2 for low, high in itertools.pairwise(numbers)]
    even = [low if low % 2 == 0 else low + 1 for low in codes[:-1]]
    assert bits(round_to(torch.tensor(middles, dtype=wide), ONE, dtype)) == even
    above = torch.tensor(middles, dtype=wide) * (1 + torch.finfo(wide).eps)
    below = torch.tensor(middles, dtype=wide) * (1 - torch.finfo(wide).eps)
    if wide is not torch.float64:  # torch rounds fp64 to fp32 first
        assert bits(round_to(above, ONE, dtype)) == codes[1:]
        assert bits(round_to(below, ONE, dtype)) == codes[:-1]


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_too_large_becomes_the_largest_and_nan_stays(dtype):
    x = torch.tensor([1e6, -1e6, math.inf, -math.inf, math.nan])
    rounded = round_to(x, ONE, dtype).float()
    assert rounded[:4].tolist() == [largest(dtype), -largest(dtype)] * 2
    assert rounded[4].isnan()


def test_scales_are_those_worked_out_by_hand():
    amax = torch.tensor([448.0, 3.5, 3.0, 57344.0, 0.0, math.inf, math.nan])
    third = 9786709 / 65536  # 448 / 3 in fp32, rounded once
    assert scale_of(amax, E4M3).tolist() == [1.0, 128.0, third, 0.0078125, 1.0, 1.0, 1.0]
    assert scale_of(amax, E5M2)[:2].tolist() == [128.0, 16384.0]
    assert scale_of(amax, E4M3, power_of_two=True).tolist() == [1.0, 128.0, 128.0, 0.0078125, 1.0, 1.0, 1.0]
    tiny = torch.tensor(1e-40)
    assert scale_of(tiny, E4M3) == torch.finfo(torch.float32).max
    assert scale_of(tiny, E4M3, power_of_two=True) == 2.0**127


def test_the_largest_magnitude_becomes_the_largest_number():
    x = torch.randn(33, 70, generator=torch.Generator().manual_seed(1)) * 1e-4
    for dtype in FORMATS:
        found = quantise(x, scale_of(x.abs().amax(), dtype), dtype)
        assert found.values_MK.float().abs().amax() == largest(dtype)
        # Half of the last of 4 (3) bits, relative to each number; of the smallest, a fixed step.
        error = (found.dequantised(torch.float32) - x).abs()
        floor = x.abs().amax() * 2.0 ** (-18 if dtype is E4M3 else -32)
        assert (error <= x.abs() * (2**-4 if dtype is E4M3 else 2**-3) * 1.0001 + floor).all()


@pytest.mark.parametrize("tile", [ROW_TILE, SQUARE_TILE])
def test_each_tile_has_its_own_power_of_two_also_where_it_is_cut_off(tile):
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(130, 257, generator=draw) * torch.logspace(-3, 3, 257)
    found = quantise_tiles(x, tile, E4M3)
    rows, columns = tile
    assert list(found.inverse.shape) == [math.ceil(130 / rows), math.ceil(257 / columns)]
    for row in range(0, 130, rows):
        for column in range(0, 257, columns):
            part = x[row : row + rows, column : column + columns]
            scale = 2.0 ** math.floor(math.log2(448.0 / part.abs().max().item()))
            want = (part * scale).to(E4M3)
            assert bits(found.values_MK[row : row + rows, column : column + columns]) == bits(want)
            assert found.inverse[row // rows, column // columns] == 1 / scale
    torch.testing.assert_close(found.dequantised(torch.float32), x, rtol=2**-4, atol=1e-2)


def test_a_transposed_square_tile_is_the_tile_of_the_transposed_and_a_row_tile_is_not():
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 384)
    square = quantise_tiles(x, SQUARE_TILE, E4M3)
    again = quantise_tiles(x.t(), SQUARE_TILE, E4M3)
    assert bits(square.transposed.values_MK) == bits(again.values_MK)
    assert torch.equal(square.transposed.inverse, again.inverse)
    with pytest.raises(AssertionError):
        _ = quantise_tiles(x, ROW_TILE, E4M3).transposed
