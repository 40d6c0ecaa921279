"""What golds share: their error, and boxes in pixels of the stored image.

Golds are read when data is built (``check.py``) and again when a response is scored; one that cannot be read is a
fault of ours and never scores anything.
"""

from typing import Any

from mimo_megatron.errors import DataError
from mimo_megatron.reward.answer import finite_number
from mimo_megatron.reward.geometry import Box, area, to_shown
from mimo_megatron.reward.wire import ImageMeta, Meta


class GoldError(DataError):
    """A gold that no response could be judged by."""


def image_of(meta: Meta) -> ImageMeta:
    if meta.image is None:
        raise GoldError("the gold is in pixels, so meta.image must hold the sizes of the stored and the shown image")
    return meta.image


def gold_box(value: Any, image: ImageMeta) -> Box:
    """A box inside the stored image, large enough that an answer may hold it (1 px² of both images)."""
    if not isinstance(value, list) or len(value) != 4 or not all(finite_number(one) for one in value):
        raise GoldError(f"{value!r} is not a box: give [x1, y1, x2, y2], four finite numbers")
    box: Box = (value[0], value[1], value[2], value[3])
    x1, y1, x2, y2 = box
    width, height = image.size
    if not (x1 < x2 and y1 < y2):
        raise GoldError(f"box {value}: x1 < x2 and y1 < y2 do not hold")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise GoldError(f"box {value} leaves the stored image of {width} x {height} pixels; clip it")
    if area(box) < 1.0 or area(to_shown(box, image)) < 1.0:
        raise GoldError(f"box {value} is smaller than one pixel; no answer may be that small")
    return box


def known_keys(value: dict[str, Any], allowed: set[str]) -> None:
    """``GoldError`` where ``value`` has other keys."""
    if strangers := set(value) - allowed:
        raise GoldError(f"unknown keys {sorted(strangers)}; known are {sorted(allowed)}")
