"""What happens to a chunk of logits between its two matrix products: PyTorch's operations, or a Triton kernel each way.

A row's sums, over the columns absorbed so far, are four numbers: the largest logit m; the sum of exp(x - m); the sum of
exp(x - m) (x - m), which the entropy needs; the label's logit, once its chunk has been seen.

Dims: R rows, C columns of a chunk.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mimo_megatron.errors import ConfigError

Backend = Literal["torch", "triton"]
_FARTHEST = -1e4
"""exp of it is 0 in fp64 too; products with what is further below a maximum stay finite."""


class Absorb(Protocol):
    def __call__(self, logits_RC: Tensor, labels_R: Tensor, sums_4R: Tensor, with_entropy: bool) -> None:
        """Take a chunk into ``sums_4R``. The logits may be overwritten. ``labels_R`` count from the first column."""


class ToGradient(Protocol):
    def __call__(self, logits_RC: Tensor, labels_R: Tensor, log_total_R: Tensor, d_losses_R: Tensor) -> Tensor:
        """[R, C] gradient of the logits, (softmax - onehot(label)) x ``d_losses_R``, in their dtype and memory where it
        can be. ``log_total_R``: log of the sum of exp(logit) over the whole vocabulary."""


@dataclass(frozen=True)
class ChunkSoftmax:
    absorb: Absorb
    to_gradient: ToGradient


def empty_sums(num_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[4, R] of no columns. The maximum is finite, so that differences to it are numbers."""
    sums_4R = torch.zeros(4, num_rows, dtype=dtype, device=device)
    sums_4R[0] = torch.finfo(dtype).min
    return sums_4R


def rescaled(sums_4R: Tensor, max_R: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the weighted sum with respect to a maximum that is at least as large."""
    gap_R = (sums_4R[0] - max_R).clamp_(min=_FARTHEST)
    scale_R = gap_R.exp()
    return sums_4R[1] * scale_R, (sums_4R[2] + sums_4R[1] * gap_R) * scale_R


def _absorb(logits_RC: Tensor, labels_R: Tensor, sums_4R: Tensor, with_entropy: bool) -> None:
    # log_softmax is one call where maximum, difference, exponential and sum are four, and gives what they would.
    wide, chunk_4R = sums_4R.dtype, torch.zeros_like(sums_4R)
    at_R1, is_here_R = _places(labels_R, logits_RC.shape[-1])
    chunk_4R[0] = logits_RC.amax(-1)
    chunk_4R[3] = logits_RC.gather(-1, at_R1).squeeze(-1)
    log_probs_RC = torch.log_softmax(logits_RC, -1, dtype=wide, out=logits_RC if logits_RC.dtype == wide else None)
    log_sum_R = -log_probs_RC.amax(-1)
    chunk_4R[1] = log_sum_R.exp()
    if with_entropy:
        mean_R = log_probs_RC.exp().mul_(log_probs_RC).sum(-1)
        chunk_4R[2] = chunk_4R[1] * (mean_R + log_sum_R)
    max_R = torch.maximum(sums_4R[0], chunk_4R[0])
    (before_R, weighted_before_R), (more_R, weighted_more_R) = (rescaled(one, max_R) for one in (sums_4R, chunk_4R))
    label_R = torch.where(is_here_R, chunk_4R[3], sums_4R[3])
    torch.stack([max_R, before_R + more_R, weighted_before_R + weighted_more_R, label_R], out=sums_4R)


def _to_gradient(logits_RC: Tensor, labels_R: Tensor, log_total_R: Tensor, d_losses_R: Tensor) -> Tensor:
    at_R1, is_here_R = _places(labels_R, logits_RC.shape[-1])
    wide_RC = logits_RC.to(log_total_R.dtype)  # itself, where it is as wide
    wide_RC.sub_(log_total_R.unsqueeze(-1)).exp_().mul_(d_losses_R.unsqueeze(-1))
    wide_RC.scatter_add_(-1, at_R1, -(d_losses_R * is_here_R).unsqueeze(-1))
    return wide_RC if wide_RC is logits_RC else logits_RC.copy_(wide_RC)


def _places(labels_R: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """[R, 1] the label's column, 0 where it is in none of the chunk; and [R] whether it is."""
    is_here_R = (labels_R >= 0) & (labels_R < num_columns)
    return labels_R.where(is_here_R, 0).unsqueeze(-1), is_here_R


TORCH = ChunkSoftmax(_absorb, _to_gradient)


def chunk_softmax(backend: Backend) -> ChunkSoftmax:
    """``ConfigError`` where the kernels are asked for and cannot run."""
    if backend == "torch":
        return TORCH
    try:
        from mimo_triton_kernels import chunk_softmax as kernels
        from mimo_triton_kernels import launching
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        remedy = "pip install 'mimo-megatron[kernels]', or set train.head_loss=chunked"
        raise ConfigError(f"train.head_loss=triton, and triton is not installed: {remedy}") from None
    if not launching.can_run():
        raise ConfigError(
            "train.head_loss=triton, and torch sees no GPU: set train.head_loss=chunked, which runs anywhere"
        )
    return ChunkSoftmax(kernels.absorb, kernels.to_gradient)
