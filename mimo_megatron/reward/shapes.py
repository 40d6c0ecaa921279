"""Boxes and points that a response and its gold hold, to be drawn over the picture.

Coordinates are those of the stored picture, as the rules compared them: read by the rules' own readers, so that what is
drawn is what was judged, and nothing where nothing could be read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from mimo_megatron.reward import boxes, gui, points
from mimo_megatron.reward.answer import Unscorable, readable_answer
from mimo_megatron.reward.geometry import Box, Point
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.wire import ScoreItem

T = TypeVar("T")


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

    @property
    def corners(self) -> tuple[float, ...]:
        """(x1, y1, x2, y2), or (x, y) of a point, to a tenth of a pixel."""
        ends = (self.x, self.y, self.x + self.width, self.y + self.height)
        return tuple(round(one, 1) for one in (ends if self.width or self.height else ends[:2]))


def gold_shapes(item: ScoreItem) -> Iterator[Shape]:
    """None of a task that is not in pixels, or of a gold that cannot be read."""
    meta = item.meta
    if item.task == "box":
        gold = or_none(lambda: boxes.read_gold(item.gold, meta))
        yield from (_box_shape("gold", box) for box in (gold.boxes if gold else ()))
    elif item.task == "point":
        target = or_none(lambda: points.read_gold(item.gold, meta))
        yield from (_box_shape("gold", box) for box in ((target,) if target else ()))
    elif item.task == "gui":
        action = or_none(lambda: gui.read_gold(item.gold, meta))
        yield from (_box_shape("gold", box, name) for name, box in (action.boxes.items() if action else ()))


def said_shapes(item: ScoreItem) -> Iterator[Shape]:
    """None where the response holds nothing that its rule can read."""
    meta = item.meta
    answer = or_none(lambda: readable_answer(item.response, meta))
    if answer is None:
        return
    if item.task == "box":
        yield from (_box_shape("said", box) for box in or_none(lambda: boxes.read_boxes(answer, meta)) or ())
    elif item.task == "point":
        point = or_none(lambda: points.read_point_answer(answer, meta))
        yield from (_point_shape(one) for one in ((point,) if point else ()))
    elif item.task == "gui":
        action = or_none(lambda: gui.read_action(answer, meta))
        yield from (_point_shape(point, name) for name, point in (action.points.items() if action else ()))


def or_none(read: Callable[[], T]) -> T | None:
    """What ``read`` reads; None where it cannot."""
    try:
        return read()
    except (Unscorable, GoldError):
        return None


def _box_shape(origin: str, box: Box, name: str = "") -> Shape:
    label = f"{origin} {name} [{', '.join(f'{side:.1f}' for side in box)}]"
    return Shape(origin, box[0], box[1], box[2] - box[0], box[3] - box[1], label)


def _point_shape(point: Point, name: str = "") -> Shape:
    return Shape("said", *point, label=f"said {name} [{point[0]:.1f}, {point[1]:.1f}]")
