"""The vision attention kernels against their definition in float64, forward and backward; faults that must be found."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from mimo_megatron.attention.packed import varlen_attention
from mimo_megatron.ops import turn
from mimo_triton_kernels import vision_attention
from tests.kernel_cases import DEVICE, DTYPES, ON_GPU, uninitialised_memory_is_nan, with_fault
from tests.parity_rule import assert_kernel_parity

SEGMENTS = {
    "few_rows": (2, 1, 3),
    "windows": (64, 16, 4, 1, 30, 33),
    "windows_and_a_frame": (5, 0, 137, 3, 61),
}
Attention = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


def bounds_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


def angles_of(num_rows: int) -> Tensor:
    return 3 * torch.randn(num_rows, 40, generator=torch.Generator().manual_seed(num_rows)).to(DEVICE)


def packed(attention: Attention, bounds: tuple[int, ...]) -> Callable[..., Tensor]:
    """A function of q, k and v, so that the tolerance rule judges each gradient by itself."""
    angles = angles_of(bounds[-1])

    def of_parts(*qkv: Tensor) -> Tensor:
        wide = angles.to(torch.promote_types(qkv[0].dtype, torch.float32))
        return attention(torch.stack(qkv, dim=1), wide.cos(), wide.sin(), bounds)

    return of_parts


def draw(num_rows: int, heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return [1.5 * torch.randn(num_rows, heads, 80, generator=generator).to(DEVICE) for _ in range(3)]


def assert_parity(module: ModuleType, lengths: tuple[int, ...], dtype: torch.dtype, heads: int) -> None:
    bounds = bounds_of(lengths)
    reference = packed(vision_attention.vision_attention_reference, bounds)
    with uninitialised_memory_is_nan():
        kernel = packed(module.vision_attention, bounds)
        assert_kernel_parity(kernel, reference, draw(bounds[-1], heads), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
def test_output_and_gradients_equal_the_definition(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_parity(vision_attention, lengths, dtype, heads=2 if max(lengths) < 64 else 1)


@pytest.mark.skipif(ON_GPU, reason="a GPU runs the kernels of its own generation")
def test_before_hopper_the_long_kernels_take_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_attention, "capability", lambda device: 80)
    assert_parity(vision_attention, (20, 9, 31), torch.float16, heads=1)


def test_the_definition_is_what_the_model_computes() -> None:
    bounds = bounds_of(SEGMENTS["windows_and_a_frame"])
    q, k, v = (x.double() for x in draw(bounds[-1], heads=2))
    angles = angles_of(bounds[-1]).double()
    cos, sin = angles.cos(), angles.sin()
    turned_q, turned_k = (turn(x, cos[:, None], sin[:, None]) for x in (q, k))
    model = varlen_attention(turned_q, turned_k, v, bounds)
    ours = vision_attention.vision_attention_reference(torch.stack([q, k, v], 1), cos, sin, bounds)
    torch.testing.assert_close(ours, model, rtol=0, atol=1e-12)


def test_rows_may_be_strided_and_the_same_turn_of_all_rows_changes_nothing() -> None:
    bounds = bounds_of((20, 9))
    angles = angles_of(29)
    wider = torch.randn(29, 7, 1, 80, device=DEVICE)
    qkv = wider[:, 2:5]
    assert qkv.stride(0) == 7 * 80
    want = vision_attention.vision_attention(qkv.contiguous(), angles.cos(), angles.sin(), bounds)
    got = vision_attention.vision_attention(qkv, angles.cos(), angles.sin(), bounds)
    assert torch.equal(got, want)
    turned = vision_attention.vision_attention(qkv, (angles + 1).cos(), (angles + 1).sin(), bounds)
    torch.testing.assert_close(turned, want, rtol=1e-5, atol=1e-5)


def test_a_pack_without_rows_has_an_output_and_a_gradient_without_rows() -> None:
    qkv = torch.empty(0, 3, 2, 80, device=DEVICE, requires_grad=True)
    out = vision_attention.vision_attention(qkv, angles_of(0), angles_of(0), (0,))
    out.sum().backward()
    assert out.shape == (0, 2, 80) and qkv.grad is not None and qkv.grad.shape == qkv.shape


FAULTS = {
    "mask_off_by_one": ("row_R[None, :] < high_R[:, None]", "row_R[None, :] <= high_R[:, None]"),
    "turn_on_v": (
        "v_wide, v_narrow = load_rows(qkv_ptr + (2 * N + head) * 80, row_R, keep_R, qkv_stride)",
        "v_wide, v_narrow = load_turned(qkv_ptr + (2 * N + head) * 80, row_R, keep_R, qkv_stride, cos_ptr, sin_ptr)",
    ),
    "scale_in_the_backward": ("* (scale * LN_2)", "* scale"),
    "another_head": ("qkv_ptr + (N + head) * 80", "qkv_ptr + (N + (head + 1) % N) * 80"),
}
LONG_FAULTS = {
    "mask_off_by_one": ("key_K[None, :] < high_R[:, None]", "key_K[None, :] <= high_R[:, None]"),
    "mask_of_queries": ("query_K[None, :] >= low_R[:, None]", "query_K[None, :] > low_R[:, None]"),
    "scale_in_the_backward": ("* (scale * LN_2)", "* scale"),
    "statistics_of_another_head": ("statistics = head.to(tl.int64) * num_rows", "statistics = 0 * head.to(tl.int64)"),
}


@pytest.mark.parametrize(
    ("fault", "lengths"),
    [*((fault, (12, 20)) for fault in FAULTS.values()), *((fault, (12, 66)) for fault in LONG_FAULTS.values())],
    ids=[*(f"short-{name}" for name in FAULTS), *(f"long-{name}" for name in LONG_FAULTS)],
)
def test_a_planted_fault_is_found(fault: tuple[str, str], lengths: tuple[int, ...], tmp_path: Path) -> None:
    heads = 2 if "head" in fault[0] else 1
    with pytest.raises(AssertionError, match="exceeds"):
        assert_parity(with_fault(vision_attention, *fault, tmp_path), lengths, torch.float16, heads)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits() -> None:
    bounds = bounds_of((64, 3000, 16, 700))
    q, k, v = (x.to(torch.bfloat16) for x in draw(bounds[-1], heads=16))
    angles = angles_of(bounds[-1])
    results = []
    for _ in range(2):
        qkv = torch.stack([q, k, v], 1).requires_grad_()
        out = vision_attention.vision_attention(qkv, angles.cos(), angles.sin(), bounds)
        results.append((out, *torch.autograd.grad(out, qkv, torch.ones_like(out))))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def refused(**changes: object) -> str:
    angles = angles_of(8)
    inputs = dict(qkv_T3NH=torch.zeros(8, 3, 1, 80, device=DEVICE), cos_TE=angles, sin_TE=angles, bounds=(0, 8))
    with pytest.raises(ValueError, match="vision_attention: ") as error:
        vision_attention.vision_attention(**{**inputs, **changes})
    return str(error.value)


def test_what_the_kernels_do_not_compute_is_refused_by_name() -> None:
    assert "[T, 3, N, 80], got (8, 3, 1, 64)" in refused(qkv_T3NH=torch.zeros(8, 3, 1, 64))
    assert "cos is [8, 40] of float32, got (8, 80)" in refused(cos_TE=torch.zeros(8, 80))
    assert "of torch.float64" in refused(sin_TE=torch.zeros(8, 40, dtype=torch.float64))
    assert "from 0 to 8 rows" in refused(bounds=(0, 5))
    assert "from 0 to 8 rows" in refused(bounds=(0, 6, 5, 8))
    assert "got torch.float64" in refused(qkv_T3NH=torch.zeros(8, 3, 1, 80, dtype=torch.float64))


@pytest.mark.skipif(ON_GPU, reason="kernels run on the GPU here, not in the interpreter")
def test_bfloat16_in_the_interpreter_and_a_cpu_without_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.zeros(8, 3, 1, 80, dtype=torch.bfloat16)
    assert "interpreter computes bfloat16 wrongly" in refused(qkv_T3NH=qkv)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "need a CUDA device" in refused()


def test_the_scale_is_that_of_80_dims_in_powers_of_two() -> None:
    assert math.isclose(2**vision_attention.SCALE, math.exp(80**-0.5), rel_tol=1e-15)
