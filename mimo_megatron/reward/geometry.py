"""Boxes and points: overlap in fp64, and the way from pixels of the shown image to those of the stored one.

A ``Box`` is (x1, y1, x2, y2). Answers are read in the shown frame, and everything is compared in the stored one, by the
two sizes that were kept with the sample: whether numbers look like shares of 1 or of 1000 is never guessed.
"""

from typing import Any

from mimo_megatron.reward.answer import MAX_NUMBER, Unscorable, finite_number
from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import ImageMeta

Box = tuple[float, float, float, float]
Point = tuple[float, float]

OVERSHOOT = 0.01
"""Share of the image's side by which a box may leave the image; it is then clipped."""


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(first: Box, second: Box) -> tuple[float, float]:
    """(IoU, GIoU) of two boxes with x1 < x2 and y1 < y2; GIoU in (-1, 1] as in arXiv:1902.09630."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    inter = max(0.0, width) * max(0.0, height)
    union = area(first) + area(second) - inter
    hull = (max(first[2], second[2]) - min(first[0], second[0])) * (max(first[3], second[3]) - min(first[1], second[1]))
    return inter / union, inter / union - (hull - union) / hull


def contains(box: Box, point: Point) -> bool:
    """Whether the point is in the box, border included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def read_box(value: Any, image: ImageMeta) -> Box:
    """A JSON list of four numbers in shown pixels -> stored pixels.

    Never sorted: an inverted box is ``degenerate``, as is one below 1 px² of the shown image.
    """
    x1, y1, x2, y2 = _numbers(value, 4)
    width, height = image.shown
    if not (x1 < x2 and y1 < y2):
        raise Unscorable(Reason.DEGENERATE, str(value))
    if x1 < -OVERSHOOT * width or y1 < -OVERSHOOT * height:
        raise Unscorable(Reason.OUT_OF_RANGE, str(value))
    if x2 > (1 + OVERSHOOT) * width or y2 > (1 + OVERSHOOT) * height:
        raise Unscorable(Reason.OUT_OF_RANGE, str(value))
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
    # Clipping may leave nothing of a box that lies beside the image.
    if x1 >= x2 or y1 >= y2 or area((x1, y1, x2, y2)) < 1.0:
        raise Unscorable(Reason.DEGENERATE, str(value))
    return _scaled((x1, y1, x2, y2), image.shown, image.size)


def read_point(value: Any, image: ImageMeta | None) -> Point:
    """A JSON list of two numbers in shown pixels, inside the image -> stored pixels.

    Without an image it is as given: a point that is asked for by no gold must still not make the verdict ``unknown``.
    """
    x, y = _numbers(value, 2)
    width, height = (MAX_NUMBER, MAX_NUMBER) if image is None else image.shown
    if not (0 <= x <= width and 0 <= y <= height):
        raise Unscorable(Reason.OUT_OF_RANGE, str(value))
    return (x, y) if image is None else (x * image.size[0] / width, y * image.size[1] / height)


def labelled(value: dict[str, Any], key: str) -> Any:
    """``value[key]``, where every other key holds text (a label); anything else could be a second answer."""
    if key not in value or not all(name == key or isinstance(other, str) for name, other in value.items()):
        raise Unscorable(Reason.UNREADABLE, str(value))
    return value[key]


def to_shown(box: Box, image: ImageMeta) -> Box:
    """A box in stored pixels -> shown pixels, the frame in which the model answers."""
    return _scaled(box, image.size, image.shown)


def _scaled(box: Box, source: tuple[int, int], target: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = box
    (width, height), (new_width, new_height) = source, target
    return x1 * new_width / width, y1 * new_height / height, x2 * new_width / width, y2 * new_height / height


def _numbers(value: Any, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count or not all(type(one) in (int, float) for one in value):
        raise Unscorable(Reason.UNREADABLE, str(value))
    if not all(finite_number(one) for one in value):
        raise Unscorable(Reason.OUT_OF_RANGE, str(value))
    return [float(one) for one in value]
