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
"""x, y, width, height in pixels of the stored picture; of a point the last two are 0."""

MOST_TASKS = 16
MOST_PICTURE_CHARACTERS = 4_000_000
"""Of all pictures on the page, as written."""
_MOST_MEDIA = 4  # of a question
_COLOURS = (
    "c1",
    "c2",
    "c4",
    "c5",
    "c7",
    "c6",
    "c8",
    "c3",
)  # c3 is nearly the gold's green: the last
_MOST_RESPONSES = len(_COLOURS)  # of a group
_MOST_SHAPES = 16  # of a gold, and of a response
_MOST_CHARACTERS = 2000  # of a text


@dataclass(frozen=True)
class Shown:
    """A picture or a video of a question: its stills, or why there are none."""

    stills: tuple[Still, ...]
    fault: str = ""


@dataclass(frozen=True)
class Response:
    number: int
    """Of the group's, from 1."""
    text: str
    reward: float | None
    reason: str
    tokens: str
    is_cut: bool
    """It had the longest length that the recipe allows."""
    shapes: tuple[Rectangle, ...]
    """What its rule read, where it is drawn."""

    @property
    def colour(self) -> str:
        """A class of the page."""
        return f"said{self.number}"

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
    shapes: tuple[Rectangle, ...]
    """The gold's, where they are drawn: of a question with one picture."""
    media: tuple[Shown, ...]
    mean: float | None
    responses: tuple[Response, ...]

    @property
    def marks(self) -> list["Mark"]:
        """What is drawn on the picture, the gold below all others."""
        said = [(shape, one.colour, f"response {one.number}") for one in self.responses for shape in one.shapes]
        drawn = [*((shape, "gold", "gold") for shape in self.shapes), *said]
        covers = [sum(other[0] == one[0] for other in drawn[place + 1 :]) for place, one in enumerate(drawn)]
        return [Mark(*one, num_covers) for one, num_covers in zip(drawn, covers, strict=True)]


@dataclass(frozen=True)
class Mark:
    shape: Rectangle
    colour: str
    name: str
    num_covers: int
    """Equal ones above it: so much wider it is drawn, and all can be seen."""


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
    is_drawn = len(media) == 1 and isinstance(media[0], list) and media[0][:1] == ["image"]
    gold = row.get("gold")
    return Group(
        step=row["step"],
        question_id=_shortened(str(row.get("question", ""))),
        question=_shortened("\n".join(_said(row.get("messages")))),
        gold=_shortened(gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)),
        shapes=shapes_of(row.get("shapes")) if is_drawn else (),
        media=tuple(shown),
        mean=_known(row.get("mean")),
        responses=tuple(
            _response(number, one, is_drawn)
            for number, one in enumerate(row["responses"][:_MOST_RESPONSES], start=1)
            if isinstance(one, Mapping)
        ),
    )


def _response(number: int, row: Mapping[str, Any], is_drawn: bool) -> Response:
    return Response(
        number,
        text=_shortened(str(row.get("text", ""))),
        reward=_known(row.get("reward")),
        reason=_shortened(str(row.get("reason", ""))),
        tokens=_shortened(str(row.get("tokens", ""))),
        is_cut=row.get("finish") == "length",
        shapes=shapes_of(row.get("shapes")) if is_drawn else (),
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


def shapes_of(value: Any) -> tuple[Rectangle, ...]:
    """The boxes and points of a list of ``[x1, y1, x2, y2]`` and ``[x, y]``; none where one is anything else."""
    shapes = []
    for one in value[:_MOST_SHAPES] if isinstance(value, list) else []:
        ends = [number(end) for end in one] if isinstance(one, list) else []
        if len(ends) not in (2, 4) or not all(map(math.isfinite, ends)):
            return ()
        x1, y1, x2, y2 = (*ends, *ends)[:4]
        if len(ends) == 4 and (x1 >= x2 or y1 >= y2):
            return ()
        shapes.append((x1, y1, x2 - x1, y2 - y1))
    return tuple(shapes)


def _known(value: Any) -> float | None:
    return found if math.isfinite(found := number(value)) else None


def _shortened(text: str) -> str:
    """The text without its middle where it is long: a response's answer stands at its end."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"
