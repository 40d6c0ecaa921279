"""Rollouts to read: of each task the group at its first, its middle and its last step, with pictures and rewards.

What a page shows of them is bounded, however long the run, its responses or its pictures are; what is left out is
said.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_megatron.errors import DataError
from mimo_megatron.report.run_data import Row, number
from mimo_megatron.report.stills import Still, stills

Rectangle = tuple[float, float, float, float]
"""x, y, width, height in pixels of the stored picture."""

MOST_TASKS = 16
MOST_PICTURE_CHARACTERS = 4_000_000
"""Of all pictures on the page, as written."""
_MOST_MEDIA = 4  # of a question
_MOST_RESPONSES = 8  # of a group
_MOST_BOXES = 16  # of a gold
_MOST_CHARACTERS = 2000  # of a text


@dataclass(frozen=True)
class Shown:
    """A picture or a video of a question: its stills, or why there are none."""

    stills: tuple[Still, ...]
    fault: str = ""


@dataclass(frozen=True)
class Response:
    text: str
    reward: float | None
    reason: str
    tokens: str
    is_cut: bool
    """It had the longest length that the recipe allows."""

    @property
    def shade(self) -> float:
        """0 to 1: how good the page colours it."""
        return min(max(self.reward or 0.0, 0.0), 1.0)


@dataclass(frozen=True)
class Group:
    step: int
    question_id: str
    question: str
    gold: str
    boxes: tuple[Rectangle, ...]
    """The gold, where it can be drawn: a box or boxes, of a question with one picture."""
    media: tuple[Shown, ...]
    mean: float | None
    responses: tuple[Response, ...]


def sample_groups(rollouts: Sequence[Row], order: Sequence[str]) -> dict[str, list[Group]]:
    """By task, of at most ``MOST_TASKS`` of them: those of ``order`` first."""
    present = {row["task"] for row in rollouts}
    tasks = [*(task for task in order if task in present), *sorted(present - set(order))]
    budget = _Budget(MOST_PICTURE_CHARACTERS)
    return {task: [_group(row, budget) for row in rollouts if row["task"] == task] for task in tasks[:MOST_TASKS]}


class _Budget:
    def __init__(self, num_characters: int) -> None:
        self._left = num_characters

    def show(self, reference: Any) -> Shown:
        try:
            found = stills(reference)
        except DataError as error:
            return Shown((), str(error))
        num_characters = sum(len(one.src) for one in found)
        if num_characters > self._left:
            return Shown((), "left out: the page holds as much of pictures as it may")
        self._left -= num_characters
        return Shown(found)


def _group(row: Row, budget: _Budget) -> Group:
    media = row["media"] if isinstance(row.get("media"), list) else []
    shown = [budget.show(one) for one in media[:_MOST_MEDIA]]
    if len(media) > _MOST_MEDIA:
        shown.append(Shown((), f"and {len(media) - _MOST_MEDIA} more"))
    is_picture = len(media) == 1 and media[0][:1] == ["image"] if media and isinstance(media[0], list) else False
    gold = row.get("gold")
    return Group(
        step=row["step"],
        question_id=_shortened(str(row.get("question", ""))),
        question=_shortened("\n".join(_said(row.get("messages")))),
        gold=_shortened(gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)),
        boxes=gold_boxes(gold) if is_picture else (),
        media=tuple(shown),
        mean=_known(row.get("mean")),
        responses=tuple(_response(one) for one in row["responses"][:_MOST_RESPONSES] if isinstance(one, Mapping)),
    )


def _response(row: Mapping[str, Any]) -> Response:
    return Response(
        text=_shortened(str(row.get("text", ""))),
        reward=_known(row.get("reward")),
        reason=_shortened(str(row.get("reason", ""))),
        tokens=_shortened(str(row.get("tokens", ""))),
        is_cut=row.get("finish") == "length",
    )


def _said(messages: Any) -> Iterator[str]:
    """Each message's text, under its role where that is not the user's; a picture is a word in brackets."""
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping):
            continue
        content = message.get("content", "")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        words = [
            str(part.get("text", "")) if part.get("type") == "text" else f"[{part.get('type')}]"
            for part in parts
            if isinstance(part, Mapping)
        ]
        role = message.get("role")
        yield ("" if role == "user" else f"{role}: ") + " ".join(words)


def gold_boxes(gold: Any) -> tuple[Rectangle, ...]:
    """The rectangles of ``[x1, y1, x2, y2]`` or a list of such, as golds of boxes and points are written; none of
    anything else."""
    corners = gold if isinstance(gold, list) and gold and isinstance(gold[0], list) else [gold]
    boxes = []
    for one in corners[:_MOST_BOXES]:
        sides = [number(side) for side in one] if isinstance(one, list) else []
        if len(sides) != 4 or not all(map(math.isfinite, sides)) or sides[0] >= sides[2] or sides[1] >= sides[3]:
            return ()
        boxes.append((sides[0], sides[1], sides[2] - sides[0], sides[3] - sides[1]))
    return tuple(boxes)


def _known(value: Any) -> float | None:
    return found if math.isfinite(found := number(value)) else None


def _shortened(text: str) -> str:
    """The text without its middle where it is long: a response's answer stands at its end."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"
