"""What a reward is: a value in [0, 1], or the statement that there is none.

Invariant: a fault of ours (a dead worker, a bad gold, a reward model that does not answer) is ``unknown`` and never 0;
a sample without a reward is dropped and drawn again, a wrong one is learnt from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

Status = Literal["ok", "invalid", "unknown"]
"""``ok``: judged. ``invalid``: the response holds nothing to judge, by its own fault. ``unknown``: no reward."""


class Reason(StrEnum):
    """Why a verdict is as it is, for counts and for people. The member's value travels on the wire."""

    # ok
    RIGHT = "right"
    WRONG = "wrong"
    PARTIAL = "partial"
    """Between 0 and 1: an overlap, or the score of a reward model."""
    # invalid: the answer's own fault
    NO_ANSWER = "no_answer"
    """Nothing after ``</think>``, or nothing in the form the task asks for."""
    TRUNCATED = "truncated"
    """No answer, and generation had ended by length."""
    UNREADABLE = "unreadable"
    """An answer stands there, but not in a form that is accepted."""
    SEVERAL = "several"
    """More answers than were asked for."""
    OUT_OF_RANGE = "out_of_range"
    """A coordinate outside the image, a time after the end, a number beyond the limits."""
    DEGENERATE = "degenerate"
    """A box or interval that is inverted or without size."""
    TOO_LARGE = "too_large"
    """Beyond the limits on length, depth or size of numbers."""
    REFUSED = "refused"
    """A construct that is never evaluated, such as a factorial tower."""
    KILLED_TWICE = "killed_twice"
    """Two workers in turn exceeded time or memory on it."""
    # unknown: not the answer's fault
    BAD_GOLD = "bad_gold"
    NO_VERDICT = "no_verdict"
    """The library gave up on a pair that is within all limits."""
    DEADLINE = "deadline"
    WORKER_LOST = "worker_lost"
    CANCELLED = "cancelled"
    OVERLOADED = "overloaded"
    MODEL_UNAVAILABLE = "model_unavailable"
    MEDIA_MISSING = "media_missing"
    BAD_PROMPT = "bad_prompt"
    """The chat before the response cannot be read by the reward model."""
    INTERNAL = "internal"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one response. ``reward`` is None exactly where the status is ``unknown``."""

    status: Status
    reward: float | None
    reason: Reason
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named numbers the reward was made of (``iou``, ``giou``, ``num_boxes``), finite."""
    answer: str = ""
    """The part of the response that was judged, at most 200 characters, for people."""

    def __post_init__(self) -> None:
        assert (self.reward is None) == (self.status == "unknown"), self
        assert self.reward is None or (math.isfinite(self.reward) and 0.0 <= self.reward <= 1.0), self
        assert self.status != "invalid" or self.reward == 0.0, self
        assert all(math.isfinite(part) for part in self.parts.values()), self


def judged(reward: float, answer: str = "", **parts: float) -> Verdict:
    """A response that was judged; the reason follows from the reward."""
    reason = Reason.RIGHT if reward == 1.0 else Reason.WRONG if reward == 0.0 else Reason.PARTIAL
    return Verdict("ok", float(reward), reason, parts, answer[:200])


def invalid(reason: Reason, answer: str = "", **parts: float) -> Verdict:
    return Verdict("invalid", 0.0, reason, parts, answer[:200])


def unknown(reason: Reason) -> Verdict:
    return Verdict("unknown", None, reason)
