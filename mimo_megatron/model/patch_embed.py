"""The vision encoder's first layer, from raw pixels: normalisation and a still's two equal frames are in its weights.

``((pixel / 255 - mean) / std) @ W`` is linear in the pixel, so it is ``(pixel - centre) @ W' + b``, where W' takes the
scale and b what is left of the shift. The centre is the whole number nearest to 255 mean: differences are then exact in
every dtype, bfloat16 too, and b is next to nothing, so that nothing cancels. A still shows one frame in all temporal
places of a patch: it needs that frame once, and the sum of W' over the places. W' and b are made at every forward, in
at least float32: parameters stay those of the released model, and each place of W gets the still's gradient.

Dims: Y bytes of pixels, P patches, D width, Z values stored of a patch, F frames of a patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mimo_megatron.config.model import VisionConfig

# CLIP's statistics of the channels. No buffers: casting the module to bfloat16 would round them.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
CENTRE = tuple(round(255 * mean) for mean in PIXEL_MEAN)


class PatchEmbedding(nn.Module):
    """[P, D] of the patches of a pack, in its order."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.width, config.patch_bytes))
        self.num_frames = config.temporal_patch_size
        self.patch_bytes, self.still_bytes = config.patch_bytes, config.still_bytes

    def forward(self, pixels_Y: Tensor, runs: Sequence[tuple[bool, int]]) -> Tensor:
        """``runs``: (whether of stills, patches) of the pack's media, as ``VisionLayout.pixel_runs``."""
        runs = runs or [(False, 0)]  # without media too, every parameter has its gradient: zero
        widths = [self.still_bytes if is_still else self.patch_bytes for is_still, _ in runs]
        sizes = [width * count for width, (_, count) in zip(widths, runs, strict=True)]
        whole_D3FZ, bias_D = self._folded()
        weights = {True: whole_D3FZ.sum(2), False: whole_D3FZ}
        weights = {is_still: weight.flatten(1).to(self.weight.dtype) for is_still, weight in weights.items()}
        bias_D = bias_D.to(self.weight.dtype)
        parts = [
            linear(self._centred(part_Y.view(-1, width)), weights[is_still], bias_D)
            for part_Y, width, (is_still, _) in zip(pixels_Y.split(sizes), widths, runs, strict=True)
        ]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _folded(self) -> tuple[Tensor, Tensor]:
        """(W' [D, 3, F, Z / 3], b [D])"""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        channels_DFZ = self.weight.to(wide).unflatten(1, (3, self.num_frames, -1)).unbind(1)
        scaled, bias_D = [], self.weight.new_zeros(len(self.weight), dtype=wide)
        for weight_DFZ, mean, std, centre in zip(channels_DFZ, PIXEL_MEAN, PIXEL_STD, CENTRE, strict=True):
            scaled.append(weight_DFZ / (255 * std))
            bias_D = bias_D + weight_DFZ.sum((1, 2)) * ((centre / 255 - mean) / std)
        return torch.stack(scaled, dim=1), bias_D

    def _centred(self, pixels_PZ: Tensor) -> Tensor:
        values_PZ = pixels_PZ.to(self.weight.dtype)
        for channel_PZ, centre in zip(values_PZ.chunk(3, dim=1), CENTRE, strict=True):
            channel_PZ.sub_(centre)
        return values_PZ
