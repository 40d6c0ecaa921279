"""The suite's tables of the head's loss, the optimizer's step and rows that move: what is counted, what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the suite measures the kernels: pip install triton")

from benchmarks.gpu import head, optimizer, peers
from benchmarks.gpu.correctness import judge, run
from benchmarks.gpu.head_cases import in_chunks, plain_losses, small_head, table
from benchmarks.gpu.moves import small_moves
from benchmarks.gpu.peers import Unavailable
from benchmarks.gpu.setting import REAL, TINY, Bench, Setting
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import OptimizerConfig, ParallelConfig
from mimo_megatron.loss.implicit_logits import Chunking
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import build_chunks
from tests.harness import run_ranks
from tests.kernel_cases import ON_GPU

SETTING = Setting(torch.device("cpu"), is_rehearsal=True)
SETTINGS = OptimizerConfig()
SLOTS, HEAD_LOGITS = 16, 4096
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def bench() -> Bench:
    return Bench(SETTING, {"bytes_per_second": 1e9, "flops_per_second": 1e9})


def head_row(losses: Losses, head_logits: int | None = None, fraction: float = 1.0) -> dict[str, Any]:
    one = head.Pass(preset("tiny-vl"), round(SLOTS * fraction), SETTING)
    want = one.run(head._summed(table))
    return head.row("a way", head_logits, head._summed(losses), fraction, one, want, bench())


# ---- the head's loss -------------------------------------------------------------------------------------------------


def test_bytes_of_logits_are_those_that_exist_at_a_time() -> None:
    whole = head_row(table)
    assert whole["table_bytes"] == 4 * SLOTS * preset("tiny-vl").text.vocab_size
    assert whole["logits_bytes"] == whole["table_bytes"]
    assert head_row(in_chunks("chunked", HEAD_LOGITS), HEAD_LOGITS)["logits_bytes"] == 4 * HEAD_LOGITS


def test_a_way_that_keeps_a_second_table_is_seen() -> None:
    kept = []

    def losses(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> Tensor:
        kept.append((hidden_RD @ weight_VD.t()).detach().exp())
        return table(hidden_RD, weight_VD, labels_R)

    assert head_row(losses)["logits_bytes"] >= 2 * head_row(table)["table_bytes"]


def test_where_fewer_slots_are_trained_nothing_is_counted() -> None:
    """A chunk may have the shape of hidden states there."""
    found = head_row(in_chunks("chunked", HEAD_LOGITS), HEAD_LOGITS, 0.5)
    assert found["logits_bytes"] is None and found["rows"] == SLOTS / 2 and found["ms"] > 0


@pytest.mark.parametrize(("sizes", "name"), [(REAL, "mimo-vl-7b"), (TINY, "tiny-vl")])
def test_no_chunk_is_as_wide_as_the_model(sizes: Any, name: str) -> None:
    model = preset(name)
    widths = {Chunking(logits).columns(sizes.head_slots) for logits in sizes.head_logits}
    assert model.text.width not in widths | {model.text.vocab_size % width for width in widths}
    assert sizes.head_slots != model.text.width


@pytest.mark.parametrize(
    "fault",
    [
        lambda hidden_RD, weight_VD, labels_R: plain_losses(hidden_RD, weight_VD, labels_R) * 1.001,
        lambda hidden_RD, weight_VD, labels_R: (
            plain_losses(hidden_RD, weight_VD.detach() * 1.0, labels_R) + 0 * weight_VD.sum()
        ),
    ],
)
def test_a_way_with_another_loss_or_gradient_is_not_timed(fault: Losses) -> None:
    found = head_row(fault)
    assert "from that of the table" in found["failed"] and "ms" not in found


def test_a_head_that_rounds_otherwise_fails_the_correctness() -> None:
    case = small_head(SETTING)
    oracle, eager = (run(case.definition, case, dtype, torch.float32) for dtype in (torch.float64, torch.float32))
    right = judge(case, "chunked", case.ways["chunked"], oracle, eager, bench())
    wrong = judge(case, "chunked", lambda h, w: case.definition(h, w) * (1 + 1e-5), oracle, eager, bench())
    assert right["ok"] and not wrong["ok"], (right, wrong)


# ---- the optimizer's step --------------------------------------------------------------------------------------------


def shapes_of_a_layer(address: RankAddress) -> list[tuple[int, ...]]:
    """Of the first of decoder and encoder, as they are built."""
    with megatron(ParallelConfig(), address) as mesh:
        (chunk,) = build_chunks(preset("tiny-vl"), ParallelConfig(), Numerics(), mesh)
        named = chunk.named_parameters()
        return [tuple(one.shape) for name, one in named if ".layers.0." in name or ".blocks.0." in name]


@pytest.mark.skipif(ON_GPU, reason="ranks are forked: the parent's CUDA context does not survive it")
def test_shapes_are_those_of_the_models_layers() -> None:
    (built,) = run_ranks(shapes_of_a_layer, 1)
    assert sorted(optimizer.shapes_of(preset("tiny-vl"), 1)) == sorted(built)


def adam(make: Any) -> dict[str, Any]:
    shapes = [(8, 4), (4,)]
    want, _ = optimizer.changed_by(optimizer.ways(SETTINGS)[optimizer.TRUSTED], shapes, SETTING)
    return optimizer.row("a way", make, shapes, want, bench())


def test_a_step_that_changes_something_else_is_not_timed() -> None:
    options = optimizer.options(SETTINGS)
    right = adam(lambda params: torch.optim.AdamW(params, **options))
    assert right["ms"] > 0 and right["difference"] < 1e-6
    for wrong in (
        lambda params: torch.optim.AdamW(params, **{**options, "weight_decay": 0.0}),
        lambda params: torch.optim.Adam(params, **options),
        lambda params: torch.optim.AdamW(params, **{**options, "lr": 1.001e-3}),
    ):
        assert "from that of AdamW foreach" in adam(wrong)["failed"]
    assert adam(Unavailable("not installed"))["absent"] == "not installed"


# ---- rows that only move ---------------------------------------------------------------------------------------------


def test_the_models_moves_are_their_definition_to_the_bit() -> None:
    for case in small_moves(SETTING):
        want = run(case.definition, case, torch.float32, torch.float32)[0]
        for name, way in case.ways.items():
            assert torch.equal(run(way, case, torch.float32, torch.float32)[0], want), (case.op, name)


# ---- peers -----------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_or_does_not_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"no_such_package\.part is not installed"):
        peers.needs("no_such_package.part")

    def broken() -> None:
        raise OSError("undefined symbol: _ZN3c10")

    with pytest.raises(Unavailable, match="does not import: OSError: undefined symbol"):
        peers.loaded(broken)
    assert str(peers.or_why_not(broken, torch.device("cpu"))) == "needs a GPU"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: broken())
    with pytest.raises(Unavailable, match="does not import: OSError"):
        peers.needs("apex.normalization")
