"""What a cross entropy does to a chunk of logits between two matrix products: reference, Triton kernels, public ops.

A vocabulary is taken by chunks of columns, so that its logits are never all in memory. ``absorb`` reads a chunk once
and takes it into four sums of each row; ``to_gradient`` reads it once more and writes its gradient over it. PyTorch's
operations do the same in some ten passes, and in fp32 beside half-precision logits. What sums over ranks that share the
vocabulary is the caller's, between the two.

The sums of a row, [4, R] in fp32, over the columns absorbed so far: the largest logit m; the sum of exp(x - m); the sum
of exp(x - m) (x - m), for the entropy; the label's logit, once its chunk has come.

Every row is one program's, without atomics: two runs give the same bits.

Dims: R rows, C columns of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimo_triton_kernels.launching import Blocks, check_device, launch

BLOCKS = Blocks(rows=1, step=4096, num_warps=8, num_stages=1)
"""16 logits a thread; docs/kernels.md has what compilers make of it. Not timed yet."""


# ---- 1. Reference: the definitions. At least fp32 inside. ----


def absorb_reference(logits_RC: Tensor, labels_R: Tensor, sums_4R: Tensor) -> Tensor:
    """The sums with the chunk taken in."""
    x_RC = logits_RC.to(sums_4R.dtype)
    max_R = torch.maximum(sums_4R[0], x_RC.amax(-1))
    before_R, t_RC = (sums_4R[0] - max_R).clamp(min=-1e4), (x_RC - max_R[:, None]).clamp(min=-1e4)
    sum_R = sums_4R[1] * before_R.exp() + t_RC.exp().sum(-1)
    weighted_R = (sums_4R[2] + sums_4R[1] * before_R) * before_R.exp() + (t_RC.exp() * t_RC).sum(-1)
    is_here_R = (labels_R >= 0) & (labels_R < x_RC.shape[-1])
    label_R = x_RC.gather(-1, labels_R.where(is_here_R, 0)[:, None])[:, 0]
    return torch.stack([max_R, sum_R, weighted_R, label_R.where(is_here_R, sums_4R[3])])


def to_gradient_reference(logits_RC: Tensor, labels_R: Tensor, log_total_R: Tensor, d_losses_R: Tensor) -> Tensor:
    x_RC, columns_C = logits_RC.to(log_total_R.dtype), torch.arange(logits_RC.shape[-1], device=labels_R.device)
    probs_RC = torch.exp(x_RC - log_total_R[:, None]) - (columns_C == labels_R[:, None]).to(x_RC.dtype)
    return (probs_RC * d_losses_R[:, None]).to(logits_RC.dtype)


# ---- 2. Kernels. Program: one row. ----


@triton.jit
def _absorb(logits_ptr, labels_ptr, sums_ptr, num_rows, num_columns, HAS_ENTROPY: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * num_columns
    largest, total = tl.load(sums_ptr + row), tl.load(sums_ptr + num_rows + row)
    weighted = tl.load(sums_ptr + 2 * num_rows + row)
    for first in range(0, num_columns, STEP):
        column_C = first + tl.arange(0, STEP)
        x_C = tl.load(logits_ptr + column_C, mask=column_C < num_columns, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x_C, 0))
        # What is far below the maximum has the exponential 0, as -1e4 has, whose product with 0 is no NaN.
        gap, t_C = tl.maximum(largest - new_largest, -1e4), tl.maximum(x_C - new_largest, -1e4)
        shrink, exp_C = tl.exp(gap), tl.exp(t_C)
        if HAS_ENTROPY:
            weighted = (weighted + total * gap) * shrink + tl.sum(exp_C * t_C, 0)
        total = total * shrink + tl.sum(exp_C, 0)
        largest = new_largest
    tl.store(sums_ptr + row, largest)
    tl.store(sums_ptr + num_rows + row, total)
    tl.store(sums_ptr + 2 * num_rows + row, weighted)
    label = tl.load(labels_ptr + row)
    is_here = (label >= 0) & (label < num_columns)
    label_logit = tl.load(logits_ptr + label, mask=is_here, other=0.0).to(tl.float32)
    tl.store(sums_ptr + 3 * num_rows + row, label_logit, mask=is_here)


@triton.jit
def _to_gradient(logits_ptr, labels_ptr, log_total_ptr, d_losses_ptr, num_columns, num_blocks, STEP: tl.constexpr):
    # d loss / d logit = softmax - onehot(label)
    row, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    column_C = block * STEP + tl.arange(0, STEP)
    at_C, keep_C = logits_ptr + row.to(tl.int64) * num_columns + column_C, column_C < num_columns
    x_C = tl.load(at_C, mask=keep_C, other=0.0).to(tl.float32)
    probs_C = tl.exp(x_C - tl.load(log_total_ptr + row))
    is_label_C = column_C == tl.load(labels_ptr + row)
    d_C = (probs_C - is_label_C.to(tl.float32)) * tl.load(d_losses_ptr + row)
    tl.store(at_C, d_C.to(logits_ptr.dtype.element_ty), mask=keep_C)


# ---- 3. Public ops: check their contracts, then run. There is no autograd: a caller's function has both. ----


def absorb(logits_RC: Tensor, labels_R: Tensor, sums_4R: Tensor, with_entropy: bool) -> None:
    """Take a chunk into ``sums_4R``, in place; without ``with_entropy`` the third sum is left as it is.

    ``labels_R`` are int64, counted from the chunk's first column; others than 0 to C are of other chunks. ValueError
    where a shape, a dtype or the device is none that the kernel computes.
    """
    num_rows, num_columns = _checked("absorb", logits_RC, labels_R, sums_4R)
    if sums_4R.shape != (4, num_rows) or not sums_4R.is_contiguous():
        raise ValueError(f"absorb: sums are [4, {num_rows}], contiguous, got {tuple(sums_4R.shape)}")
    if num_rows:
        launch(
            _absorb, num_rows, BLOCKS, logits_RC, labels_R.to(torch.int32), sums_4R, num_rows, num_columns,
            HAS_ENTROPY=with_entropy, STEP=BLOCKS.step,
        )  # fmt: skip


def to_gradient(logits_RC: Tensor, labels_R: Tensor, log_total_R: Tensor, d_losses_R: Tensor) -> Tensor:
    """The logits' memory, with (softmax - onehot(label)) x ``d_losses_R`` in it. ``log_total_R`` is the log of the sum
    of exp(logit) over the whole vocabulary, float32; labels and errors are those of ``absorb``."""
    num_rows, num_columns = _checked("to_gradient", logits_RC, labels_R, log_total_R)
    if log_total_R.shape != (num_rows,) or d_losses_R.shape != (num_rows,):
        shapes = tuple(log_total_R.shape), tuple(d_losses_R.shape)
        raise ValueError(f"to_gradient: one number for each of {num_rows} rows is wanted, got {shapes}")
    num_blocks = triton.cdiv(num_columns, BLOCKS.step)
    if num_rows:
        launch(
            _to_gradient, num_rows * num_blocks, BLOCKS, logits_RC, labels_R.to(torch.int32), log_total_R.contiguous(),
            d_losses_R.float().contiguous(), num_columns, num_blocks, STEP=BLOCKS.step,
        )  # fmt: skip
    return logits_RC


def _checked(op: str, logits_RC: Tensor, labels_R: Tensor, wide: Tensor) -> tuple[int, int]:
    if logits_RC.dim() != 2 or not logits_RC.is_contiguous():
        raise ValueError(f"{op}: logits are [R, C], contiguous, got {tuple(logits_RC.shape)}, {logits_RC.stride()}")
    if logits_RC.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{op}: logits are float32, float16 or bfloat16, got {logits_RC.dtype}")
    if labels_R.shape != logits_RC.shape[:1] or labels_R.dtype != torch.int64:
        raise ValueError(f"{op}: labels are int64 [{len(logits_RC)}], got {labels_R.dtype} {tuple(labels_R.shape)}")
    if wide.dtype != torch.float32:
        raise ValueError(f"{op}: sums are float32, got {wide.dtype}")
    check_device(op, logits_RC, labels_R, wide)
    num_rows, num_columns = logits_RC.shape
    return num_rows, num_columns
