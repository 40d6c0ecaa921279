"""What a response and its gold look like: boxes and points over the picture, intervals on a line."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mimo_megatron.reward import times
from mimo_megatron.reward.images import MediaMissing, image_path, read_image
from mimo_megatron.reward.shapes import Shape, gold_shapes, or_none, said_shapes
from mimo_megatron.reward.wire import ScoreItem

LONGEST_SIDE = 960
"""Pixels of a picture on the page; larger ones are shown smaller."""


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
    return Picture(width, height, src, fault, [*gold_shapes(item), *said_shapes(item)])


def line_of(item: ScoreItem) -> Line | None:
    """The item's intervals; None for another task, or where neither can be read."""
    if item.task != "time":
        return None
    gold = or_none(lambda: times.read_gold(item.gold, item.meta))
    said = or_none(lambda: times.read_answer(item.response, item.meta))
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
