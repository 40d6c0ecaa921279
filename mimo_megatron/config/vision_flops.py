"""Forward FLOPs of the vision encoder and the projector, from grids: multiply-adds counted as 2.

One formula for the accounting of a step (``train/flops.py``, where it is written out) and for the sharing of images
between ranks (``model/vision_share.py``, ``data/media_part.py``). Grids are in patches, merge units 2x2 patches.
"""

import itertools
from collections.abc import Sequence

from mimo_megatron.config.model import VisionConfig


def layer_weights(vision: VisionConfig) -> int:
    """Weights every patch is multiplied by in one layer: q, k, v, output; gate, up, down."""
    return vision.width * (4 * vision.width + 3 * vision.ffn_width)


def projector_weights(vision: VisionConfig, text_width: int) -> int:
    """Weights every merge unit is multiplied by."""
    merged = vision.merge_factor * vision.width
    return merged * (merged + text_width)


def frame_pairs(vision: VisionConfig, height: int, width: int) -> int:
    """Pairs of patches of one frame that attend to each other, summed over the layers."""
    num_full = len(set(vision.full_attention_layers))
    merge, window = vision.spatial_merge_size, vision.window_size // vision.pixel_multiple
    # A window is rows x columns of merge blocks, cut at the border: the sum of its squares factors over the axes.
    windowed = merge**4 * _sum_of_squares(height // merge, window) * _sum_of_squares(width // merge, window)
    return num_full * (height * width) ** 2 + (vision.depth - num_full) * windowed


def frame_flops(vision: VisionConfig, text_width: int, height: int, width: int) -> int:
    """Of one image, or one temporal grid step of a video, from its patches to its features. Training takes about three
    times as much of each term, so ratios between frames are those of training."""
    patches = height * width
    linear = 2 * patches * (vision.patch_bytes * vision.width + vision.depth * layer_weights(vision))
    attention = 4 * vision.width * frame_pairs(vision, height, width)
    return linear + attention + 2 * (patches // vision.merge_factor) * projector_weights(vision, text_width)


def piece_flops(vision: VisionConfig, text_width: int, grids_I3: Sequence[tuple[int, int, int]]) -> list[int]:
    """[U] of each piece, in pack order: an image, or one temporal grid step of a video."""
    return [
        cost
        for frames, height, width in grids_I3
        for cost in itertools.repeat(frame_flops(vision, text_width, height, width), frames)
    ]


def _sum_of_squares(length: int, piece: int) -> int:
    """Sum of squares of the parts when ``length`` is cut every ``piece``."""
    whole, rest = divmod(length, piece)
    return whole * piece * piece + rest * rest
