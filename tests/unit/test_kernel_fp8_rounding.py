"""The kernels that round to FP8 against PyTorch's operations, bit for bit; faults that must be found."""

import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from mimo_megatron.fp8.quantise import E4M3, E5M2, round_to
from mimo_megatron.fp8.scaling import shared_amax
from mimo_megatron.parallel.mesh import ALONE
from mimo_triton_kernels import fp8_rounding
from tests.kernel_cases import DEVICE, DTYPES, ON_GPU, uninitialised_memory_is_nan, with_fault

# numpy, which the interpreter computes with, says so where infinity or NaN comes out.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in multiply:RuntimeWarning")

SHAPES = ((1, 1), (3, 200), (64, 128), (70, 129), (200, 17), (16, 16))
FORMATS = (E4M3, E5M2)


def numbers(dtype: torch.dtype, fp8: torch.dtype) -> Tensor:
    """Every finite FP8 number, what lies in the middle of two and beside it, any bits of float32, and what is none."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    draw = torch.Generator().manual_seed(3)
    any_bits = torch.randint(-(2**31), 2**31, (6000,), generator=draw).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
    found = [codes, middles, middles.nextafter(infinity), middles.nextafter(-infinity), any_bits, special]
    x = torch.cat(found)
    return torch.cat([x, x.new_zeros(-len(x) % 37)]).view(37, -1).to(dtype).to(DEVICE)


def assert_bits(got: Tensor, want: Tensor) -> None:
    """Of a device NaN has one sign, of another the number's: any NaN is NaN."""
    got_bits, want_bits = (one.contiguous().view(torch.uint8) for one in (got, want))
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan) and torch.equal(got_bits[~nan], want_bits[~nan]), "bits differ"


def check(module: ModuleType, x_MK: Tensor, scale: Tensor, fp8: torch.dtype) -> None:
    """Both orientations and their padding, and the largest magnitude, where memory is NaN before."""
    want = round_to(x_MK, scale, fp8)
    with uninitialised_memory_is_nan():
        values_MK, values_KM = module.round_two_ways(x_MK, scale, fp8)
    padded = [size + -size % 16 for size in x_MK.shape]
    assert list(values_MK.shape) == padded and list(values_KM.shape) == padded[::-1]
    for values, wanted in ((values_MK, want), (values_KM, want.t())):
        assert values.is_contiguous() and values.dtype is fp8
        assert_bits(values[: wanted.shape[0], : wanted.shape[1]], wanted)
        bits = values.view(torch.uint8)
        assert not bits[wanted.shape[0] :].any() and not bits[:, wanted.shape[1] :].any(), "the padding is not zero"
    (largest,) = shared_amax([x_MK], ALONE)
    assert_largest(module.largest_magnitude(x_MK), largest)


def assert_largest(got: Tensor, want: Tensor) -> None:
    assert got.shape == () and got.dtype is torch.float32
    assert got.equal(want) or (got.isnan() and want.isnan()), f"the largest magnitude is {want}, not {got}"


def normal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rows + columns)
    spread = torch.logspace(-6, 3, columns)
    return (torch.randn(rows, columns, generator=draw) * spread).to(dtype).to(DEVICE)


@pytest.mark.parametrize("fp8", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.7, 2.0**-20, torch.finfo(torch.float32).max])
def test_every_number_is_rounded_to_the_bits_of_torchs_operations(dtype, fp8, scale):
    check(fp8_rounding, numbers(dtype, fp8), torch.tensor(scale, device=DEVICE), fp8)


@pytest.mark.parametrize(("dtype", "fp8"), itertools.product(DTYPES, FORMATS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_is_written_whole_and_padded_with_zeros(shape, dtype, fp8):
    check(fp8_rounding, normal(*shape, dtype), torch.tensor(0.3, device=DEVICE), fp8)


def test_one_orientation_is_that_of_two():
    x_MK, scale = normal(70, 129, torch.float32), torch.tensor(2.0, device=DEVICE)
    both = fp8_rounding.round_two_ways(x_MK, scale, E4M3)
    stands = fp8_rounding.round_two_ways(x_MK, scale, E4M3, transposed=False)
    turned = fp8_rounding.round_two_ways(x_MK, scale, E4M3, as_it_stands=False)
    assert stands[1] is None and turned[0] is None
    assert torch.equal(stands[0].view(torch.uint8), both[0].view(torch.uint8))
    assert torch.equal(turned[1].view(torch.uint8), both[1].view(torch.uint8))
    assert fp8_rounding.round_two_ways(x_MK, scale, E4M3, as_it_stands=False, transposed=False) == (None, None)


def test_of_nothing_there_is_nothing_and_its_largest_magnitude_is_0():
    scale = torch.tensor(1.0, device=DEVICE)
    for rows, columns in ((0, 24), (24, 0), (0, 0)):
        nothing = torch.zeros(rows, columns, device=DEVICE)
        values_MK, values_KM = fp8_rounding.round_two_ways(nothing, scale, E4M3)
        assert values_MK.numel() == values_KM.numel() == 0
        assert_largest(fp8_rounding.largest_magnitude(nothing), torch.zeros((), device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 4096, 16384, 40000])
def test_the_largest_magnitude_is_found_wherever_it_is(size, dtype):
    x = normal(1, size, dtype)
    for place in {0, size // 2, size - 1}:
        for value in (-1e4, torch.inf, -torch.nan):
            placed = x.clone()
            placed[0, place] = value
            want = fp8_rounding.largest_magnitude_reference(placed)
            assert_largest(fp8_rounding.largest_magnitude(placed), want)
    placed[0, 0] = torch.inf  # beside a NaN
    assert fp8_rounding.largest_magnitude(placed).isnan() == placed.isnan().any()


def test_the_reference_is_the_rule_of_the_layers():
    x_MK, scale = numbers(torch.float32, E4M3), torch.tensor(0.7)
    for fp8 in FORMATS:
        assert_bits(fp8_rounding.round_reference(x_MK.cpu(), scale, fp8), round_to(x_MK.cpu(), scale, fp8))
    for x in (x_MK.cpu(), torch.zeros(0, 3), torch.tensor([-2.0, torch.inf])):
        assert_largest(fp8_rounding.largest_magnitude_reference(x), shared_amax([x], ALONE)[0])


FAULTS = {
    "last_columns_not_read": ("column_C[None, :] < num_columns)", "column_C[None, :] < num_columns - 1)"),
    "last_rows_not_read": ("row_R[:, None] < num_rows)", "row_R[:, None] < num_rows - 1)"),
    "no_scale": (" * tl.load(scale_ptr)", ""),
    "not_saturated": ("tl.clamp(x_RC, -LIMIT, LIMIT", "tl.clamp(x_RC, -LIMIT, 1.07 * LIMIT"),
    "nan_saturated": ("LIMIT, propagate_nan=tl.PropagateNan.ALL", "LIMIT"),
    "padding_not_written": ("row_R[:, None] < padded_rows)", "row_R[:, None] < num_rows)"),
    "turned_by_the_wrong_stride": (".to(tl.int64) * padded_rows", ".to(tl.int64) * num_rows"),
    "blocks_counted_by_rows": ("tl.program_id(0) % num_blocks", "tl.program_id(0) // num_blocks"),
    "a_sign_forgotten": ("tl.abs(tl.load(x_ptr + at_C", "(tl.load(x_ptr + at_C"),
    "last_number_forgotten": ("mask=at_C < size", "mask=at_C < size - 1"),
    "one_turn_of_four": ("+ turn * STEP", "+ 0 * STEP"),
    "nan_passed_over": ("x_C, propagate_nan=tl.PropagateNan.ALL", "x_C"),
    "the_last_program_wins": ("tl.atomic_max(bits_ptr, ", "tl.atomic_xchg(bits_ptr, "),
}
OF_THE_INTERPRETER = {
    "rounded_away_from_zero": ("(tl.abs(x) + power) - power", "(tl.abs(x) + power * 1.0000001) - power"),
    "subnormal_numbers_too_fine": ("(127 + LOWEST) << 23", "(126 + LOWEST) << 23"),
    "a_bit_too_many": ("(23 - MANTISSA) << 23)", "(22 - MANTISSA) << 23)"),
    "the_sign_of_zero": (" | (bits & -0x80000000)", ""),
}
"""In the rounding that a GPU's conversion does by itself."""


@pytest.mark.parametrize("fault", (FAULTS | ({} if ON_GPU else OF_THE_INTERPRETER)).items(), ids=lambda one: one[0])
def test_a_planted_fault_is_found(fault: tuple[str, tuple[str, str]], tmp_path: Path) -> None:
    scale = torch.tensor(0.9, device=DEVICE)
    large_first = normal(150, 270, torch.float32).flip(1).contiguous()  # three programs look for the largest
    large_last = large_first.flip(1).contiguous()
    large_last[-1, -1] = -1e5
    faulty = with_fault(fp8_rounding, *fault[1], tmp_path)
    with pytest.raises(AssertionError):
        for x_MK in (large_first, large_last, numbers(torch.float32, E4M3), numbers(torch.float32, E4M3)[:, :100]):
            check(faulty, x_MK.contiguous(), scale, E4M3)


@pytest.mark.skipif(ON_GPU, reason="kernels run on the GPU here, not in the interpreter")
def test_the_interpreters_own_conversion_is_wrong_so_that_numbers_are_rounded_before_it(tmp_path: Path) -> None:
    faulty = with_fault(fp8_rounding, "ROUNDS_FIRST=interprets()", "ROUNDS_FIRST=False", tmp_path)
    with pytest.raises(AssertionError, match="bits differ"):
        check(faulty, normal(70, 129, torch.float32), torch.tensor(0.3), E4M3)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits() -> None:
    x_MK, scale = normal(5000, 4000, torch.bfloat16), torch.tensor(0.3, device=DEVICE)
    one, other = (fp8_rounding.round_two_ways(x_MK, scale, E4M3) for _ in range(2))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


def refused(**changes: object) -> str:
    inputs = dict(x_MK=torch.zeros(3, 8, device=DEVICE), scale=torch.tensor(1.0, device=DEVICE), dtype=E4M3)
    with pytest.raises(ValueError, match="round_two_ways: ") as error:
        fp8_rounding.round_two_ways(**{**inputs, **changes})
    return str(error.value)


def test_what_the_kernels_do_not_compute_is_refused_by_name() -> None:
    assert "x is [M, K], got (3,)" in refused(x_MK=torch.zeros(3))
    assert "contiguous, got (3, 8), (1, 3)" in refused(x_MK=torch.zeros(8, 3).t())
    assert "got torch.float64" in refused(x_MK=torch.zeros(3, 8, dtype=torch.float64))
    assert "not to torch.float16" in refused(dtype=torch.float16)
    assert "one float32, got torch.float32 (3,)" in refused(scale=torch.ones(3))
    assert "one float32, got torch.float64" in refused(scale=torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="largest_magnitude: x is contiguous"):
        fp8_rounding.largest_magnitude(torch.zeros(8, 3).t())


@pytest.mark.skipif(ON_GPU, reason="kernels run on the GPU here, not in the interpreter")
def test_bfloat16_in_the_interpreter_is_refused() -> None:
    assert "interpreter computes bfloat16 wrongly" in refused(x_MK=torch.zeros(3, 8, dtype=torch.bfloat16))
