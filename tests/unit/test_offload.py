"""Activations on the host: values come back bit for bit, tensors leave the device, and what must stay stays."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimo_megatron import offload
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.offload import IN_FLIGHT, SMALLEST_BYTES, ActivationOffload
from mimo_megatron.train.step import build_trainer, train_step
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

ROWS, WIDTH, LAYERS = 64, 96, 6
ROW_BYTES = ROWS * WIDTH * 4
assert ROW_BYTES >= SMALLEST_BYTES > ROWS * 8


class Layer(nn.Module):
    """Saves its input, a product and, twice, an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.tanh(x @ self.weight)
        return x + gate * gate.t().contiguous().t()


class Net(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.recompute = recompute

    def forward(self, x: Tensor, offloaded: ActivationOffload | None = None) -> Tensor:
        if offloaded is None:
            return self._run(x, lambda: None)
        offloaded.begin()
        with offloaded.over(self):
            return self._run(x, offloaded.next_layer)

    def _run(self, x: Tensor, next_layer: Any) -> Tensor:
        for layer in self.layers:
            next_layer()
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def gradients(net: Net, inputs: list[Tensor], offloaded: ActivationOffload | None) -> list[Tensor]:
    """Of several microbatches, whose forward passes all come before the first backward."""
    outs = [net(x, offloaded) for x in inputs]
    for out in outs:
        out.square().sum().backward()
    return [param.grad.clone() for param in net.parameters() if param.grad is not None]


def inputs(count: int = 1) -> list[Tensor]:
    return [torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(n), requires_grad=True)
            for n in range(count)]  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_gradients_are_bit_for_bit_those_without_offload(recompute: bool, in_flight: int) -> None:
    plain = gradients(Net(recompute), inputs(in_flight), None)
    offloaded = ActivationOffload()
    found = gradients(Net(recompute), inputs(in_flight), offloaded)
    assert len(found) == LAYERS and all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    assert offloaded.copied_bytes > 0 and offloaded.host_bytes == 0  # all of it was used, and is gone


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_on_a_gpu_gradients_are_bit_for_bit_those_without_offload(recompute: bool) -> None:
    """Copies on streams of their own. Not run yet."""
    many = [x.detach().cuda().requires_grad_() for x in inputs(3)]
    plain, offloaded = gradients(Net(recompute).cuda(), many, None), ActivationOffload()
    found = gradients(Net(recompute).cuda(), many, offloaded)
    assert len(found) == LAYERS and all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    assert offloaded.copied_bytes > 0 and offloaded.host_bytes == 0


def test_what_leaves_is_counted_and_gone_from_the_device() -> None:
    """Of all layers but the newest ones nothing is left but the copies; then these leave too, as others come."""
    seen: list[weakref.ref[Any]] = []

    class Watched(Layer):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(weakref.ref(x.untyped_storage()))
            return super().forward(x)

    net, offloaded = Net(), ActivationOffload()
    net.layers = nn.ModuleList(Watched() for _ in range(LAYERS))
    out = net(inputs()[0].detach().requires_grad_() * 1, offloaded)
    gc.collect()
    alive = [reference() is not None for reference in seen]
    assert alive == [False] * (LAYERS - IN_FLIGHT) + [True] * IN_FLIGHT
    # x, the activation, and its transposed copy of every layer.
    assert offloaded.host_bytes == offloaded.copied_bytes == LAYERS * 3 * ROW_BYTES
    second = net(inputs()[0].detach().requires_grad_() * 1, offloaded)
    gc.collect()
    assert not any(reference() is not None for reference in seen[:LAYERS])
    assert offloaded.peak_host_bytes == 2 * LAYERS * 3 * ROW_BYTES
    del out, second
    gc.collect()
    assert offloaded.host_bytes == 0


def test_only_the_layer_at_work_and_the_one_before_it_are_back() -> None:
    net, offloaded = Net(), ActivationOffload()
    first, second = (net(x, offloaded) for x in inputs(2))
    fetched: list[int] = []
    fetch, count = ActivationOffload._fetch, [0]

    def counted(self: ActivationOffload, layer: Any) -> None:
        missing = [copy for copy in layer.alive() if copy.source is None and copy.fetched is None]
        count[0] += bool(missing)
        fetch(self, layer)

    def note(_: Tensor) -> None:
        fetched.append(count[0])

    patch = pytest.MonkeyPatch()
    patch.setattr(ActivationOffload, "_fetch", counted)
    for layer in net.layers:
        layer.weight.register_hook(note)
    first.sum().backward()
    patch.undo()
    # When a layer's weight gets its gradient, its own layer and the one before it were brought back, no other.
    assert fetched == [2, 3, 4, 5, 6, 6]
    second.sum().backward()
    assert offloaded.host_bytes == 0


def test_parameters_kept_tensors_and_small_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    to_host = ActivationOffload._to_host

    def noted(self: ActivationOffload, source: Tensor) -> Tensor:
        copied.append(source.untyped_storage().data_ptr())
        return to_host(self, source)

    monkeypatch.setattr(ActivationOffload, "_to_host", noted)
    net, offloaded = Net(), ActivationOffload()
    kept, small = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 1, requires_grad=True)
    x = inputs()[0] * 1
    with offloaded.over(net, kept):
        out = ((x * kept) @ net.layers[0].weight) * small
    out.sum().backward()
    assert len(copied) == 2  # x * kept and the product; x needs not be saved
    held = {one.untyped_storage().data_ptr() for one in (kept, small, *net.parameters())}
    assert not held & set(copied)


def test_nothing_is_saved_where_no_gradient_is_wanted() -> None:
    offloaded = ActivationOffload()
    with torch.no_grad():
        Net()(inputs()[0], offloaded)
    assert offloaded.copied_bytes == 0


def test_a_saved_tensor_that_is_written_to_is_an_error() -> None:
    net, offloaded = Net(), ActivationOffload()
    x = inputs()[0] * 1
    with offloaded.over(net):
        out = x @ net.layers[0].weight
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(AssertionError, match="a saved tensor was written to"):
        out.sum().backward()


def _another_order(original: Any) -> Any:
    """Planted: what is brought back lands in another tensor's place."""

    def fetch(self: ActivationOffload, layer: Any) -> None:
        missing = [copy for copy in layer.alive() if copy.source is None and copy.fetched is None]
        hosts = [copy.host for copy in missing]
        for copy, host in zip(missing, hosts[1:] + hosts[:1], strict=True):
            copy.host = host.reshape(copy.host.shape)
        original(self, layer)

    return fetch


def _given_up_too_early(_original: Any) -> Any:
    """Planted: the device's memory is used again before the host has the values."""

    def to_host(self: ActivationOffload, source: Tensor) -> Tensor:
        return offload._empty_on_host(source).fill_(0)

    return to_host


@pytest.mark.parametrize(
    ("name", "fault"), [("_fetch", _another_order), ("_to_host", _given_up_too_early)], ids=["order", "too early"]
)
def test_a_planted_fault_changes_the_gradients(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(Net(), inputs(2), None)
    monkeypatch.setattr(ActivationOffload, name, fault(getattr(ActivationOffload, name)))
    found = gradients(Net(), inputs(2), ActivationOffload())
    assert any(not torch.equal(one, other) for one, other in zip(plain, found, strict=True))


# ---- the model -------------------------------------------------------------------------------------------------------

SLOTS = 96
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {
    # layout, ranks, train, text
    "plain": ({}, 1, {}, {}),
    "selective": ({}, 1, dict(recompute="selective"), {}),
    "full, mtp, tied": ({}, 1, dict(recompute="full"), dict(num_mtp_layers=1, tie_embeddings=True)),
    "bf16, fp8": ({}, 1, dict(precision="bf16", fp8={}), {}),
    "pp2 vpp2": (dict(pp=2, vpp=2), 2, {}, {}),
    "pp2, full": (dict(pp=2), 2, dict(recompute="full"), {}),
    "tp2 sp": (dict(tp=2, sequence_parallel=True), 2, {}, {}),
    "cp2, balanced": (dict(cp=2, vision_placement="balanced"), 2, dict(vision_recompute=True), {}),
    "dp2, overlap": ({}, 2, dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=50_000), {}),
}


def two_steps(
    address: RankAddress, layout: dict[str, Any], train: dict[str, Any], text: dict[str, Any], whose: str
) -> tuple[list[float], int, int]:
    """Losses and norms; bytes that were copied, and that are still on the host."""
    with megatron(ParallelConfig(**layout), address) as mesh:
        config = run_config(tiny_model(**text), parallel=ParallelConfig(**layout), offload_activations=whose, **train)
        trainer = build_trainer(config, mesh)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()[mesh.dp.rank :: mesh.dp.size]]
        results = [train_step(trainer, batches, step, 1.0) for step in range(2)]
        offloads = [chunk.offload for chunk in trainer.bare_chunks if chunk.offload is not None]
        copied, left = sum(one.copied_bytes for one in offloads), sum(one.host_bytes for one in offloads)
        return [number for one in results for number in (one.loss, one.grad_norm)], copied, left


QUICK = ("plain", "pp2, full")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_step_is_bit_for_bit_the_one_without_offload(name: str) -> None:
    layout, ranks, train, text = CASES[name]
    plain = run_ranks(two_steps, ranks, layout, train, text, "none")
    for whose in ("vision", "text", "all") if name == "plain" else ("all",):
        for (numbers, copied, left), (want, nothing, _) in zip(
            run_ranks(two_steps, ranks, layout, train, text, whose), plain, strict=True
        ):
            assert numbers == want and nothing == 0
            assert copied > 0 and left == 0


@pytest.mark.slow
def test_recomputation_leaves_less_to_copy() -> None:
    copied = {
        recompute: run_ranks(two_steps, 1, {}, dict(recompute=recompute), {}, "all")[0][1]
        for recompute in ("none", "selective", "full")
    }
    assert copied["full"] < copied["selective"] / 2 < copied["none"] / 2
