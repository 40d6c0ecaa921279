"""Cross entropy and entropy of logits that are never stored: made by some columns of the vocabulary at a time.

The forward pass makes one chunk of columns after another and keeps, for every row, a running maximum, the sum of
exponentials and the label's logit; the backward pass makes each chunk again and turns it into its gradient. Matrix
products are the library's. Cut by columns, not by rows: a chunk's gradient of the weight is then written once, the tp
ranks meet once however many chunks there are, and of a weight that is widened (``Numerics.fp32_head``) only a chunk is.
What grows from chunk to chunk is the gradient of the hidden states alone, in at least fp32.

Source of the running sums: Milakov and Gimelshein 2018 (arXiv 1805.02867).

Dims: R rows, D width, V vocabulary (of this tp rank), C columns of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimo_megatron.loss.chunk_softmax import TORCH, ChunkSoftmax, empty_sums, rescaled
from mimo_megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class Chunking:
    logits: int
    """Most that exist at a time, unless there are more rows."""
    softmax: ChunkSoftmax = TORCH
    excluded: tuple[int, ...] = ()
    """Tokens whose logits are minus infinity."""

    def columns(self, num_rows: int) -> int:
        """Of a chunk. The fewer rows, the more, so that products stay large; a multiple of 128 where it is above."""
        columns = max(self.logits // max(num_rows, 1), 1)
        return columns // 128 * 128 or columns


@dataclass(frozen=True)
class ImplicitLogits:
    """[R, V] logits as what they are made of: ``hidden_RD @ weight_VD.T``, computed in the dtype of ``hidden_RD``."""

    hidden_RD: Tensor
    """Whole on every tp rank."""
    weight_VD: Tensor
    """This tp rank's rows of the head, in any dtype."""
    chunking: Chunking

    def without(self, tokens: tuple[int, ...]) -> "ImplicitLogits":
        """The same, but for these tokens, which have no part in the distribution."""
        return replace(self, chunking=replace(self.chunking, excluded=tokens))


def implicit_token_losses(
    logits: ImplicitLogits, labels_R: Tensor, tp: Axis, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """[R] -log p(label), whole on every tp rank; and, where wanted, [R] entropies in nats, without a gradient.

    Gradients: that of the hidden states, summed over tp, and that of this rank's weight.
    """
    return _TokenLosses.apply(logits.hidden_RD, logits.weight_VD, labels_R, logits.chunking, tp, with_entropy)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        chunking: Chunking,
        tp: Axis,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        sums_4R = empty_sums(len(hidden_RD), wide, hidden_RD.device)
        for chunk in _chunks(hidden_RD, weight_VD, labels_R, chunking, tp):
            chunking.softmax.absorb(chunk.logits_RC, chunk.labels_R, sums_4R, with_entropy)
        max_R, sum_R, weighted_R, gap_R = _over_ranks(sums_4R, labels_R, len(weight_VD), tp)
        log_sum_R = sum_R.log()
        losses_R = log_sum_R - gap_R
        if chunking.excluded:
            excluded_E = torch.tensor(chunking.excluded, device=labels_R.device)
            losses_R.masked_fill_(torch.isin(labels_R, excluded_E), torch.inf)
        entropies_R = log_sum_R - weighted_R / sum_R if with_entropy else None
        if entropies_R is not None:
            ctx.mark_non_differentiable(entropies_R)
        ctx.save_for_backward(hidden_RD, weight_VD, labels_R, max_R + log_sum_R)
        ctx.chunking, ctx.tp = chunking, tp
        return losses_R, entropies_R

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_losses_R: Tensor, _d_entropies: None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_RD, weight_VD, labels_R, log_total_R = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        d_hidden_RD = torch.zeros_like(hidden_RD, dtype=log_total_R.dtype) if needs_hidden else None
        d_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        for chunk in _chunks(hidden_RD, weight_VD, labels_R, ctx.chunking, ctx.tp):
            d_logits_RC = ctx.chunking.softmax.to_gradient(chunk.logits_RC, chunk.labels_R, log_total_R, d_losses_R)
            if d_weight_VD is not None:
                _set_product(d_weight_VD[chunk.start : chunk.end], d_logits_RC.t(), hidden_RD)
            if d_hidden_RD is not None:
                _add_product(d_hidden_RD, d_logits_RC, chunk.weight_CD)
        if d_hidden_RD is not None:
            d_hidden_RD = d_hidden_RD.to(hidden_RD.dtype)
            if ctx.tp.size > 1:
                dist.all_reduce(d_hidden_RD, group=ctx.tp.group)
        return d_hidden_RD, d_weight_VD, None, None, None, None


@dataclass(frozen=True)
class _Chunk:
    start: int
    """Of its columns in this rank's vocabulary."""
    end: int
    weight_CD: Tensor
    logits_RC: Tensor
    """In memory that the next chunk takes."""
    labels_R: Tensor
    """int64, counted from the chunk's first column: those outside 0 to C are of other chunks or ranks."""


def _chunks(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, chunking: Chunking, tp: Axis) -> Iterator[_Chunk]:
    num_rows, local_vocabulary = len(hidden_RD), len(weight_VD)
    columns = min(chunking.columns(num_rows), local_vocabulary)
    memory = hidden_RD.new_empty(num_rows * columns)
    for start in range(0, local_vocabulary, columns):
        end, first = min(start + columns, local_vocabulary), tp.rank * local_vocabulary + start
        weight_CD = weight_VD[start:end].to(hidden_RD.dtype)
        logits_RC = memory[: num_rows * (end - start)].view(num_rows, end - start)
        torch.mm(hidden_RD, weight_CD.t(), out=logits_RC)
        excluded = [token - first for token in chunking.excluded if 0 <= token - first < end - start]
        if excluded:  # the lowest finite number has the same exponential as minus infinity, and no NaN behind it
            at_E = torch.tensor(excluded, device=logits_RC.device)
            logits_RC.index_fill_(-1, at_E, torch.finfo(logits_RC.dtype).min)
        yield _Chunk(start, end, weight_CD, logits_RC, labels_R - first)


def _over_ranks(sums_4R: Tensor, labels_R: Tensor, local_vocabulary: int, tp: Axis) -> tuple[Tensor, ...]:
    """[R] each, over all tp ranks: the maximum, the sum of exponentials, that sum weighted with (logit - maximum), and
    the label's logit - maximum."""
    local_R = labels_R - tp.rank * local_vocabulary
    is_here_R = (local_R >= 0) & (local_R < local_vocabulary)
    max_R = sums_4R[0].clone()
    if tp.size > 1:
        dist.all_reduce(max_R, op=dist.ReduceOp.MAX, group=tp.group)
    parts_3R = torch.stack([*rescaled(sums_4R, max_R), (sums_4R[3] - max_R).where(is_here_R, 0)])
    if tp.size > 1:
        dist.all_reduce(parts_3R, group=tp.group)
    return max_R, *parts_3R.unbind()


def _set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, rounded to the dtype of ``out``."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``. A product of half-precision numbers is rounded to them, the sum is not."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b
