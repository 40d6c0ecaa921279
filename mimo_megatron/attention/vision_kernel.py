"""The Triton kernel of the vision encoder's attention, where it can run; refused by name where it cannot."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from mimo_megatron.errors import ConfigError

VisionBackend = Literal["reference", "sdpa", "varlen", "triton"]
VisionKernel = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


def vision_kernel() -> VisionKernel:
    """``mimo_triton_kernels.vision_attention``: out_PNH from qkv_P3NH, the angles' cosines and sines, and bounds."""
    try:
        from mimo_triton_kernels import launching, vision_attention
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        remedy = "pip install 'mimo-megatron[kernels]', or set train.vision_attention=sdpa"
        raise ConfigError(f"train.vision_attention=triton, and triton is not installed: {remedy}") from None
    if not launching.can_run():
        raise ConfigError(
            "train.vision_attention=triton, and torch sees no GPU: set train.vision_attention=sdpa, which runs anywhere"
        )
    return vision_attention.vision_attention
