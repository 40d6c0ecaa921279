"""Run the matrix: one process first, then every case against it, and a verdict for each."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessException

from mimo_megatron.prove.cases import FEATURES, ONE, Case, Refusal, refusal
from mimo_megatron.prove.measure import Errors, errors, merged, outcome
from mimo_megatron.prove.ranks import run_ranks

_ANOTHER_WAY = (
    "recompute", "vision_recompute", "offload_activations", "head_loss", "head_logits", "overlap_grad_reduce",
    "overlap_param_gather", "ddp_bucket_size",
)  # fmt: skip
"""Keys of ``train`` that change how a step is computed, and nothing of its result."""


@dataclass(frozen=True)
class Tolerance:
    """Largest error that counts as equal, some times what was measured over the whole matrix.

    Of the planted faults the smallest one changes the fp64 loss by 2e-5.
    """

    loss: float
    gradient: float
    step: float


TOLERANCES = {
    # fp64 in another order of summation: at most 8e-15 seen. The step is the trainer's, in fp32: at most 3e-6 seen,
    # of the reward model, whose updates are the smallest.
    "fp32": Tolerance(loss=1e-12, gradient=1e-12, step=1e-5),
    # Activations rounded to 8 bits: at most 5e-5, 1.4e-2 and 4e-3 seen.
    "bf16": Tolerance(loss=3e-4, gradient=5e-2, step=3e-2),
    # FP8 products in fp64. In the fp32 of the step a sum in another order may round one number to the other side of an
    # FP8 step, which is 6 % wide (docs/fp8.md).
    "fp8": Tolerance(loss=1e-12, gradient=1e-12, step=2e-2),
}


@dataclass(frozen=True)
class Verdict:
    case: Case
    errors: Errors | None
    """None where the ranks failed; ``problem`` says why."""
    problem: str
    """Empty where the case equals one process."""
    seconds: float


def prove(cases: Sequence[Case], scratch: Path, fault: str = "") -> Iterator[Verdict]:
    """A verdict for every case, as they come. References of one process are kept in ``scratch``."""
    for case in cases:
        began = time.perf_counter()
        reference = _reference(case, scratch)
        found, problem = None, ""
        try:
            found = merged(run_ranks(errors, case.layout.ranks, case, reference, fault), reference)
            problem = difference(found, TOLERANCES[case.feature.precision])
        except (RuntimeError, OSError, TimeoutError, ProcessException) as error:
            problem = f"the ranks failed: {_last_line(error)}"
        yield Verdict(case, found, problem, time.perf_counter() - began)


def refused(refusals: Sequence[Refusal]) -> Iterator[tuple[Refusal, str]]:
    """The words with which each is refused; empty where it is not, or not by the key that it must name."""
    features = {feature.name: feature for feature in FEATURES}
    for one in refusals:
        said = refusal(one.layout, features[one.feature])
        yield one, said if one.names in said else ""


def difference(found: Errors, tolerance: Tolerance) -> str:
    """What differs from one process, in words that name the likely part; empty where nothing does."""
    if found.missing:
        return f"no rank holds {found.missing[0]} and {len(found.missing) - 1} more"
    wrong = sorted(name for name, error in found.gradients.items() if not error < tolerance.gradient)
    moved = sorted(name for name, error in found.step.items() if not error < tolerance.step)
    error = found.worst_gradient[0]
    if found.count:
        return f"what is divided by: the count of trained tokens differs by {found.count:g}"
    if not found.loss < tolerance.loss:
        return f"the forward pass: the loss differs by {found.loss:.1e}, and {len(wrong)} gradients"
    if wrong:
        return f"{_kind(wrong, len(found.gradients))}: {len(wrong)} gradients differ, by up to {error:.1e}"
    if not found.grad_norm < tolerance.step:
        return f"what the gradient norm counts: it differs by {found.grad_norm:.1e}, all gradients are right"
    if moved:
        return f"the optimizer: {len(moved)} updates differ, {moved[0]} among them, all gradients are right"
    return ""


def _kind(wrong: Sequence[str], num_all: int) -> str:
    kinds: list[tuple[Callable[[str], bool], str]] = [
        (lambda name: name.startswith(("vision.", "projector.")), "how the encoder's gradient is summed over ranks"),
        (lambda name: "norm" in name, "the sum of the norms' gradients over tp"),
        (lambda name: ".mtp." in name, "multi-token prediction"),
        (lambda name: "embedding" in name or "output_layer" in name, "embedding and head"),
    ]
    for belongs, words in kinds:
        if all(belongs(name) for name in wrong):
            return words
    return "every gradient: the count or the scale" if len(wrong) == num_all else "the backward pass"


def _reference(case: Case, scratch: Path) -> Path:
    """The file with one process's outcome of the case's feature, nothing computed again and all logits in a table."""
    train = {key: value for key, value in case.feature.train.items() if key not in _ANOTHER_WAY}
    feature = dataclasses.replace(case.feature, train=train)
    path = scratch / f"{FEATURES.index(case.feature)}.pt"
    if not path.exists():
        torch.save(run_ranks(outcome, 1, Case(ONE, feature))[0], path)
    return path


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
