"""The head's loss at the sizes of training: time and memory of every way, by the share of slots that are trained.

Each call goes from hidden states and weight to the sum of the losses and both gradients. Two measures of memory: bytes
of logits as the operations make them, counted by their shapes; and, on a GPU, the allocator's peak beside both
gradients, which sees what is inside a kernel's call too. Dims: R rows, D width, V vocabulary.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import compiled
from benchmarks.gpu.correctness import is_fatal
from benchmarks.gpu.head_cases import in_chunks, plain_losses, table
from benchmarks.gpu.kernels import MOST_DIFFERENCE
from benchmarks.gpu.peers import HeadLoss, Unavailable, liger_head_loss, or_why_not
from benchmarks.gpu.setting import NO_TIME, Bench, Setting
from benchmarks.gpu.timing import measure, relative_error
from benchmarks.gpu.writing import Save
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.loss.implicit_logits import Chunking
from tests.tensor_meter import TensorMeter

FRACTIONS = (1.0, 0.5, 0.25, 0.125)
LATE = "torch.compile"
"""Compiled for each number of rows: after all others, and where all slots are trained only."""


class LogitsMeter(TensorMeter):
    """Counts tensors with a column for each token, or for each of a chunk, and rows of the pack: not the weight's."""

    def __init__(self, num_rows: int, width: int, widths: set[int]) -> None:
        super().__init__()
        self._num_rows, self._width, self._widths = num_rows, width, widths

    def count(self, *things: Any) -> None:
        tensors = [one for one in things if isinstance(one, Tensor) and one.dim() == 2]
        super().count(*(one for one in tensors if self._is_logits(*one.shape)))

    def _is_logits(self, height: int, width: int) -> bool:
        return height <= self._num_rows and height != self._width and width in self._widths


def section(bench: Bench, save: Save) -> None:
    model: ModelConfig = bench.kept["packs"][0].config.model
    sizes = bench.setting.sizes
    for is_late, fractions in ((False, FRACTIONS), (True, FRACTIONS[:1])):
        for fraction in fractions:
            one = Pass(model, round(sizes.head_slots * fraction), bench.setting)
            want = one.run(_summed(table))
            for way, head_logits, losses in ways(bench.setting):
                if (way == LATE) is is_late:
                    save(rows=[row(way, head_logits, losses, fraction, one, want, bench)])
            del one, want
            gc.collect()


def ways(setting: Setting) -> Iterator[tuple[str, int | None, HeadLoss | Unavailable]]:
    """(way, ``train.head_logits``, the sum of losses)."""
    yield "logits", None, _summed(table)
    for head_logits in setting.sizes.head_logits:
        for way in ("triton", "chunked"):
            yield way, head_logits, _summed(in_chunks(way, head_logits))
    yield "liger", None, or_why_not(liger_head_loss, setting.device)
    yield LATE, None, compiled(setting, _summed(plain_losses))


def _summed(losses: Callable[[Tensor, Tensor, Tensor], Tensor]) -> HeadLoss:
    return lambda hidden_RD, weight_VD, labels_R: losses(hidden_RD, weight_VD, labels_R).sum()


class Pass:
    """The inputs of one share of trained slots, and the way from them to the loss and both gradients."""

    def __init__(self, model: ModelConfig, num_rows: int, setting: Setting) -> None:
        self.num_rows, self.width, self.vocabulary = num_rows, model.text.width, model.text.vocab_size
        generator = setting.generator()
        self.hidden_RD = setting.normal(num_rows, self.width, generator=generator).requires_grad_()
        weight_VD = setting.normal(self.vocabulary, self.width, generator=generator) * self.width**-0.5
        self.weight_VD = weight_VD.requires_grad_()
        self.labels_R = torch.randint(0, self.vocabulary, (num_rows,), generator=generator, device=setting.device)
        self.setting = setting

    def run(self, summed: HeadLoss) -> tuple[Tensor, ...]:
        loss = summed(self.hidden_RD, self.weight_VD, self.labels_R)
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden_RD, self.weight_VD))

    @property
    def table_bytes(self) -> int:
        """Of the logits of all rows in the measured dtype."""
        return self.num_rows * self.vocabulary * self.setting.dtype.itemsize

    def logits_bytes(self, summed: HeadLoss, head_logits: int | None) -> int:
        columns = Chunking(head_logits).columns(self.num_rows) if head_logits else self.vocabulary
        with LogitsMeter(self.num_rows, self.width, {self.vocabulary, columns, self.vocabulary % columns}) as meter:
            self.run(summed)
        return meter.peak

    def beside_gradients_bytes(self, summed: HeadLoss) -> int | None:
        if not self.setting.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(summed)
        gradients = sum(one.numel() * one.element_size() for one in (self.hidden_RD, self.weight_VD))
        return torch.cuda.max_memory_allocated() - before - gradients


def row(
    way: str, head_logits: int | None, summed: HeadLoss | Unavailable, fraction: float, one: Pass,
    want: tuple[Tensor, ...], bench: Bench,
) -> dict[str, Any]:  # fmt: skip
    head = {"way": way, "head_logits": head_logits, "fraction": fraction, "rows": one.num_rows}
    if isinstance(summed, Unavailable):
        return {**head, "absent": str(summed)}
    if not bench.has_time_for(way):
        return {**head, "absent": NO_TIME}
    try:
        got = one.run(summed)
        difference = max(relative_error(mine, theirs) for mine, theirs in zip(got, want, strict=True))
        del got
        if not difference <= MOST_DIFFERENCE[bench.setting.dtype]:
            return {**head, "failed": f"loss or a gradient is {difference:.2e} from that of the table"}
        # Counted where all slots are trained: with fewer, a chunk may have the shape of hidden states. What a compiler
        # makes is not seen as operations.
        counted = one.logits_bytes(summed, head_logits) if fraction == 1 and way != LATE else None
        allocated = one.beside_gradients_bytes(summed)
        timing = measure(lambda: one.run(summed), bench.setting)
    except Exception as error:
        if is_fatal(error, bench.setting.synchronize):
            raise
        return {**head, "failed": f"{type(error).__name__}: {error}"[:500]}
    memory = {"table_bytes": one.table_bytes, "logits_bytes": counted, "beside_gradients_bytes": allocated}
    return {**head, **timing.row(), "difference": difference, **memory}
