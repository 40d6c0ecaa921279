"""Coordinates inside text: written in pixels of the stored image, trained in pixels of the resized one.

``<|box|>x1,y1,x2,y2<|/box|>`` becomes ``[x1, y1, x2, y2]`` and ``<|point|>x,y<|/point|>`` becomes ``[x, y]``, whole
numbers in the frame that the model sees. They belong to the last image before them, or to image N of the conversation
(from 0, in order of the image parts) with ``<|box image=N|>``. Text without this markup is not touched.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_megatron.errors import DataError

_MARK = re.compile(r"<\|(box|point)(?: image=(\d+))?\|>([^<>]*)<\|/\1\|>")
_STRAY = re.compile(r"<\|/?(?:box|point)(?: [^|]*)?\|>")
_NUM_COORDINATES = {"box": 4, "point": 2}


@dataclass(frozen=True)
class Frame:
    """Sides of an image in pixels: as stored, and as the model sees it."""

    stored_height: int
    stored_width: int
    height: int
    width: int


@dataclass(frozen=True)
class Region:
    """A box (x1, y1, x2, y2) or a point (x, y) in the resized frame of image number ``image``."""

    image: int
    coordinates: tuple[int, ...]


def rescale_messages(
    messages: Sequence[Mapping[str, Any]], frames: Sequence[Frame]
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Region, ...]]:
    """The messages with every mark replaced, and the regions in order. ``frames`` are those of the image parts."""
    regions: list[Region] = []
    num_images = 0
    rescaled = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            rescaled.append({**message, "content": _rescale(content, frames, num_images, regions)})
            continue
        parts = []
        for part in content:
            num_images += part["type"] == "image"
            if part["type"] == "text":
                part = {**part, "text": _rescale(part["text"], frames, num_images, regions)}
            parts.append(part)
        rescaled.append({**message, "content": tuple(parts)})
    return tuple(rescaled), tuple(regions)


def rescale_coordinates(values: Sequence[float], frame: Frame) -> tuple[int, ...]:
    """x, y, x, y, ... of the stored image in whole pixels of the resized one, halves rounded up."""
    scales = (frame.width / frame.stored_width, frame.height / frame.stored_height)
    return tuple(math.floor(value * scales[place % 2] + 0.5) for place, value in enumerate(values))


def _rescale(text: str, frames: Sequence[Frame], num_before: int, regions: list[Region]) -> str:
    if "<|" not in text:
        return text

    def replace(mark: re.Match[str]) -> str:
        image = num_before - 1 if mark[2] is None else int(mark[2])
        if not 0 <= image < len(frames):
            where = "no image stands before it" if mark[2] is None else f"there are {len(frames)} images, from 0"
            raise DataError(f"the mark {mark[0]!r} names no image: {where}")
        values = _numbers(mark)
        frame = frames[image]
        _check_inside(mark[0], values, frame)
        regions.append(Region(image, rescale_coordinates(values, frame)))
        return str(list(regions[-1].coordinates))

    replaced = _MARK.sub(replace, text)
    stray = _STRAY.search(replaced)
    if stray:
        raise DataError(
            f"the mark {stray[0]!r} has no partner; write <|box|>x1,y1,x2,y2<|/box|> or <|point|>x,y<|/point|>"
        )
    return replaced


def _numbers(mark: re.Match[str]) -> list[float]:
    fields = mark[3].split(",")
    if len(fields) != _NUM_COORDINATES[mark[1]] or not all(re.fullmatch(r"\s*\d+(\.\d+)?\s*", one) for one in fields):
        raise DataError(f"the mark {mark[0]!r} must hold {_NUM_COORDINATES[mark[1]]} numbers >= 0, separated by commas")
    return [float(one) for one in fields]


def _check_inside(mark: str, values: list[float], frame: Frame) -> None:
    x_is_inside = all(x <= frame.stored_width for x in values[0::2])
    y_is_inside = all(y <= frame.stored_height for y in values[1::2])
    if not (x_is_inside and y_is_inside and values[0] <= values[-2] and values[1] <= values[-1]):
        raise DataError(
            f"the mark {mark!r} is no region of its image of {frame.stored_width} x {frame.stored_height} pixels "
            "(needed: 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height)"
        )
