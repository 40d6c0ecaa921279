"""What the tests of the reward rules share: an image whose two frames differ, and verdicts in short."""

from typing import Any

from mimo_megatron.reward.rules import score
from mimo_megatron.reward.verdict import Verdict
from mimo_megatron.reward.wire import ImageMeta, Meta

STORED, SHOWN = (1000, 800), (500, 400)
META = Meta(image=ImageMeta(size=STORED, shown=SHOWN), duration_seconds=200.0)


def meta_with(**values: Any) -> Meta:
    return META.model_copy(update=values)


def judge(task: str, response: str, gold: Any, meta: Meta = META) -> Verdict:
    return score(task, response, gold, meta)


def outcome(task: str, response: str, gold: Any, meta: Meta = META) -> str | float | None:
    """The reward of a judged response, the reason of any other."""
    verdict = judge(task, response, gold, meta)
    return verdict.reward if verdict.status == "ok" else verdict.reason.value
