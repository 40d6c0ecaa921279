"""Where an item is judged: ``cheap`` in this process, ``math`` in a worker, else by a replica. Queues are bounded."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mimo_megatron.log import get_logger
from mimo_megatron.reward.service.pool import AsyncPool, Outcome
from mimo_megatron.reward.verdict import Reason, Verdict, invalid, unknown
from mimo_megatron.reward.wire import Meta, ScoreItem

MAX_RETRY_SECONDS = 30


class Overloaded(Exception):
    """A queue is full; ``retry_after`` is in whole seconds."""

    def __init__(self, lane: str, retry_after: int) -> None:
        super().__init__(f"the queue of lane {lane} is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Queue:
    """The unfinished items of one lane: how many, how large, how old."""

    def __init__(self, lane: str, max_items: int, max_bytes: int) -> None:
        self.lane = lane
        self._max_items, self._max_bytes = max_items, max_bytes
        self._since: dict[int, float] = {}  # in order of arrival
        self._next = 0
        self.num_items = self.num_bytes = 0
        self._seconds_each = 0.01
        self._last_finish = time.monotonic()

    @property
    def oldest_seconds(self) -> float:
        return time.monotonic() - next(iter(self._since.values())) if self._since else 0.0

    def check_room(self, num_items: int, num_bytes: int) -> None:
        """``Overloaded`` where these items do not fit; whatever comes to an empty queue fits."""
        too_many = self.num_items + num_items > self._max_items or self.num_bytes + num_bytes > self._max_bytes
        if self._since and num_items and too_many:
            seconds = math.ceil(self.num_items * self._seconds_each / 2)  # until about half of it is done
            raise Overloaded(self.lane, min(max(seconds, 1), MAX_RETRY_SECONDS))

    @contextmanager
    def holds(self, num_bytes: int, num_items: int = 1) -> Iterator[None]:
        """Within it the items count as unfinished."""
        number, self._next = self._next, self._next + 1
        began = time.monotonic()
        if not self._since:
            self._last_finish = began  # idle time says nothing about speed
        self._since[number] = began
        self.num_items += num_items
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            del self._since[number]
            self.num_items -= num_items
            self.num_bytes -= num_bytes
            now = time.monotonic()
            self._seconds_each += 0.02 * ((now - self._last_finish) / max(num_items, 1) - self._seconds_each)
            self._last_finish = now


def score_job(response: str, gold: Any, meta: Meta) -> dict[str, Any]:
    return {"op": "score", "response": response, "gold": gold, "meta": meta.model_dump(mode="json")}


async def judge_math(pool: AsyncPool, item: ScoreItem) -> Verdict:
    """The worker's verdict. A worker's answer is checked like a stranger's: what it has judged came from outside."""
    try:
        return verdict_of(await pool.call(score_job(item.response, item.gold, item.meta)))
    except ValueError:  # NaN or Infinity in the gold: JSON cannot carry it
        return unknown(Reason.BAD_GOLD)


def verdict_of(outcome: Outcome) -> Verdict:
    """What a worker said of a ``score_job``, or why it said nothing."""
    if outcome.reason is Reason.KILLED_TWICE:
        return invalid(Reason.KILLED_TWICE)
    if outcome.value is None:
        return unknown(outcome.reason or Reason.INTERNAL)
    try:
        told = outcome.value
        parts = {str(name): float(part) for name, part in told["parts"].items()}
        return Verdict(told["status"], told["reward"], Reason(told["reason"]), parts, str(told["answer"])[:200])
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        get_logger().warning("a reward worker answered nonsense: %r", error)
        return unknown(Reason.INTERNAL)
