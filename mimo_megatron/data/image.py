"""From the bytes of an image to uint8 patches, pixel for pixel as Hugging Face's Qwen2-VL processor makes them.

The file is decoded (``decode.py``), then resized (bicubic) to sides that are whole merge units and cut, in one pass
(``patches.py``). Pixels stay uint8: normalising is folded into the encoder's first layer. They are taken as stored: an
EXIF orientation tag is not applied (the processor does not apply it either; a corpus that relies on the tag should be
rotated when its shards are written). Invariants: ``image_size`` needs the header alone and agrees with the decoded
size; whatever is raised on damaged bytes becomes a ``DataError``.
"""

import math

import numpy as np

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.config.run import DecoderName
from mimo_megatron.data.decode import decode_rgb
from mimo_megatron.data.patches import resize_to_patches
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedMedia

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, *, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) nearest to the given shape whose sides are multiples and whose area lies within the limits.

    A very flat image keeps one multiple on its short side, so its area may then exceed ``max_pixels``.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(
            f"image of height {height} and width {width}: sides must be positive and their ratio at most "
            f"{MAX_ASPECT_RATIO}; crop or drop it"
        )
    if not 0 < min_pixels <= max_pixels:
        raise DataError(
            f"0 < min_pixels ({min_pixels}) <= max_pixels ({max_pixels}) does not hold; change data.*_pixels"
        )
    new_height = round(height / multiple) * multiple
    new_width = round(width / multiple) * multiple
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(multiple, math.floor(height / shrink / multiple) * multiple)
        new_width = max(multiple, math.floor(width / shrink / multiple) * multiple)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / multiple) * multiple
        new_width = math.ceil(width * grow / multiple) * multiple
    return new_height, new_width


def encode_image(
    data: bytes, vision: VisionConfig, *, min_pixels: int, max_pixels: int, decoder: DecoderName = "turbo"
) -> EncodedMedia:
    """The image as uint8 patches of its one frame in merge-block order, with its (1, height, width) patch grid."""
    pixels_HW3 = decode_rgb(data, decoder)
    height, width = smart_resize(
        *pixels_HW3.shape[:2], multiple=vision.pixel_multiple, min_pixels=min_pixels, max_pixels=max_pixels
    )
    grid = (1, height // vision.patch_size, width // vision.patch_size)
    patches_PZ = np.empty((grid[1] * grid[2], vision.still_bytes), np.uint8)
    resize_to_patches(pixels_HW3, (height, width), vision, patches_PZ)
    return EncodedMedia("image", patches_PZ, grid, frame_repeats=vision.temporal_patch_size)
