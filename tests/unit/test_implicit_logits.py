"""Losses of logits that are never stored against those of the table, in one process and over tp; faults to be found."""

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_megatron.config.check import the_chunked_head_has_a_vocabulary
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.errors import ConfigError
from mimo_megatron.loss import implicit_logits
from mimo_megatron.loss.chunk_softmax import TORCH, ChunkSoftmax, chunk_softmax
from mimo_megatron.loss.cross_entropy import token_losses, token_losses_and_entropies
from mimo_megatron.loss.implicit_logits import Chunking, ImplicitLogits
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.parallel.mesh import Axis
from tests.harness import run_ranks
from tests.kernel_cases import DEVICE, DTYPES
from tests.parity_rule import assert_named_parity
from tests.repository import ROOT
from tests.tensor_meter import TensorMeter

ROWS, WIDTH, VOCABULARY = 7, 16, 48
EXCLUDED = (0, 1, 24, 47)
ONE = Axis(0, 1)
Named = dict[str, Tensor]


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels that are not excluded, gradients of the losses."""
    draw = torch.Generator().manual_seed(4)
    hidden_RD = 2 * torch.randn(rows, WIDTH, generator=draw, dtype=torch.float64)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)
    labels_R = torch.randint(2, 24, (rows,), generator=draw) + 23 * (torch.arange(rows) % 2)
    return hidden_RD.to(dtype), weight_VD.to(dtype), labels_R, torch.randn(rows, generator=draw)


def found(
    hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, d_losses_R: Tensor, tp: Axis, columns: int,
    softmax: ChunkSoftmax = TORCH,
) -> Named:  # fmt: skip
    """Losses, entropies and both gradients; ``weight_VD`` is this rank's."""
    hidden_RD, weight_VD = hidden_RD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    logits = ImplicitLogits(hidden_RD, weight_VD, Chunking(columns * len(hidden_RD), softmax)).without(EXCLUDED)
    losses_R, entropies_R = token_losses_and_entropies(logits, labels_R, tp)
    d_hidden, d_weight = torch.autograd.grad(losses_R, [hidden_RD, weight_VD], d_losses_R.to(losses_R.dtype))
    return {"losses": losses_R.detach(), "entropies": entropies_R, "d_hidden": d_hidden, "d_weight": d_weight}


def reference(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, d_losses_R: Tensor) -> Named:
    """The same in plain autograd, from a table."""
    hidden_RD, weight_VD = hidden_RD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    logits_RV = (hidden_RD @ weight_VD.t()).index_fill(-1, torch.tensor(EXCLUDED, device=labels_R.device), -torch.inf)
    log_probs_RV = logits_RV.to(wide).log_softmax(-1)
    losses_R = -log_probs_RV.gather(-1, labels_R[:, None])[:, 0]
    entropies_R = -torch.xlogy(log_probs_RV.exp(), log_probs_RV.exp()).sum(-1)
    d_hidden, d_weight = torch.autograd.grad(losses_R, [hidden_RD, weight_VD], d_losses_R.to(wide))
    return {"losses": losses_R.detach(), "entropies": entropies_R.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


def assert_same(got: Named, want: Named, tolerance: float = 1e-13) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("columns", [1, 5, 16, 48, 1000])
def test_losses_entropies_and_gradients_are_those_of_the_table(columns: int) -> None:
    assert_same(found(*inputs(torch.float64), ONE, columns), reference(*inputs(torch.float64)))


@pytest.mark.parametrize("columns", [5, 16, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_no_worse_than_the_tables(dtype: torch.dtype, columns: int) -> None:
    assert_as_exact_as_the_table(dtype, columns, TORCH, rows=40)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels need triton: pip install triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_no_worse_with_the_kernels(dtype: torch.dtype) -> None:
    assert_as_exact_as_the_table(dtype, 20, chunk_softmax("triton"), rows=9)


def assert_as_exact_as_the_table(dtype: torch.dtype, columns: int, softmax: ChunkSoftmax, rows: int) -> None:
    hidden_RD, weight_VD, labels_R, d_losses_R = (one.to(DEVICE) for one in inputs(dtype, rows))
    got = found(hidden_RD, weight_VD, labels_R, d_losses_R, ONE, columns, softmax)
    eager = reference(hidden_RD, weight_VD, labels_R, d_losses_R)
    oracle = reference(hidden_RD.double(), weight_VD.double(), labels_R, d_losses_R)
    for names, kind in ((("losses", "entropies"), torch.float32), (("d_hidden", "d_weight"), dtype)):
        assert_named_parity(*({name: one[name] for name in names} for one in (got, eager, oracle)), kind)


def test_an_fp32_head_takes_a_bf16_weight_and_gives_it_a_bf16_gradient() -> None:
    hidden_RD, weight_VD, labels_R, d_losses_R = inputs(torch.bfloat16)
    got = found(hidden_RD.float(), weight_VD, labels_R, d_losses_R, ONE, 9)
    want = reference(hidden_RD.float(), weight_VD.float(), labels_R, d_losses_R)
    assert got["d_weight"].dtype == torch.bfloat16
    assert torch.equal(got.pop("d_weight"), want.pop("d_weight").bfloat16())
    assert_same(got, want, 1e-5)


def test_a_label_that_is_excluded_has_an_infinite_loss_as_from_the_table() -> None:
    hidden_RD, weight_VD, labels_R, d_losses_R = inputs(torch.float32)
    labels_R[2] = EXCLUDED[2]
    losses_R = found(hidden_RD, weight_VD, labels_R, d_losses_R, ONE, 10)["losses"]
    assert losses_R.isinf().tolist() == [row == 2 for row in range(ROWS)]


def test_a_chunk_of_excluded_tokens_alone_changes_nothing() -> None:
    got, want = (found(*inputs(torch.float64), ONE, columns) for columns in (2, VOCABULARY))
    assert EXCLUDED[:2] == (0, 1)
    assert_same(got, want)


def split(address: RankAddress, size: int, rows: int, columns: int, fault: str) -> Named:
    with megatron(ParallelConfig(tp=size), address) as mesh:
        softmax = FAULTS[fault]() if fault else TORCH
        hidden_RD, weight_VD, labels_R, d_losses_R = inputs(torch.float64, rows)
        return found(hidden_RD, weight_VD.chunk(size)[mesh.tp.rank], labels_R, d_losses_R, mesh.tp, columns, softmax)


def assert_split_is_whole(size: int, rows: int = ROWS, columns: int = 5, fault: str = "") -> None:
    want = reference(*inputs(torch.float64, rows))
    for rank, got in enumerate(run_ranks(split, size, size, rows, columns, fault)):
        assert_same(got, want | {"d_weight": want["d_weight"].chunk(size)[rank]})


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_vocabulary_gives_the_same_on_every_rank(size: int) -> None:
    assert_split_is_whole(size)


def test_no_rows_meet_the_other_ranks_all_the_same() -> None:
    assert_split_is_whole(2, rows=0)


def forgetting(number: int) -> ChunkSoftmax:
    """The all-reduce of that number is forgotten: 0 of the maximum, 1 of the sums, 2 of the hidden states' gradient."""
    plain, calls = implicit_logits.dist.all_reduce, itertools.count()

    def all_reduce(tensor: Tensor, **options: Any) -> None:
        if next(calls) != number:
            plain(tensor, **options)

    implicit_logits.dist.all_reduce = all_reduce  # type: ignore[assignment]
    return TORCH


def losing_the_last_row() -> ChunkSoftmax:
    def to_gradient(logits_RC: Tensor, *others: Tensor) -> Tensor:
        gradient_RC = TORCH.to_gradient(logits_RC, *others)
        gradient_RC[-1] = 0
        return gradient_RC

    return replace(TORCH, to_gradient=to_gradient)


def losing_the_last_column() -> ChunkSoftmax:
    def absorb(logits_RC: Tensor, *others: Any) -> None:
        TORCH.absorb(logits_RC[:, : max(logits_RC.shape[1] - 1, 1)], *others)

    return replace(TORCH, absorb=absorb)


FAULTS: dict[str, Callable[[], ChunkSoftmax]] = {
    "maximum of the own share": functools.partial(forgetting, 0),
    "sums of the own share": functools.partial(forgetting, 1),
    "gradient of the hidden states not summed over tp": functools.partial(forgetting, 2),
    "the last row of every chunk lost": losing_the_last_row,
    "the last column of every chunk lost": losing_the_last_column,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    with pytest.raises(AssertionError, match="are not close"):
        assert_split_is_whole(2, fault=fault)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_gradient_that_is_wanted_is_computed(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = {"hidden": "_set_product", "weight": "_add_product"}[trained]
    monkeypatch.setattr(implicit_logits, forgotten, lambda *_: pytest.fail("was computed"))
    hidden_RD, weight_VD, labels_R, d_losses_R = inputs(torch.float64)
    leaf = {"hidden": hidden_RD, "weight": weight_VD}[trained].requires_grad_()
    logits = ImplicitLogits(hidden_RD, weight_VD, Chunking(9 * ROWS))
    (got,) = torch.autograd.grad(token_losses(logits, labels_R, ONE), leaf, d_losses_R.double())
    assert got.shape == leaf.shape and got.any()


def test_no_more_logits_than_a_chunks_are_ever_live() -> None:
    """With the hidden states' gradient, and the weight's where it is trained, which it is not here; 64 chunks."""
    rows, width, vocabulary = 512, 8, 8192
    hidden_RD, weight_VD = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width)
    labels_R = torch.arange(rows)
    peaks = {}
    for name in ("table", "chunks"):
        with TensorMeter() as meter:
            logits = (
                ImplicitLogits(hidden_RD, weight_VD, Chunking(128 * rows))
                if name == "chunks"
                else hidden_RD @ weight_VD.t()
            )
            token_losses(logits, labels_R, ONE, overwrite=True).sum().backward()
        peaks[name] = meter.peak
    assert peaks["table"] >= 4 * rows * vocabulary
    assert peaks["chunks"] < peaks["table"] / 20


def test_fewer_rows_have_wider_chunks() -> None:
    columns = {rows: Chunking(2**27).columns(rows) for rows in (0, 1000, 16384, 32768, 2**28)}
    assert columns == {0: 2**27, 1000: 134_144, 16384: 8192, 32768: 4096, 2**28: 1}


def test_without_triton_the_kernels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mimo_triton_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r"triton is not installed: .*train\.head_loss=chunked"):
        chunk_softmax("triton")


def test_a_reward_head_has_no_vocabulary_to_cut() -> None:
    recipe = ROOT / "examples" / "recipes" / "tiny" / "stage2.yaml"
    config = load_recipe(recipe, ["train.head_loss=chunked", "model.text.head=reward"])
    (problem,) = the_chunked_head_has_a_vocabulary(config, 1)
    assert "set train.head_loss=logits" in problem
