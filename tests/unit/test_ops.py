"""The hand-written row operations against their plain expressions: values and every gradient."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import silu

from mimo_megatron import ops
from mimo_megatron.config.model import VisionConfig
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.model.vision import VisionEncoder
from mimo_megatron.offload import ActivationOffload
from mimo_megatron.ops import gated, rms_norm, swiglu, torchs_rms_norm, turn, turn_qk
from tests.parity_rule import assert_kernel_parity, assert_named_parity

EPS = 1e-6
VISION = VisionConfig(
    depth=2, width=64, num_heads=4, ffn_width=96, full_attention_layers=(1,), window_size=112, patch_size=14
)
Op = Callable[..., Tensor]
Case = tuple[Op, Op, tuple[Tensor, ...]]
"""Ours, the plain expression, and inputs."""


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


def joined_turn_qk(qkv: Tensor) -> Tensor:
    angles = ANGLES.to(torch.promote_types(qkv.dtype, torch.float32))
    return torch.cat(turn_qk(qkv, angles.cos(), angles.sin()), 1)


def plain_turn_qk(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(1)
    return torch.cat((plain_turn(q), plain_turn(k), v), 1)


# Two leading dims, as megatron's [S, 1, D] has.
def name_of(param: tuple[str, bool]) -> str:
    return f"{param[0]}, compiled" if param[1] else param[0]


OPS: dict[str, Case] = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, EPS), plain_rms_norm, (draw(5, 3, 24), draw(24))),
    "torch's rms_norm": (
        lambda x, weight: torchs_rms_norm(x, weight, EPS),
        plain_rms_norm,
        (draw(5, 3, 24), draw(24)),
    ),
    "swiglu": (swiglu, plain_swiglu, (draw(5, 3, 22),)),
    "turn": (our_turn, plain_turn, (draw(5, 3, 16),)),
    "gated": (gated, lambda gate, up: silu(gate) * up, (draw(5, 3, 22), draw(5, 3, 11, 2).flatten(2))),
    "turn_qk": (joined_turn_qk, plain_turn_qk, (draw(5, 3, 3, 16),)),
}
ON_A_GPU = ("turn", "gated", "turn_qk")


@pytest.fixture(params=[*((name, False) for name in OPS), *((name, True) for name in ON_A_GPU)], ids=name_of)
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Some compiled as on a GPU, here by the CPU's compiler."""
    name, is_compiled = request.param
    if is_compiled:
        monkeypatch.setattr(ops, "is_compiled", lambda x: True)
    return OPS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_equal_the_plain_expression(op: Case, dtype: torch.dtype) -> None:
    ours, plain, inputs = op
    assert_kernel_parity(ours, plain, inputs, dtype)


def test_float64_stays_float64_and_has_the_gradient_of_finite_differences(op: Case) -> None:
    ours, plain, inputs = op
    leaves = [one.clone().requires_grad_() for one in inputs]
    assert ours(*leaves).dtype == torch.float64
    torch.testing.assert_close(ours(*leaves), plain(*leaves), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(ours, leaves)


def test_inputs_and_upstream_gradient_are_left_as_they_were(op: Case) -> None:
    ours, _, inputs = op
    leaves = [one.clone().requires_grad_() for one in inputs]
    out = ours(*leaves)
    upstream = torch.ones_like(out)
    out.backward(upstream, retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    out.backward(upstream)  # once more from the same saved tensors
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(leaves, first, strict=True))
    assert all(torch.equal(leaf, one) for leaf, one in zip(leaves, inputs, strict=True))
    assert torch.equal(upstream, torch.ones_like(out))


def test_another_number_of_rows_compiles_nothing_forward_or_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "is_compiled", lambda x: True)

    def step(rows: int) -> None:  # of the other tests' widths
        qkv, x, gate = (draw(rows, *sizes).float().requires_grad_() for sizes in ((3, 3, 16), (3, 16), (3, 22)))
        angles = draw(rows, 1, 8).float()
        q, k, v = turn_qk(qkv, angles.cos(), angles.sin())
        (turn(x, angles.cos(), angles.sin()).sum() + (q * k * v).sum() + gated(gate, gate).sum()).backward()

    step(5)
    num_graphs = counters["stats"]["unique_graphs"]
    for rows in (2, 7, 64, 300):
        step(rows)
    assert counters["stats"]["unique_graphs"] == num_graphs > 0


def test_rows_that_are_not_marked_as_varying_would_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "is_compiled", lambda x: True)
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda tensor, dim: None)
    found = []
    for rows in (5, 7):
        gated(draw(rows, 10).float(), draw(rows, 10).float())
        found.append(counters["stats"]["unique_graphs"])
    assert found[1] == found[0] + 1


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row_are_compiled_too(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = draw(rows, 3, 22).float().requires_grad_()
    plain = silu(gate) * gate
    monkeypatch.setattr(ops, "is_compiled", lambda x: True)
    torch.testing.assert_close(gated(gate, gate), plain)
    assert torch.autograd.grad(gated(gate, gate).sum(), gate)[0].shape == gate.shape


@pytest.mark.parametrize("recompute", [False, True])
def test_the_encoder_is_the_same_with_compiled_operations(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = vision_layout([(1, 10, 8), (1, 2, 4)], VISION)
    pixels = torch.randint(0, 256, (88, 1176), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    encoder = VisionEncoder(VISION, recompute=recompute, offload=ActivationOffload())

    def run(dtype: torch.dtype, is_compiled: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(ops, "is_compiled", lambda x: is_compiled)
        own = copy.deepcopy(encoder).to(dtype)
        own.offload.begin()
        hidden_PD = own(pixels, layout)
        hidden_PD.square().sum().backward()
        return {"hidden": hidden_PD.detach(), **{name: param.grad for name, param in own.named_parameters()}}

    assert_named_parity(run(torch.float32, True), run(torch.float32, False), run(torch.float64, False), torch.float32)


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
