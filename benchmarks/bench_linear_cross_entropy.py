"""The head's loss without a table of logits: memory, and CPU time against the share of slots that are trained.

    python benchmarks/bench_linear_cross_entropy.py                  # under a minute on one core

One pack of 2,048 slots, a head of 480 x 9,472, fp32. Each way takes the forward and backward pass from hidden states
and weight to both gradients:

- table: logits of the trained rows by one product, then the loss, as ``train.head_loss=logits``;
- chunks: by as many columns of the vocabulary at a time as make a 1/32 of the full table, in the forward pass and again
  in the backward, as ``train.head_loss=chunked``;
- row chunks: by 64 rows at a time, gradients taken in the forward pass, which needs the weight of every row's loss then
  and adds up the weight's gradient once a chunk: what Liger-Kernel does, here in PyTorch.

Memory is counted, not sampled: bytes of live tensors, of logits and of all that the pass makes.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import write_rows
from torch import Tensor

from mimo_megatron.loss.cross_entropy import Logits, token_losses, token_losses_and_entropies
from mimo_megatron.loss.implicit_logits import Chunking, ImplicitLogits
from mimo_megatron.parallel.mesh import Axis
from tests.tensor_meter import TensorMeter

SLOTS, WIDTH, VOCABULARY = 2048, 480, 37 * 256
LOGITS, ROW_CHUNK = SLOTS * VOCABULARY // 32, SLOTS // 32
ENTROPY_ROWS = 1024  # whose probabilities loss/cross_entropy.py makes at a time, beside a table
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
ONE = Axis(0, 1)
Pass = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From hidden states, weight, labels and weights of the rows to the loss and both gradients."""


class LogitsMeter(TensorMeter):
    """Counts what has a row for each trained token, or for each of a chunk, and a column for each token or each of a
    chunk."""

    def __init__(self, num_rows: int):
        super().__init__()
        columns = Chunking(LOGITS).columns(num_rows)
        self._heights = {num_rows, ROW_CHUNK, ENTROPY_ROWS}
        self._widths = {VOCABULARY, columns, VOCABULARY % columns}

    def count(self, *things: Any) -> None:
        tensors = [one for one in things if isinstance(one, Tensor) and one.dim() == 2]
        super().count(*(one for one in tensors if one.shape[0] in self._heights and one.shape[1] in self._widths))


def of_logits(make: Callable[[Tensor, Tensor], Logits], *, with_entropy: bool = False) -> Pass:
    def run(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = make(hidden_RD, weight_VD)
        if with_entropy:
            losses_R, _ = token_losses_and_entropies(logits, labels_R, ONE)
        else:
            losses_R = token_losses(logits, labels_R, ONE, overwrite=True)
        loss = (losses_R * weights_R).sum()
        return loss.detach(), *torch.autograd.grad(loss, (hidden_RD, weight_VD))

    return run


@torch.no_grad()
def by_rows(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, d_hidden_RD, d_weight_VD = torch.zeros(()), torch.empty_like(hidden_RD), torch.zeros_like(weight_VD)
    logits_NV = hidden_RD.new_empty(ROW_CHUNK, VOCABULARY)
    for start in range(0, len(hidden_RD), ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        torch.mm(hidden_RD[rows], weight_VD.t(), out=logits_NV)
        torch.log_softmax(logits_NV, -1, out=logits_NV)
        at_N1, weights_N1 = labels_R[rows, None], weights_R[rows, None]
        loss -= (logits_NV.gather(-1, at_N1) * weights_N1).sum()
        logits_NV.exp_().mul_(weights_N1).scatter_add_(-1, at_N1, -weights_N1)
        torch.mm(logits_NV, weight_VD, out=d_hidden_RD[rows])
        d_weight_VD.addmm_(logits_NV.t(), hidden_RD[rows])
    return loss, d_hidden_RD, d_weight_VD


def table(hidden_RD: Tensor, weight_VD: Tensor) -> Logits:
    return hidden_RD @ weight_VD.t()


def chunks(hidden_RD: Tensor, weight_VD: Tensor) -> Logits:
    return ImplicitLogits(hidden_RD, weight_VD, Chunking(LOGITS))


WAYS: dict[str, Pass] = {"table": of_logits(table), "chunks": of_logits(chunks), "row chunks": by_rows}
WITH_ENTROPY: dict[str, Pass] = {
    "table, entropy": of_logits(table, with_entropy=True),
    "chunks, entropy": of_logits(chunks, with_entropy=True),
}


@dataclass(frozen=True)
class Measured:
    seconds: float
    logits_bytes: int
    all_bytes: int


def measure(ways: dict[str, Pass], num_rows: int, rounds: int) -> dict[str, Measured]:
    """The least CPU time of ``rounds`` in which the ways take turns, after a counted pass of each."""
    draw = torch.Generator().manual_seed(1)
    hidden_RD = torch.randn(num_rows, WIDTH, generator=draw, requires_grad=True)
    weight_VD = (0.05 * torch.randn(VOCABULARY, WIDTH, generator=draw)).requires_grad_()
    labels_R = torch.randint(0, VOCABULARY, (num_rows,), generator=draw)
    inputs = hidden_RD, weight_VD, labels_R, torch.rand(num_rows, generator=draw)
    want, peaks = None, {}
    for name, run in ways.items():
        meters = LogitsMeter(num_rows), TensorMeter()
        with meters[0], meters[1]:
            got = run(*inputs)
        want = want or got
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        peaks[name] = tuple(meter.peak for meter in meters)
        del got
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.process_time()
            run(*inputs)
            seconds[name].append(time.process_time() - start)
    return {name: Measured(min(seconds[name]), *peaks[name]) for name in ways}


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    whole: dict[str, float] = {}
    for fraction in FRACTIONS:
        num_rows = round(SLOTS * fraction)
        for ways in (WAYS, WITH_ENTROPY) if fraction == 1 else (WAYS,):
            found = measure(ways, num_rows, rounds)
            of_table = next(iter(found.values()))
            for name, one in found.items():
                whole.setdefault(name, one.seconds)
                yield dict(
                    way=name,
                    trained_fraction=fraction,
                    cpu_seconds=f"{one.seconds:.3f}",
                    times_the_table=f"{one.seconds / of_table.seconds:.2f}",
                    per_row_of_all_trained=f"{one.seconds / fraction / whole[name]:.3f}",
                    logits_mb=f"{one.logits_bytes / 1e6:.2f}",
                    logits_of_full_table=f"{one.logits_bytes / (4 * SLOTS * VOCABULARY):.4f}",
                    all_mb=f"{one.all_bytes / 1e6:.1f}",
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(args.rounds):
        if not found:
            print("  ".join(f"{name:>22}" for name in row))
        print("  ".join(f"{value:>22}" for value in row.values()), flush=True)
        found.append(row)
    measured = ("mimo_megatron/loss", "benchmarks/bench_linear_cross_entropy.py")
    print(write_rows("linear-cross-entropy", found, measured, ("torch",), args.out))


if __name__ == "__main__":
    main()
