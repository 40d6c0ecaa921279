"""The norm of all gradients, and their scaling, on a GPU without apex and Transformer Engine.

Megatron then takes the norm of one tensor after another and waits for each on the host
(``local_multi_tensor_l2_norm`` of megatron/core/utils.py), and scales through a copy. PyTorch does either in a few
kernels for all tensors.
"""

from collections.abc import Sequence

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor

from mimo_megatron import platform


def install() -> None:
    """In place of megatron's fallbacks on a GPU; nothing where other kernels are there, or on the CPU."""
    if platform.current().is_cpu or clip_grads.l2_norm_impl is not utils.local_multi_tensor_l2_norm:
        return
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = l2_norm, scale


def l2_norm(
    _chunk_size: int, _noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], _per_tensor: bool
) -> tuple[Tensor, None]:
    """[1], of all tensors of the one list together."""
    (tensors,) = tensor_lists
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).view(1), None


def scale(_chunk_size: int, _noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], factor: float) -> None:
    """The second list becomes the first times ``factor``; megatron gives the same list twice."""
    source, target = tensor_lists
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(source, target, strict=True))
    torch._foreach_mul_(target, factor)
