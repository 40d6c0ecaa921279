"""The kernels between the head's two products against their definition in float64; faults that must be found."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from mimo_megatron.loss.chunk_softmax import TORCH, ChunkSoftmax, empty_sums
from mimo_triton_kernels import chunk_softmax
from tests.kernel_cases import DEVICE, DTYPES, ON_GPU, with_fault
from tests.parity_rule import assert_named_parity

ROWS = 5
CUTS = {"one_column": (1, 7), "one_chunk": (300,), "odd": (33, 100, 5), "over_a_step": (4099, 17)}
"""Widths of the chunks of a vocabulary."""


def eager() -> ChunkSoftmax:
    """The definition, in the form of the kernels' functions."""

    def absorb(logits_RC: Tensor, labels_R: Tensor, sums_4R: Tensor, with_entropy: bool) -> None:
        sums_4R.copy_(chunk_softmax.absorb_reference(logits_RC, labels_R, sums_4R))

    return ChunkSoftmax(absorb, chunk_softmax.to_gradient_reference)


def run(softmax: ChunkSoftmax, widths: tuple[int, ...], dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Tensor]:
    """Every result in one dict: log-probabilities, entropies, and the gradient of the logits, chunk by chunk.

    Inputs are rounded to ``rounded`` in any case, so that all dtypes compute the same.
    """
    draw = torch.Generator().manual_seed(sum(widths))
    vocabulary, wide = sum(widths), torch.promote_types(dtype, torch.float32)
    logits_RV = (6 * torch.randn(ROWS, vocabulary, generator=draw)).to(rounded).to(dtype).to(DEVICE)
    logits_RV[0, 0] = torch.finfo(rounded).min  # a token that is excluded
    labels_R = torch.randint(1, vocabulary, (ROWS,), generator=draw).to(DEVICE)
    d_losses_R = torch.randn(ROWS, generator=draw).to(wide).to(DEVICE)
    chunks, start, sums_4R = [], 0, empty_sums(ROWS, wide, DEVICE)
    for width in widths:
        chunks.append((logits_RV[:, start : start + width].contiguous(), labels_R - start))
        start += width
    for logits_RC, local_R in chunks:
        softmax.absorb(logits_RC.clone(), local_R, sums_4R, True)
    max_R, sum_R, weighted_R, label_R = sums_4R
    grads = [softmax.to_gradient(x_RC, local_R, max_R + sum_R.log(), d_losses_R) for x_RC, local_R in chunks]
    return {
        "log-probability": label_R - max_R - sum_R.log(),
        "entropy": sum_R.log() - weighted_R / sum_R,
        "gradient": torch.cat(grads, -1),
    }


def assert_parity(module: ModuleType, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    got, plain = (run(one, widths, dtype, dtype) for one in (of_module(module), eager()))
    oracle = run(eager(), widths, torch.float64, dtype)
    grads = [one.pop("gradient") for one in (got, plain, oracle)]
    assert_named_parity(got, plain, oracle, torch.float32)
    assert_named_parity(*({"gradient": grad} for grad in grads), dtype)


def of_module(module: ModuleType) -> ChunkSoftmax:
    return ChunkSoftmax(module.absorb, module.to_gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", CUTS.values(), ids=CUTS)
def test_log_probabilities_entropies_and_gradients_equal_the_definition(widths: tuple[int, ...], dtype: torch.dtype):
    assert_parity(chunk_softmax, widths, dtype)


def test_the_definition_is_that_of_the_whole_vocabulary() -> None:
    draw = torch.Generator().manual_seed(5)
    logits_RV, labels_R = torch.randn(4, 30, generator=draw, dtype=torch.float64), torch.tensor([0, 29, 7, 8])
    sums_4R = empty_sums(4, torch.float64, torch.device("cpu"))
    for start in range(0, 30, 8):
        sums_4R = chunk_softmax.absorb_reference(logits_RV[:, start : start + 8], labels_R - start, sums_4R)
    log_probs_RV = logits_RV.log_softmax(-1)
    entropies_R = -(log_probs_RV.exp() * log_probs_RV).sum(-1)
    max_R, sum_R, weighted_R, label_R = sums_4R
    torch.testing.assert_close(max_R + sum_R.log(), logits_RV.logsumexp(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(sum_R.log() - weighted_R / sum_R, entropies_R, rtol=1e-13, atol=0)
    assert torch.equal(label_R, logits_RV.gather(-1, labels_R[:, None])[:, 0])


def test_the_models_own_operations_are_the_definition_too() -> None:
    for widths in CUTS.values():
        got, want = (run(one, widths, torch.float64, torch.float64) for one in (TORCH, eager()))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-15)


def test_without_entropy_its_sum_is_left_as_it_was() -> None:
    sums_4R = empty_sums(2, torch.float32, DEVICE)
    chunk_softmax.absorb(torch.randn(2, 9, device=DEVICE), torch.tensor([1, 20], device=DEVICE), sums_4R, False)
    assert not sums_4R[2].any() and sums_4R[1].all() and sums_4R[3, 0] and not sums_4R[3, 1]


def test_no_rows_are_no_work() -> None:
    nothing, labels = torch.empty(0, 9, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    chunk_softmax.absorb(nothing, labels, empty_sums(0, torch.float32, DEVICE), True)
    assert chunk_softmax.to_gradient(nothing, labels, nothing[:, 0], nothing[:, 0]).shape == (0, 9)


FAULTS = {
    "last_columns_lost": ("mask=column_C < num_columns", "mask=column_C < num_columns - 1"),
    "sum_not_scaled_to_the_new_maximum": ("total = total * shrink", "total = total"),
    "weighted_sum_not_shifted": ("(weighted + total * gap) * shrink", "weighted * shrink"),
    "label_of_the_next_column": ("logits_ptr + label, mask", "logits_ptr + label - 1, mask"),
    "label_of_another_chunk": ("is_here = (label >= 0) & (label < num_columns)", "is_here = label < num_columns"),
    "onehot_one_column_off": ("column_C == tl.load(labels_ptr", "column_C == 1 + tl.load(labels_ptr"),
    "weight_of_another_row": ("tl.load(d_losses_ptr + row)", "tl.load(d_losses_ptr)"),
    "last_gradients_not_written": ("mask=keep_C)", "mask=keep_C & (column_C < num_columns - 1))"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        assert_parity(with_fault(chunk_softmax, *fault, tmp_path), (20, 30, 14), torch.float32)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits() -> None:
    results = [run(of_module(chunk_softmax), (4096, 4096, 100), torch.bfloat16, torch.bfloat16) for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def refused(**changes: object) -> str:
    inputs = dict(
        logits_RC=torch.zeros(3, 8, device=DEVICE),
        labels_R=torch.zeros(3, dtype=torch.int64, device=DEVICE),
        sums_4R=torch.zeros(4, 3, device=DEVICE),
        with_entropy=True,
    )
    with pytest.raises(ValueError, match="absorb: ") as error:
        chunk_softmax.absorb(**{**inputs, **changes})
    return str(error.value)


def test_what_the_kernels_do_not_compute_is_refused_by_name() -> None:
    assert "contiguous, got (3, 8)" in refused(logits_RC=torch.zeros(8, 3).t())
    assert "got torch.float64" in refused(logits_RC=torch.zeros(3, 8, dtype=torch.float64))
    assert "labels are int64 [3]" in refused(labels_R=torch.zeros(3))
    assert "sums are [4, 3]" in refused(sums_4R=torch.zeros(3, 3))
    assert "sums are float32" in refused(sums_4R=torch.zeros(4, 3, dtype=torch.float64))
    labels, row = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    with pytest.raises(ValueError, match="to_gradient: one number for each of 3 rows"):
        chunk_softmax.to_gradient(torch.zeros(3, 8), labels, row, row[:2])


@pytest.mark.skipif(ON_GPU, reason="kernels run on the GPU here, not in the interpreter")
def test_bfloat16_in_the_interpreter_is_refused() -> None:
    assert "interpreter computes bfloat16 wrongly" in refused(logits_RC=torch.zeros(3, 8, dtype=torch.bfloat16))
