"""What a rule is: how its golds are read, what looks doubtful about one, and how a response is scored against it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mimo_megatron.reward.answer import Unscorable
from mimo_megatron.reward.verdict import Verdict, invalid
from mimo_megatron.reward.wire import Meta

Gold = TypeVar("Gold")


def _no_doubts(gold: Any, meta: Meta) -> list[str]:
    return []


@dataclass(frozen=True)
class Rule:
    """``score`` is pure, takes microseconds, and never raises on any response."""

    read_gold: Callable[[Any, Meta], Any]
    """A typed gold; ``GoldError`` for one that nothing could be judged by."""
    score: Callable[[str, Any, Meta], Verdict]
    doubts: Callable[[Any, Meta], list[str]] = _no_doubts
    """Why a gold that can be read is a poor one to learn from."""


def scoring(judge: Callable[[str, Gold, Meta], Verdict]) -> Callable[[str, Gold, Meta], Verdict]:
    """``judge`` as a rule's ``score``: an ``Unscorable`` response is ``invalid``."""

    @functools.wraps(judge)
    def score(response: str, gold: Gold, meta: Meta) -> Verdict:
        try:
            return judge(response, gold, meta)
        except Unscorable as fault:
            return invalid(fault.reason, fault.answer)

    return score
