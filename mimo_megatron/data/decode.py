"""From the bytes of an image to RGB pixels, by the back end of ``data.decoder``; the pixels are the same with each.

``turbo`` hands JPEGs to libjpeg-turbo (simplejpeg), which writes straight into an array; Pillow decodes with the same
library and the same settings (accurate DCT, smooth upsampling), but unpacks its own four-byte pixels afterwards; so
does ``dali`` (dali.py). All else, and any JPEG of which the back end complains, is decoded by Pillow, which also judges
every header. So ``turbo`` and ``pillow`` accept the same files; ``dali`` accepts these, and with them a few damaged
JPEGs of which it does not complain. Transparent images lie on white. Gray images of more than 8 bits are refused: what
their numbers reach is not in the file, and Pillow would cut all above 255 off, which leaves them white.
"""

import importlib
import io
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimo_megatron.config.run import DecoderName
from mimo_megatron.errors import ConfigError, DataError

_PACKAGES: dict[DecoderName, str] = {"turbo": "simplejpeg", "dali": "mimo_megatron.data.dali"}
_DEEP_MODES = ("I", "F")
"""What Pillow's modes of gray in integers and floats begin with: I, I;16, I;16B, F."""
_INSTALL: dict[DecoderName, str] = {"turbo": "pip install simplejpeg", "dali": 'pip install "mimo-megatron[dali]"'}


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header, without decoding pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_depth(image)
            return image.height, image.width
    except Exception as fault:
        raise _unreadable(data, fault) from fault


def decode_rgb(data: bytes, decoder: DecoderName) -> NDArray[np.uint8]:
    """[height, width, 3]. ``DataError`` for whatever Pillow raises; ``ConfigError`` where the back end is missing."""
    package = None if decoder == "pillow" else _package(decoder)
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_depth(image)
            if package is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
                pixels = _without_complaint(decoder, package, data)
                if pixels is not None:
                    return pixels
            return np.asarray(_on_white(image))
    except Exception as fault:
        raise _unreadable(data, fault) from fault


def _check_depth(image: Image.Image) -> None:
    if image.mode.startswith(_DEEP_MODES):
        raise ValueError(f"it is gray of more than 8 bits, mode {image.mode}: write it with 8, scaled as you mean it")


def _without_complaint(decoder: DecoderName, package: ModuleType, data: bytes) -> NDArray[np.uint8] | None:
    if decoder == "dali":
        return package.decode_jpeg(data)
    try:
        return package.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@cache
def _package(decoder: DecoderName) -> ModuleType:
    try:
        return importlib.import_module(_PACKAGES[decoder])
    except ImportError as fault:
        raise ConfigError(
            f"data.decoder is {decoder}, which cannot be imported ({fault}); {_INSTALL[decoder]}, or set "
            "data.decoder=pillow, which gives the same pixels"
        ) from fault


def _unreadable(data: bytes, fault: Exception) -> DataError:
    return DataError(f"image of {len(data)} bytes cannot be decoded ({fault}); drop the sample or replace the file")
