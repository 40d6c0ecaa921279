"""What a response and its gold look like: boxes and points over the picture, intervals on a line.

Coordinates are those of the stored picture, as the rules compared them: read by the rules' own readers, so that the
page shows what was judged, and nothing where nothing could be read.
"""

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mimo_megatron.reward import boxes, gui, points, times
from mimo_megatron.reward.answer import Unscorable, readable_answer
from mimo_megatron.reward.geometry import Box, Point
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.images import MediaMissing, image_path, read_image
from mimo_megatron.reward.wire import ScoreItem

T = TypeVar("T")
LONGEST_SIDE = 960
"""Pixels of a picture on the page; larger ones are shown smaller."""


@dataclass(frozen=True)
class Shape:
    """A box, or a point where width and height are 0, in pixels of the stored picture."""

    origin: str
    """gold or said."""
    x: float
    y: float
    width: float = 0.0
    height: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Picture:
    width: int
    height: int
    src: str
    """A data URI; empty where there is no picture, and ``fault`` says why."""
    fault: str
    shapes: list[Shape]


@dataclass(frozen=True)
class Line:
    """Intervals of a video, in seconds."""

    duration: float
    gold: times.Interval | None
    said: times.Interval | None


def picture_of(item: ScoreItem, root: Path | None) -> Picture | None:
    """The item's picture with what is drawn on it; None for an item without one."""
    if item.meta.image is None:
        return None
    width, height = item.meta.image.size
    src, fault = _pixels(item, root)
    return Picture(width, height, src, fault, [*_gold_shapes(item), *_said_shapes(item)])


def line_of(item: ScoreItem) -> Line | None:
    """The item's intervals; None for another task, or where neither can be read."""
    if item.task != "time":
        return None
    gold = _or_none(lambda: times.read_gold(item.gold, item.meta))
    said = _or_none(lambda: times.read_answer(item.response, item.meta))
    ends = [interval.end for interval in (gold, said) if interval is not None]
    return Line(max([item.meta.duration_seconds or 0.0, *ends]), gold, said) if ends else None


def _pixels(item: ScoreItem, root: Path | None) -> tuple[str, str]:
    image = item.meta.image
    assert image is not None
    if image.sha256 is None:
        return "", "the row does not name its picture"
    try:
        path = image_path(root, image.sha256)
        content = read_image(path, image.sha256)
    except MediaMissing as missing:
        return "", str(missing)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.size != image.size:
                return (
                    "",
                    f"the file is {opened.width} x {opened.height}, the row says {image.size[0]} x {image.size[1]}",
                )
            return _data_uri(opened), ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises on damage
        return "", f"{path.name} cannot be read: {error}"


def _data_uri(image: Image.Image) -> str:
    shown = image.convert("RGB")
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _gold_shapes(item: ScoreItem) -> Iterator[Shape]:
    meta = item.meta
    if item.task == "box":
        gold = _or_none(lambda: boxes.read_gold(item.gold, meta))
        yield from (_box_shape("gold", box) for box in (gold.boxes if gold else ()))
    elif item.task == "point":
        target = _or_none(lambda: points.read_gold(item.gold, meta))
        yield from (_box_shape("gold", box) for box in ((target,) if target else ()))
    elif item.task == "gui":
        action = _or_none(lambda: gui.read_gold(item.gold, meta))
        yield from (_box_shape("gold", box, name) for name, box in (action.boxes.items() if action else ()))


def _said_shapes(item: ScoreItem) -> Iterator[Shape]:
    meta = item.meta
    answer = _or_none(lambda: readable_answer(item.response, meta))
    if answer is None:
        return
    if item.task == "box":
        yield from (_box_shape("said", box) for box in _or_none(lambda: boxes.read_boxes(answer, meta)) or ())
    elif item.task == "point":
        point = _or_none(lambda: points.read_point_answer(answer, meta))
        yield from (_point_shape(one) for one in ((point,) if point else ()))
    elif item.task == "gui":
        action = _or_none(lambda: gui.read_action(answer, meta))
        yield from (_point_shape(point, name) for name, point in (action.points.items() if action else ()))


def _or_none(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (Unscorable, GoldError):
        return None


def _box_shape(origin: str, box: Box, name: str = "") -> Shape:
    label = f"{origin} {name} [{', '.join(f'{side:.1f}' for side in box)}]"
    return Shape(origin, box[0], box[1], box[2] - box[0], box[3] - box[1], label)


def _point_shape(point: Point, name: str = "") -> Shape:
    return Shape("said", *point, label=f"said {name} [{point[0]:.1f}, {point[1]:.1f}]")
