"""Boxes by generalised IoU: one where one is asked for, else the best matching of all.

The default reward is max(0, GIoU). (1 + GIoU) / 2 pays any box that holds the true one at least 0.5, so that a
box around the whole image earns 0.56 on uniform boxes (measured; max(0, GIoU) pays it 0.12); it stays as the mode
``linear``.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mimo_megatron.reward.answer import MAX_JSON_ITEMS, Unscorable, one_json, readable_answer
from mimo_megatron.reward.geometry import Box, area, labelled, overlap, read_box
from mimo_megatron.reward.golds import GoldError, gold_box, image_of
from mimo_megatron.reward.rule import scoring
from mimo_megatron.reward.verdict import Reason, Verdict, judged
from mimo_megatron.reward.wire import Meta

_KEY = "bbox_2d"
_NUMBER = r"\s*(-?[0-9]{1,6}(?:\.[0-9]{1,9})?)\s*"
_TOKENS = re.compile(rf"<\|box_start\|>\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)<\|box_end\|>")
_TOKEN_LEFT = re.compile(r"<\|box_(?:start|end)\|>|[\[\]{}]")


@dataclass(frozen=True)
class BoxGold:
    boxes: tuple[Box, ...]
    """In pixels of the stored image."""
    is_one_asked: bool
    """A response with more than one box is refused."""


def read_gold(gold: Any, meta: Meta) -> BoxGold:
    """``[[x1, y1, x2, y2], ...]`` in pixels of the stored image; one box alone may stand without the outer list."""
    image = image_of(meta)
    listed = gold if isinstance(gold, list) and gold and isinstance(gold[0], list) else [gold]
    boxes = tuple(gold_box(one, image) for one in listed)
    if len(boxes) > MAX_JSON_ITEMS:
        raise GoldError(f"{len(boxes)} boxes; an answer holds at most {MAX_JSON_ITEMS}")
    if len(set(boxes)) < len(boxes):
        raise GoldError("the same box stands twice")
    return BoxGold(boxes, len(boxes) == 1 and not meta.all_boxes)


def doubts(gold: BoxGold, meta: Meta) -> list[str]:
    width, height = image_of(meta).size
    share = area(gold.boxes[0]) / (width * height)
    if len(gold.boxes) == 1 and share > 0.5:
        return [f"the box covers {share:.0%} of the image, which an answer of the whole image earns"]
    return []


def read_boxes(answer: str, meta: Meta) -> list[Box]:
    """The boxes of a ``readable_answer``, in pixels of the stored image; at least one.

    Accepted: ``[{"bbox_2d": [x1, y1, x2, y2], "label": ...}, ...]``, one such object, one box, a list of boxes, or
    ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``. Keys besides ``bbox_2d`` may hold text and are not judged.
    """
    image = image_of(meta)
    boxes = [read_box(value, image) for value in _box_values(answer)]
    if not boxes:
        raise Unscorable(Reason.NO_ANSWER, answer)
    return boxes


@scoring
def score(response: str, gold: BoxGold, meta: Meta) -> Verdict:
    answer = readable_answer(response, meta)
    said = read_boxes(answer, meta)
    if len(said) > (1 if gold.is_one_asked else 2 * len(gold.boxes) + 2):
        raise Unscorable(Reason.SEVERAL, answer)
    return _judge(answer, said, gold, meta)


def _judge(answer: str, said: list[Box], gold: BoxGold, meta: Meta) -> Verdict:
    """Sum of the matched boxes' rewards over max(said, true), so that superfluous and missing boxes cost alike."""
    overlaps = np.array([[overlap(one, true) for true in gold.boxes] for one in said])
    ious, gious = overlaps[..., 0], overlaps[..., 1]
    # Matched on IoU; GIoU only decides between pairings that overlap alike, so that the order of boxes never matters.
    rows, columns = linear_sum_assignment(ious + 1e-6 * gious, maximize=True)
    ious, gious = ious[rows, columns], gious[rows, columns]
    rewards = {
        "relu": np.maximum(gious, 0.0),
        "linear": (1.0 + gious) / 2.0,
        "iou": ious,
        "threshold": (ious >= meta.threshold).astype(np.float64),
    }[meta.box_mode]
    count = max(len(said), len(gold.boxes))
    reward = min(1.0, max(0.0, float(rewards.sum()) / count))
    return judged(reward, answer, iou=float(ious.mean()), giou=float(gious.mean()), num_boxes=len(said))


def _box_values(answer: str) -> list[Any]:
    if "<|box_start|>" in answer:
        found = _TOKENS.findall(answer)
        if _TOKEN_LEFT.search(_TOKENS.sub("", answer)):
            raise Unscorable(Reason.UNREADABLE, answer)
        if len(found) > MAX_JSON_ITEMS:
            raise Unscorable(Reason.TOO_LARGE, answer)
        return [[float(number) for number in numbers] for numbers in found]
    tree = one_json(answer)
    is_box_alone = isinstance(tree, list) and any(not isinstance(value, list | dict) for value in tree)
    values = [tree] if isinstance(tree, dict) or is_box_alone else tree
    return [labelled(value, _KEY) if isinstance(value, dict) else value for value in values]
