r"""One interval of a video, ``[mm:ss, mm:ss]``: intersection over union.

The union is |A| + |B| - intersection, which also holds for intervals that do not touch.
"""

import re
from dataclasses import dataclass
from typing import Any

from mimo_megatron.reward.answer import Unscorable, check_length, final_answer, finite_number, last_boxed, plain
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.rule import scoring
from mimo_megatron.reward.verdict import Reason, Verdict, judged
from mimo_megatron.reward.wire import Meta

SHORTEST_GOLD = 3.0
"""Seconds. Answers stand on whole seconds, so a short gold cannot be met: [4.2, 4.8] earns at most 0.6."""
GRACE = 1.0
"""Seconds by which an interval may outlast the video, whose end is rounded to whole seconds."""

_CLOCK = r" *(?:([0-9]{1,2}):([0-5][0-9])|([0-9]{1,3})):([0-5][0-9]) *"
_INTERVAL = re.compile(rf"\[{_CLOCK},{_CLOCK}\]")
_BRACKETED = re.compile(r"\[[^\[\]{}]*\]")


@dataclass(frozen=True)
class Interval:
    """Seconds from the start of the video, start < end."""

    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


def read_gold(gold: Any, meta: Meta) -> Interval:
    """``"[mm:ss, mm:ss]"`` or ``[start, end]`` in seconds."""
    if isinstance(gold, str):
        if (found := _INTERVAL.fullmatch(plain(gold))) is None:
            raise GoldError(f"{gold!r} is not an interval: give '[mm:ss, mm:ss]' or [start, end] in seconds")
        interval = _interval(found)
    elif isinstance(gold, list) and len(gold) == 2 and all(finite_number(second) for second in gold):
        interval = Interval(gold[0], gold[1])
    else:
        raise GoldError(f"{gold!r} is not an interval: give '[mm:ss, mm:ss]' or [start, end] in seconds")
    if not 0 <= interval.start < interval.end:
        raise GoldError(f"interval {gold!r}: 0 <= start < end does not hold")
    if meta.duration_seconds is not None and interval.end > meta.duration_seconds + GRACE:
        raise GoldError(f"interval {gold!r} ends after the video of {meta.duration_seconds:g} s")
    return interval


def doubts(gold: Interval, meta: Meta) -> list[str]:
    found = []
    if gold.length < SHORTEST_GOLD:
        found.append(f"{gold.length:g} s is short for answers in whole seconds; drop it, or round it at build time")
    if meta.duration_seconds is None:
        found.append("meta.duration_seconds is not given, so no answer can be too late")
    elif (share := gold.length / meta.duration_seconds) > 0.5:
        found.append(f"it covers {share:.0%} of the video, which an answer of the whole video earns")
    return found


def read_answer(response: str, meta: Meta) -> Interval:
    r"""The one interval of the response: all of the last ``\boxed{}``, or else in words that hold no other bracket.

    Hours as ``h:mm:ss``, minutes up to 999. Seconds above 59 and a time beyond the video are refused.
    """
    answer = final_answer(response, meta)
    boxed = last_boxed(answer)
    text = answer if boxed is None else boxed
    check_length(text)
    text = plain(text)
    pieces = _BRACKETED.findall(text)
    words = _BRACKETED.sub("", text)
    if any(sign in words for sign in "[]{}") or (boxed is not None and words.strip()):
        raise Unscorable(Reason.UNREADABLE, text)
    if not pieces:
        raise Unscorable(Reason.NO_ANSWER, text)
    intervals = {found and _interval(found) for found in map(_INTERVAL.fullmatch, pieces)}
    interval = intervals.pop()
    if interval is None or None in intervals:
        raise Unscorable(Reason.UNREADABLE, text)
    if intervals:
        raise Unscorable(Reason.SEVERAL, text)
    if interval.start >= interval.end:
        raise Unscorable(Reason.DEGENERATE, text)
    if meta.duration_seconds is not None and interval.end > meta.duration_seconds + GRACE:
        raise Unscorable(Reason.OUT_OF_RANGE, text)
    return interval


@scoring
def score(response: str, gold: Interval, meta: Meta) -> Verdict:
    said = read_answer(response, meta)
    inter = max(0.0, min(said.end, gold.end) - max(said.start, gold.start))
    iou = inter / (said.length + gold.length - inter)
    return judged(min(1.0, iou), f"[{said.start:g} s, {said.end:g} s]", start=said.start, end=said.end)


def clock(seconds: float) -> str:
    """``mm:ss`` of whole seconds, rounded down."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _interval(found: re.Match[str]) -> Interval:
    numbers = [int(number or 0) for number in found.groups()]
    return Interval(*(3600 * h + 60 * (m + long_m) + s for h, m, long_m, s in (numbers[:4], numbers[4:])))
