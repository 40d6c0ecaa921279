"""Pixels as other models take them: normalised one by one, where ours fold that into the patch embedding."""

import torch
from torch import Tensor

from mimo_megatron.model.patch_embed import PIXEL_MEAN, PIXEL_STD


def normalized(patches_PC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(pixel / 255 - mean) / std of whole patches, channel by channel, computed in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    values_PC = patches_PC.to(wide) / 255
    mean_C, std_C = (
        torch.tensor(values, dtype=wide).repeat_interleave(values_PC.shape[1] // 3)
        for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return ((values_PC - mean_C) / std_C).to(dtype)
