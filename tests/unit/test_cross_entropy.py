"""The vocabulary-parallel cross entropy against torch's, whole and split."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.loss.cross_entropy import token_losses
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.parallel.mesh import Axis
from tests.harness import run_ranks

ROWS, VOCABULARY = 7, 24


def case(dtype: torch.dtype, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    logits = 30 * torch.randn(rows, VOCABULARY, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=draw)
    return logits.to(dtype), labels, torch.rand(rows, generator=draw, dtype=torch.float64).to(dtype)


def losses_and_gradient(logits, labels, upstream, fn):
    leaf = logits.clone().requires_grad_()
    losses = fn(leaf, labels)
    losses.backward(upstream.to(losses.dtype))
    return losses.detach(), leaf.grad


def reference(logits, labels, upstream):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return losses_and_gradient(
        logits, labels, upstream, lambda leaf, labels: cross_entropy(leaf.to(wide), labels, reduction="none")
    )


def overwriting(leaf, labels, tp):
    return token_losses(leaf * 1, labels, tp, overwrite=True)  # a leaf may not be written to


@pytest.mark.parametrize("losses_of", [token_losses, overwriting])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_losses_and_gradient_equal_torchs(dtype, tolerance, losses_of):
    logits, labels, upstream = case(dtype)
    got = losses_and_gradient(logits, labels, upstream, lambda leaf, labels: losses_of(leaf, labels, Axis(0, 1)))
    for ours, theirs in zip(got, reference(logits, labels, upstream), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def split(address: RankAddress, losses_of):
    with megatron(ParallelConfig(tp=2), address) as mesh:
        logits, labels, upstream = case(torch.float64)
        part = logits.chunk(2, -1)[mesh.tp.rank]
        return losses_and_gradient(part, labels, upstream, lambda leaf, labels: losses_of(leaf, labels, mesh.tp))


@pytest.mark.parametrize("losses_of", [token_losses, overwriting])
def test_a_split_vocabulary_gives_the_whole_ones_losses_and_slices_of_its_gradient(losses_of):
    want_losses, want_gradient = reference(*case(torch.float64))
    for rank, (losses, gradient) in enumerate(run_ranks(split, 2, losses_of)):
        torch.testing.assert_close(losses, want_losses, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(gradient, want_gradient.chunk(2, -1)[rank], rtol=1e-14, atol=1e-14)


def test_logits_are_left_as_they_were():
    logits, labels, _ = case(torch.float32)
    before = logits.clone()
    token_losses(logits, labels, Axis(0, 1))
    assert torch.equal(logits, before)


def test_overwritten_logits_that_another_gradient_needs_are_noticed():
    logits, labels, _ = case(torch.float32)
    leaf = logits.requires_grad_() * 1
    squares = (leaf * leaf).sum()
    total = squares + token_losses(leaf, labels, Axis(0, 1), overwrite=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_rows_give_no_losses_and_an_empty_gradient():
    logits, labels, upstream = case(torch.float32, rows=0)
    losses, gradient = losses_and_gradient(
        logits, labels, upstream, lambda leaf, labels: token_losses(leaf, labels, Axis(0, 1))
    )
    assert losses.shape == (0,) and gradient.shape == (0, VOCABULARY)
