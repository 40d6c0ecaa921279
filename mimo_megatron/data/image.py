"""From the bytes of an image to uint8 patches, pixel for pixel as Hugging Face's Qwen2-VL processor makes them.

The file is decoded with Pillow, composited on white where it is transparent, resized (bicubic) to sides that are whole
merge units, and cut. Pixels stay uint8: normalising is the encoder's first operation, on its device. Pixels are taken
as stored: an EXIF orientation tag is not applied (the processor does not apply it either; a corpus that relies on the
tag should be rotated when its shards are written). Invariants: ``image_size`` needs the header alone and agrees with
the decoded size; whatever Pillow raises on damaged bytes becomes a ``DataError``.
"""

import io
import math

import numpy as np
from PIL import Image

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.data.patches import patchify
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


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header, without decoding pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception as fault:
        raise _unreadable(data, fault) from fault


def encode_image(data: bytes, vision: VisionConfig, *, min_pixels: int, max_pixels: int) -> EncodedMedia:
    """The image as uint8 patches in merge-block order, with its (1, height, width) patch grid."""
    image = _decode_rgb(data)
    height, width = smart_resize(
        image.height, image.width, multiple=vision.pixel_multiple, min_pixels=min_pixels, max_pixels=max_pixels
    )
    pixels_HW3 = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    grid = (1, height // vision.patch_size, width // vision.patch_size)
    patches_PX = patchify(pixels_HW3[None], vision, is_still=True)
    return EncodedMedia("image", patches_PX, grid, frame_repeats=vision.temporal_patch_size)


def _decode_rgb(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if "A" not in image.getbands() and image.info.get("transparency") is None:
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as fault:
        raise _unreadable(data, fault) from fault


def _unreadable(data: bytes, fault: Exception) -> DataError:
    return DataError(f"image of {len(data)} bytes cannot be decoded ({fault}); drop the sample or replace the file")
