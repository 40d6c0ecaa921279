"""The hand-written row operations against their plain expressions: values and every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from mimo_megatron.ops import rms_norm, swiglu, torchs_rms_norm, turn
from tests.parity_rule import assert_kernel_parity

EPS = 1e-6
Op = Callable[..., Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


ANGLES = 3 * draw(5, 1, 8)


def our_turn(x: Tensor) -> Tensor:
    angles = ANGLES.to(torch.promote_types(x.dtype, torch.float32))
    return turn(x, angles.cos(), angles.sin())


def plain_turn(x: Tensor) -> Tensor:
    """Pairs as complex numbers, multiplied by e^(i angle)."""
    angles = ANGLES.to(torch.promote_types(x.dtype, torch.float32))
    first, second = x.to(angles.dtype).chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


# Two leading dims, as megatron's [S, 1, D] has.
OPS: dict[str, tuple[Op, Op, tuple[Tensor, ...]]] = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, EPS), plain_rms_norm, (draw(5, 3, 24), draw(24))),
    "torch's rms_norm": (
        lambda x, weight: torchs_rms_norm(x, weight, EPS),
        plain_rms_norm,
        (draw(5, 3, 24), draw(24)),
    ),
    "swiglu": (swiglu, plain_swiglu, (draw(5, 3, 22),)),
    "turn": (our_turn, plain_turn, (draw(5, 3, 16),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_equal_the_plain_expression(name: str, dtype: torch.dtype) -> None:
    ours, plain, inputs = OPS[name]
    assert_kernel_parity(ours, plain, inputs, dtype)


@pytest.mark.parametrize("name", OPS)
def test_float64_stays_float64_and_has_the_gradient_of_finite_differences(name: str) -> None:
    ours, plain, inputs = OPS[name]
    leaves = [one.clone().requires_grad_() for one in inputs]
    assert ours(*leaves).dtype == torch.float64
    torch.testing.assert_close(ours(*leaves), plain(*leaves), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(ours, leaves)


@pytest.mark.parametrize("name", OPS)
def test_inputs_and_upstream_gradient_are_left_as_they_were(name: str) -> None:
    ours, _, inputs = OPS[name]
    leaves = [one.clone().requires_grad_() for one in inputs]
    out = ours(*leaves)
    upstream = torch.ones_like(out)
    out.backward(upstream, retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    out.backward(upstream)  # once more from the same saved tensors
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(leaves, first, strict=True))
    assert all(torch.equal(leaf, one) for leaf, one in zip(leaves, inputs, strict=True))
    assert torch.equal(upstream, torch.ones_like(out))


def test_a_turned_query_meets_a_turned_key_by_the_difference_of_their_angles() -> None:
    q, k, angles = draw(7, 16), draw(8, 16)[:7], draw(9, 8)[:7]

    def product(of_query: Tensor, of_key: Tensor) -> Tensor:
        return (turn(q, of_query.cos(), of_query.sin()) * turn(k, of_key.cos(), of_key.sin())).sum(-1)

    torch.testing.assert_close(product(angles, 2 * angles), product(0 * angles, angles))


def test_a_norm_whose_gradient_lacks_the_mean_is_rejected() -> None:
    _, plain, inputs = OPS["rms_norm"]

    def faulty(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + EPS)

    with pytest.raises(AssertionError, match="grad of input 0"):
        assert_kernel_parity(faulty, plain, inputs, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_a_gpu_is_torchs_and_keeps_the_rule(dtype: torch.dtype) -> None:
    inputs = tuple(one.cuda() for one in (draw(300, 1, 1280), draw(1280)))
    assert_kernel_parity(lambda x, weight: rms_norm(x, weight, EPS), plain_rms_norm, inputs, dtype)
    x, weight = (one.to(dtype) for one in inputs)
    assert torch.equal(rms_norm(x, weight, EPS), torchs_rms_norm(x, weight, EPS))
