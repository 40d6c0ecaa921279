"""Cross entropy of rows whose vocabulary is split over the tp axis.

Dims: R rows, V vocabulary. Accumulates in at least fp32; fp64 in gives fp64 out.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.parallel.mesh import Axis


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, labels_R: Tensor, tp: Axis) -> Tensor:
        shifted_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32), copy=True)
        max_R = shifted_RV.amax(-1) if shifted_RV.shape[0] else shifted_RV.new_empty(0)
        if tp.size > 1:
            dist.all_reduce(max_R, op=dist.ReduceOp.MAX, group=tp.group)
        shifted_RV.sub_(max_R.unsqueeze(-1))
        local_R = labels_R - tp.rank * logits_RV.shape[-1]
        is_here_R = (local_R >= 0) & (local_R < logits_RV.shape[-1])
        local_R = local_R.where(is_here_R, 0)
        own_R = shifted_RV.gather(-1, local_R.unsqueeze(-1)).squeeze(-1) * is_here_R
        exp_RV = shifted_RV.exp_()
        sums_2R = torch.stack((exp_RV.sum(-1), own_R))
        if tp.size > 1:
            dist.all_reduce(sums_2R, group=tp.group)
        total_R, own_R = sums_2R.unbind()
        ctx.save_for_backward(exp_RV.div_(total_R.unsqueeze(-1)), local_R, is_here_R)
        ctx.dtype = logits_RV.dtype
        return total_R.log() - own_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # d loss / d logit = softmax - onehot(label)
        (d_losses_R,) = grads
        softmax_RV, local_R, is_here_R = ctx.saved_tensors
        d_logits_RV = softmax_RV * d_losses_R.unsqueeze(-1)
        d_logits_RV.scatter_add_(-1, local_R.unsqueeze(-1), -(d_losses_R * is_here_R).unsqueeze(-1))
        return d_logits_RV.to(ctx.dtype), None, None


def token_losses(logits_RV: Tensor, labels_R: Tensor, tp: Axis) -> Tensor:
    """[R] -log p(label). ``logits_RV`` holds this tp rank's share of the vocabulary; the result is whole on every rank.

    Gradient: that of this rank's logits.
    """
    return _TokenLosses.apply(logits_RV, labels_R, tp)
