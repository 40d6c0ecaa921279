"""The rules that take microseconds, by task, and the one way to score by them.

Mathematics is not among them: it may hang, and is judged in processes that can be killed (``service/pool.py``).
"""

from collections.abc import Mapping
from typing import Any

from mimo_megatron.log import get_logger
from mimo_megatron.reward import boxes, counts, gui, points, times
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.rule import Rule
from mimo_megatron.reward.verdict import Reason, Verdict, unknown
from mimo_megatron.reward.wire import Meta

RULES: Mapping[str, Rule] = {
    "box": Rule(boxes.read_gold, boxes.score, boxes.doubts),
    "point": Rule(points.read_gold, points.score, points.doubts),
    "count": Rule(counts.read_gold, counts.score),
    "time": Rule(times.read_gold, times.score, times.doubts),
    "gui": Rule(gui.read_gold, gui.score),
}


def score(task: str, response: str, gold: Any, meta: Meta) -> Verdict:
    """The verdict of a task in ``RULES``. Whatever goes wrong on our side is ``unknown``, never a reward of 0."""
    try:
        rule = RULES[task]
        return rule.score(response, rule.read_gold(gold, meta), meta)
    except GoldError:
        return unknown(Reason.BAD_GOLD)
    except Exception:
        # The one broad except that does not raise again: a fault of ours must not end the service, nor teach anything.
        get_logger().exception("task %s: a rule failed on a response of %d characters", task, len(response))
        return unknown(Reason.INTERNAL)
