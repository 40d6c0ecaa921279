"""The head's loss, from hidden states and the head's weight: every way that ``train.head_loss`` names.

Dims: R rows, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.case import FACTOR, Case, Work
from benchmarks.gpu.setting import Setting
from mimo_megatron.loss.chunk_softmax import chunk_softmax
from mimo_megatron.loss.cross_entropy import token_losses
from mimo_megatron.loss.implicit_logits import Chunking, ImplicitLogits
from mimo_megatron.parallel.mesh import Axis

ONE = Axis(0, 1)
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[R] losses of hidden states [R, D], weight [V, D] and labels [R]."""


def plain_losses(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> Tensor:
    """The definition."""
    logits_RV = hidden_RD @ weight_VD.t()
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    return functional.cross_entropy(logits_RV.to(wide), labels_R, reduction="none")


def table(hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> Tensor:
    """``train.head_loss=logits``."""
    return token_losses(hidden_RD @ weight_VD.t(), labels_R, ONE, overwrite=True)


def in_chunks(kind: str, head_logits: int) -> Losses:
    """``train.head_loss=chunked`` or ``triton`` with ``train.head_logits``."""
    chunking = Chunking(head_logits, chunk_softmax("triton" if kind == "triton" else "torch"))
    return lambda hidden_RD, weight_VD, labels_R: token_losses(
        ImplicitLogits(hidden_RD, weight_VD, chunking), labels_R, ONE
    )


def small_head(setting: Setting) -> Case:
    """Chunks that do not divide the vocabulary, in a dtype in which the products round."""
    rows, width, vocabulary = (9, 24, 517) if setting.is_rehearsal else (1021, 1024, 37_921)
    head_logits = 2304 if setting.is_rehearsal else 2**22
    labels_R = torch.randint(0, vocabulary, (rows,), generator=setting.generator(), device=setting.device)

    def draw() -> list[Tensor]:
        generator = setting.generator()
        hidden_RD = setting.normal(rows, width, generator=generator)
        return [hidden_RD, setting.normal(vocabulary, width, generator=generator) * width**-0.5]

    def way(losses: Losses) -> Callable[..., Tensor]:
        return lambda hidden_RD, weight_VD: losses(hidden_RD, weight_VD, labels_R)

    ways = {
        "logits": way(table),
        "chunked": way(in_chunks("chunked", head_logits)),
        "triton": way(in_chunks("triton", head_logits)),
        "eager": way(plain_losses),
    }
    return Case(
        "head's loss", f"{rows:,} x {width:,} x {vocabulary:,}", draw, way(plain_losses), ways,
        dict.fromkeys(("logits", "chunked", "triton"), FACTOR), "eager", Work(0, 0, 0, 0), name="head's loss",
    )  # fmt: skip
