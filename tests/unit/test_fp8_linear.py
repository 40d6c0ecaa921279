"""The linear layer: gradients against a plain reference, delayed scaling over steps, PyTorch's product and the twin."""

import pytest
import torch

from mimo_megatron.fp8.linear import PRODUCTS, Fp8Linear, fp8_linear, scaled_product
from mimo_megatron.fp8.quantise import E4M3, E5M2, Quantised
from mimo_megatron.fp8.scaling import BlockScaling, CurrentScaling, DelayedScaling
from mimo_megatron.parallel.mesh import ALONE

SLOTS, INPUTS, OUTPUTS = 48, 64, 80


def operands(
    dtype: torch.dtype = torch.float64, rows: int = SLOTS, inputs: int = INPUTS, outputs: int = OUTPUTS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    shapes = (rows, inputs), (outputs, inputs), (rows, outputs)
    x, w, dy = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return (x * 3).to(dtype).requires_grad_(), (w * 0.02).to(dtype).requires_grad_(), (dy * 1e-3).to(dtype)


def run(scaling, dtype=torch.float64, product="twin", rows=SLOTS, inputs=INPUTS, outputs=OUTPUTS):
    x, w, dy = operands(dtype, rows, inputs, outputs)
    y = fp8_linear(x, w, scaling, PRODUCTS[product])
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def reference(rounded_forward, rounded_backward):
    """Products of what the operands are rounded to; each rounding is told which dim its product sums over."""
    x, w, dy = (one.detach() for one in operands())
    y = rounded_forward(x, 1) @ rounded_forward(w, 1).t()
    dx = rounded_backward(dy, 1) @ rounded_forward(w, 0)
    dw = rounded_backward(dy, 0).t() @ rounded_forward(x, 0)
    return y, dx, dw


def whole(dtype, limit):
    def rounded(x, _dim):
        scale = (limit / x.abs().max().float()).double()
        return (x * scale).to(dtype).double() / scale

    return rounded


def test_current_scaling_has_the_gradients_of_the_reference():
    want = reference(whole(E4M3, 448.0), whole(E5M2, 57344.0))
    for got, expected in zip(run(CurrentScaling(E4M3, E5M2, ALONE)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)


def test_block_scaling_rounds_each_operand_anew_along_what_its_product_sums_over():
    def rounded(x, dim):  # all sizes are below 128: a tile is a row or column; of the weight, all of it
        amax = x.abs().max() if x.shape == (OUTPUTS, INPUTS) else x.abs().amax(dim, keepdim=True)
        scale = 2.0 ** torch.floor(torch.log2(448.0 / amax))
        return (x * scale).to(E4M3).double() / scale

    want = reference(rounded, rounded)
    for got, expected in zip(run(BlockScaling(E4M3, E4M3)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_the_loss_of_precision_is_that_of_three_bits():
    """A rounding that does nothing, or too much, would be seen here."""
    x, w, _ = (one.detach() for one in operands())
    for scaling in (CurrentScaling(E4M3, E5M2, ALONE), BlockScaling(E4M3, E4M3)):
        y = run(scaling)[0]
        assert 0.01 < ((y - x @ w.t()).norm() / (x @ w.t()).norm()).item() < 0.05


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input():
    x, w, dy = operands()
    y = fp8_linear(x, w.detach(), CurrentScaling(E4M3, E5M2, ALONE), PRODUCTS["twin"])
    assert y.grad_fn.saved_tensors[0] is None
    y.backward(dy)
    assert w.grad is None
    torch.testing.assert_close(x.grad, run(CurrentScaling(E4M3, E5M2, ALONE))[1], rtol=0, atol=0)


def test_what_is_kept_for_the_way_back_is_the_input_in_one_byte_a_value_and_the_weight_itself():
    x, w, _ = operands(torch.float32)
    y = fp8_linear(x, w, CurrentScaling(E4M3, E5M2, ALONE), PRODUCTS["twin"])
    x_values, x_inverse, weight, w_scale = y.grad_fn.saved_tensors
    assert x_values.nbytes == SLOTS * INPUTS and x_inverse.nbytes == w_scale.nbytes == 4
    assert weight.data_ptr() == w.data_ptr()


def test_a_weight_that_changes_between_forward_and_backward_is_found():
    """Rounded again it would be another; megatron's own layers, which keep the weight too, rest on the same."""
    x, w, dy = operands(torch.float32)
    y = fp8_linear(x, w, CurrentScaling(E4M3, E5M2, ALONE), PRODUCTS["twin"])
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_delayed_scaling_begins_with_1_and_follows_the_largest_of_its_history():
    scaling = DelayedScaling(E4M3, E5M2, history=2, margin=1)
    run(scaling)
    assert scaling.scale_3.tolist() == [1.0, 1.0, 1.0]
    amax = [one.detach().abs().max().float().item() for one in operands()]
    assert scaling.seen_3.tolist() == amax
    scaling.end_step(scaling.seen_3.clone())
    first = torch.tensor([224.0, 224.0, 28672.0]) / torch.tensor(amax)
    assert torch.equal(scaling.scale_3, first) and not scaling.seen_3.any()
    scaling.end_step(torch.tensor(amax) * 2)
    assert torch.equal(scaling.scale_3, torch.tensor([224.0, 224.0, 28672.0]) / (torch.tensor(amax) * 2))
    for _ in range(2):  # two steps later the large one is forgotten
        scaling.end_step(torch.tensor(amax))
    assert torch.equal(scaling.scale_3, first)
    for _ in range(2):  # nothing seen: the scales stay
        scaling.end_step(torch.zeros(3))
    assert torch.equal(scaling.scale_3, first)


def test_delayed_scaling_with_the_scales_of_the_same_numbers_is_current_scaling():
    scaling = DelayedScaling(E4M3, E5M2, history=1, margin=0)
    run(scaling)
    scaling.end_step(scaling.seen_3.clone())
    for got, expected in zip(run(scaling), run(CurrentScaling(E4M3, E5M2, ALONE)), strict=True):
        assert torch.equal(got, expected)


def test_evaluation_records_nothing_and_computing_again_counts_nothing_twice():
    scaling = DelayedScaling(E4M3, E5M2, history=2, margin=0)
    x, w, _ = operands()
    with torch.no_grad():
        fp8_linear(x, w, scaling, PRODUCTS["twin"])
    assert not scaling.seen_3.any()
    run(scaling)
    once = scaling.seen_3.clone()
    run(scaling)
    assert torch.equal(scaling.seen_3, once) and once.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [E4M3, E5M2])
@pytest.mark.parametrize("sizes", [(SLOTS, INPUTS, OUTPUTS), (SLOTS + 4, INPUTS, OUTPUTS), (37, 43, 86), (1, 9, 3)])
def test_pytorchs_fp8_product_is_the_twins_up_to_the_order_of_sums_for_any_sizes(dtype, backward, sizes):
    scalings = [CurrentScaling(E4M3, backward, ALONE) for _ in range(2)]
    twin, device = run(scalings[0], dtype, "twin", *sizes), run(scalings[1], dtype, "scaled_mm", *sizes)
    rounding = 2**-8 if dtype is torch.bfloat16 else 1e-6
    for ours, theirs in zip(twin, device, strict=True):
        assert ours.dtype is theirs.dtype is dtype and theirs.is_contiguous()
        assert ((ours.double() - theirs.double()).norm() / ours.double().norm()).item() < rounding


@pytest.mark.parametrize("sizes", [(37, 43, 86), (1, 9, 3), (64, 3420, 1280)])
def test_operands_of_any_sizes_are_given_to_a_gpus_product_as_it_wants_them(sizes):
    """Tensors without memory are checked by PyTorch for a GPU: orders of rows, and multiples of 16."""
    rows, reduced, columns = sizes
    inverse = torch.ones((), device="meta")
    a = Quantised(torch.empty(rows, reduced, dtype=E4M3, device="meta"), inverse, (rows, reduced))
    b = Quantised(torch.empty(reduced, columns, dtype=E4M3, device="meta").t(), inverse, (columns, reduced))
    out = scaled_product(a, b, torch.bfloat16)
    assert out.shape == (rows, columns) and out.is_contiguous()
    with pytest.raises(RuntimeError, match=r"divisible by 16|must be col_major"):
        torch._scaled_mm(a.values_MK, b.values_MK.t(), inverse, inverse, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("make", [lambda: CurrentScaling(E4M3, E5M2, ALONE), lambda: DelayedScaling(E4M3, E5M2, 2, 0)])
def test_a_rank_without_rows_has_gradients_of_zero(make, product):
    layer = Fp8Linear(INPUTS, OUTPUTS, scaling=make(), product=PRODUCTS[product])
    out = layer(torch.zeros(0, INPUTS, requires_grad=True))
    assert out.shape == (0, OUTPUTS)
    out.sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any() and not layer.bias.grad.any()


def test_the_layer_is_the_product_and_its_bias_and_takes_any_leading_dims():
    x, w, _ = (one.detach() for one in operands(torch.float32))
    layer = Fp8Linear(INPUTS, OUTPUTS, scaling=CurrentScaling(E4M3, E5M2, ALONE), product=PRODUCTS["twin"])
    with torch.no_grad():
        layer.weight.copy_(w)
    want = fp8_linear(x, w, layer.scaling, layer.product) + layer.bias
    assert torch.equal(layer(x.unflatten(0, (4, -1))).flatten(0, 1), want)


def test_histories_stay_in_float32_where_the_model_is_cast():
    scaling = DelayedScaling(E4M3, E5M2, 2, 0)
    scaling.scale_3.fill_(1 + 2**-20)
    layer = Fp8Linear(INPUTS, OUTPUTS, scaling=scaling, product=PRODUCTS["twin"]).to(torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16 and layer.scaling.scale_3.tolist() == [1 + 2**-20] * 3
