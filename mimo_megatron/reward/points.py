"""One point that must fall into a box, border included."""

from typing import Any

from mimo_megatron.reward.answer import Unscorable, one_json, readable_answer
from mimo_megatron.reward.geometry import Box, Point, area, contains, labelled, read_point
from mimo_megatron.reward.golds import gold_box, image_of
from mimo_megatron.reward.rule import scoring
from mimo_megatron.reward.verdict import Reason, Verdict, judged
from mimo_megatron.reward.wire import Meta

_KEY = "point_2d"


def read_gold(gold: Any, meta: Meta) -> Box:
    """The box ``[x1, y1, x2, y2]`` that the point must fall into, in pixels of the stored image."""
    return gold_box(gold, image_of(meta))


def doubts(gold: Box, meta: Meta) -> list[str]:
    width, height = image_of(meta).size
    if (share := area(gold) / (width * height)) > 0.5:
        return [f"the box covers {share:.0%} of the image, and most of its points are right"]
    return []


def read_point_answer(answer: str, meta: Meta) -> Point:
    """The one point of a ``readable_answer``, in pixels of the stored image.

    Accepted: ``{"point_2d": [x, y], "label": ...}``, a list of one such object, or ``[x, y]``. A box is no point.
    """
    value = one_json(answer)
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        if len(value) > 1:
            raise Unscorable(Reason.SEVERAL, answer)
        value = value[0]
    if value == []:
        raise Unscorable(Reason.NO_ANSWER, answer)
    return read_point(labelled(value, _KEY) if isinstance(value, dict) else value, image_of(meta))


@scoring
def score(response: str, gold: Box, meta: Meta) -> Verdict:
    answer = readable_answer(response, meta)
    x, y = read_point_answer(answer, meta)
    return judged(float(contains(gold, (x, y))), answer, x=x, y=y)
