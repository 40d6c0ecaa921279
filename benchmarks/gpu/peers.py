"""What other libraries bring for the same work, where they import: norms, the head's loss.

Each function gives a way to call, or why it cannot run here (``Unavailable``), which the tables print. Names and
arguments are those of the libraries' public interfaces; none of these has run here on a GPU.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Norm = Callable[[Tensor, Tensor], Tensor]
"""out [R, D] of x [R, D] and the weight [D]."""
HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The sum of the rows' losses, from hidden states [R, D], the head's weight [V, D] and labels [R]."""


class Unavailable(Exception):
    """Why a way cannot run here."""


def or_why_not(make: Callable[[], Any], device: torch.device) -> Any:
    """What ``make`` gives, or the ``Unavailable`` that it raises; all peers of this file need a GPU."""
    try:
        if device.type != "cuda":
            raise Unavailable("needs a GPU")
        return make()
    except Unavailable as reason:
        return reason


def needs(module: str) -> None:
    """``Unavailable`` where it is not installed, or the package around it is a build for another torch or GPU."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    except Exception as error:
        raise Unavailable(f"does not import: {type(error).__name__}: {error}") from error
    if found is None:
        raise Unavailable(f"{module} is not installed")


def loaded(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a build for another torch or GPU: whatever it raises is the row's reason
        raise Unavailable(f"does not import: {type(error).__name__}: {error}") from error


def norms(device: torch.device, dtype: torch.dtype, width: int, eps: float) -> dict[str, Norm | Unavailable]:
    makers = {
        "transformer-engine": lambda: _engine_norm(device, dtype, width, eps),
        "apex": lambda: _apex_norm(width, eps),
    }
    return {name: or_why_not(make, device) for name, make in makers.items()}


def _engine_norm(device: torch.device, dtype: torch.dtype, width: int, eps: float) -> Norm:
    def load() -> Any:
        from transformer_engine.pytorch import RMSNorm

        return RMSNorm

    needs("transformer_engine.pytorch")
    module = loaded(load)(width, eps=eps, device=device, dtype=dtype)
    return lambda x_RD, weight_D: torch.func.functional_call(module, {"weight": weight_D}, (x_RD,))


def _apex_norm(width: int, eps: float) -> Norm:
    def load() -> Any:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine

    needs("apex.normalization")
    run = loaded(load)
    return lambda x_RD, weight_D: run(x_RD, weight_D, (width,), eps)


def liger_head_loss() -> HeadLoss:
    """Liger-Kernel's fused linear cross entropy: by rows, gradients taken in the forward pass."""

    def load() -> Any:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss

    needs("liger_kernel")
    module = loaded(load)(reduction="sum")
    return lambda hidden_RD, weight_VD, labels_R: module(weight_VD, hidden_RD, labels_R)
