"""Rounding by kernels gives a layer the bits that PyTorch's operations give; only what a product needs is written."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from mimo_megatron.errors import ConfigError
from mimo_megatron.fp8.linear import PRODUCTS, _aligned, fp8_linear
from mimo_megatron.fp8.quantise import E4M3, E5M2
from mimo_megatron.fp8.rounding import TORCH, KernelRounding, Rounding, TorchRounding
from mimo_megatron.fp8.scaling import CurrentScaling, DelayedScaling, Scaling
from mimo_megatron.parallel.mesh import ALONE
from tests.kernel_cases import DEVICE, DTYPES, ON_GPU

SIZES = [(48, 64, 80), (37, 43, 86), (1, 9, 3), (70, 300, 40), (0, 32, 16)]
"""Rows, inputs, outputs."""


class Spy(TorchRounding):
    """Which orientations were asked for."""

    def __init__(self):
        self.asked = []

    def quantised(self, x_MK, scale, dtype, *, as_it_stands, transposed):
        self.asked.append((tuple(x_MK.shape), as_it_stands, transposed))
        return super().quantised(x_MK, scale, dtype, as_it_stands=as_it_stands, transposed=transposed)


def scaling_of(kind: str, rounding: Rounding) -> Scaling:
    if kind == "current":
        return CurrentScaling(E4M3, E5M2, ALONE, rounding)
    return DelayedScaling(E4M3, E5M2, history=2, margin=0, rounding=rounding).to(DEVICE)


def operands(sizes, dtype):
    rows, inputs, outputs = sizes
    draw = torch.Generator().manual_seed(sum(sizes))
    shapes = (rows, inputs), (outputs, inputs), (rows, outputs)
    x, w, dy = (torch.randn(shape, generator=draw).to(dtype).to(DEVICE) for shape in shapes)
    return (x * 3).requires_grad_(), (w * 0.02).requires_grad_(), dy * 1e-3


def two_steps(kind, rounding, sizes, dtype, product="scaled_mm"):
    """Outputs, gradients and magnitudes of two steps: with delayed scaling the second has scales of the first."""
    scaling, found = scaling_of(kind, rounding), []
    for step in (1, 2):
        x, w, dy = operands(sizes, dtype)
        y = fp8_linear(x * step, w, scaling, PRODUCTS[product])
        y.backward(dy.t().contiguous().t())  # as autograd may give it: rows not in succession
        found += [y.detach(), x.grad, w.grad]
        if isinstance(scaling, DelayedScaling):
            found.append(scaling.seen_3.clone())
            scaling.end_step(scaling.seen_3.clone())
    return found


@pytest.mark.parametrize("kind", ["current", "delayed"])
@pytest.mark.parametrize("dtype", [one for one in DTYPES if one is not torch.float16 or ON_GPU], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_all_gradients_with_kernels_are_bit_for_bit_those_of_torchs_operations(kind, dtype, sizes):
    plain, kernels = (two_steps(kind, one, sizes, dtype) for one in (TORCH, KernelRounding()))
    for ours, theirs in zip(kernels, plain, strict=True):
        assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["current", "delayed"])
def test_the_twin_takes_what_kernels_rounded_too(kind):
    plain, kernels = (two_steps(kind, one, (37, 43, 86), torch.float32, "twin") for one in (TORCH, KernelRounding()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kernels, plain, strict=True))


def test_a_rounding_that_is_another_is_found():
    class Elsewhere(TorchRounding):
        def quantised(self, x_MK, scale, dtype, **ways):
            return super().quantised(x_MK * (1 + 2**-6), scale, dtype, **ways)

    plain, other = (two_steps("current", one, (48, 64, 80), torch.float32) for one in (TORCH, Elsewhere()))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(other, plain, strict=True))


def test_only_the_orientations_that_a_product_needs_are_written():
    (x, w, dy), spy = operands((48, 64, 80), torch.float32), Spy()
    scaling = CurrentScaling(E4M3, E5M2, ALONE, spy)
    of_x, of_w, of_dy = tuple(x.shape), tuple(w.shape), tuple(dy.shape)

    def asked(x, w, backward=True):
        spy.asked.clear()
        y = fp8_linear(x, w, scaling, PRODUCTS["scaled_mm"])
        if backward:
            y.backward(dy)
        return list(spy.asked)

    stands, turned, both = (True, False), (False, True), (True, True)
    assert asked(x, w) == [(of_x, *both), (of_w, *stands), (of_dy, *both), (of_w, *turned)]
    assert asked(x, w.detach()) == [(of_x, *stands), (of_w, *stands), (of_dy, *stands), (of_w, *turned)]
    assert asked(x.detach(), w) == [(of_x, *both), (of_w, *stands), (of_dy, *turned)]
    with torch.no_grad():
        assert asked(x, w, backward=False) == [(of_x, *stands), (of_w, *stands)]


def test_the_weight_of_the_backward_has_the_bits_of_the_forward():
    x, w, _ = operands((48, 64, 80), torch.float32)
    for rounding in (TORCH, KernelRounding()):
        scaling = CurrentScaling(E4M3, E5M2, ALONE, rounding)
        once = scaling.forward_operands(x.detach(), w.detach(), records=True, keeps_x=True)
        again = scaling.transposed_weight(w.detach(), once.w_scale)
        assert torch.equal(again.values_MK.view(torch.uint8), once.w.values_MK.view(torch.uint8).t())
        assert torch.equal(again.inverse, once.w.inverse)


def test_what_kernels_wrote_is_multiplied_without_a_copy():
    x, _, _ = operands((37, 43, 86), torch.float32)
    found = KernelRounding().quantised(x, torch.tensor(2.0, device=DEVICE), E4M3, as_it_stands=True, transposed=True)
    for one in (found.as_it_stands, found.transposed):
        for rows in (True, False):
            assert _aligned(one.values_MK, rows=rows).data_ptr() == one.values_MK.data_ptr()
    assert found.as_it_stands.shape == (37, 43) and found.transposed.shape == (43, 37)
    assert torch.equal(found.as_it_stands.dequantised(torch.float32), found.transposed.dequantised(torch.float32).t())


def test_kernels_that_cannot_run_are_refused_with_the_remedy(monkeypatch):
    from mimo_triton_kernels import launching

    monkeypatch.setattr(launching, "can_run", lambda: False)
    with pytest.raises(ConfigError, match=r"no GPU: set train\.fp8\.rounding=torch"):
        KernelRounding()
    for name in [name for name in sys.modules if name.startswith("mimo_triton_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r"triton is not installed .*set train\.fp8\.rounding=torch"):
        KernelRounding()
