"""The Triton kernel of the vision encoder's attention, where it can run; refused by name where it cannot."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from mimo_megatron.errors import ConfigError

VisionBackend = Literal["reference", "sdpa", "varlen", "flash", "triton"]
VisionKernel = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


def vision_kernel() -> VisionKernel:
    """``mimo_triton_kernels.vision_attention``: out_PNH from qkv_P3NH, the angles' cosines and sines, and bounds."""
    check_kernels_run("train.vision_attention")
    from mimo_triton_kernels.vision_attention import vision_attention

    return vision_attention


def check_kernels_run(key: str) -> None:
    """Nothing where this machine runs Triton's kernels, else a ``ConfigError`` about the recipe's ``key``."""
    try:
        from mimo_triton_kernels import launching
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        remedy = f"pip install 'mimo-megatron[kernels]', or set {key}=sdpa"
        raise ConfigError(f"{key}=triton, and triton is not installed: {remedy}") from None
    if not launching.can_run():
        raise ConfigError(f"{key}=triton, and torch sees no GPU: set {key}=sdpa, which runs anywhere")
