"""Rewards while responses are still being sampled: each is judged as it comes, by the service, in the background."""

import queue
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mimo_megatron.reward.client import RewardClient
from mimo_megatron.reward.loop_thread import LoopThread
from mimo_megatron.reward.wire import ScoreItem, ScoreResult


@dataclass(frozen=True)
class _Call:
    """Items that were sent together, and the groups that still wait for one of them."""

    future: Future[None]
    groups: set[str]


class Judging:
    """Items under way, each for a group. Everything asked for comes back once, or is cancelled.

    A service that does not answer is waited for until the deadline; then a result is ``unknown``, never 0.
    """

    def __init__(self, url: str, token: str | None, deadline_seconds: float) -> None:
        self._arguments = (url, token, deadline_seconds)
        self._results: queue.SimpleQueue[ScoreResult | Exception] = queue.SimpleQueue()
        self._calls: list[_Call] = []

    def __enter__(self) -> Self:
        self._thread = LoopThread("judging")
        self._client = self._thread.run(self._connect())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel(set().union(*(call.groups for call in self._calls)))
        self._thread.run(self._client.__aexit__())
        self._thread.close()

    def ask(self, items: Sequence[ScoreItem], groups: Iterable[str]) -> None:
        """Send the items, which belong to these groups, together: they may be answered together too."""
        self._calls = [call for call in self._calls if not call.future.done()]
        self._calls.append(_Call(self._thread.begin(self._score(list(items))), set(groups)))

    def results(self, seconds: float) -> list[ScoreResult]:
        """What has come since the last call; waits up to ``seconds`` for the first. ``RewardError`` where the service
        refuses what it was asked."""
        found: list[ScoreResult] = []
        try:
            one = self._results.get(timeout=seconds) if seconds > 0 else self._results.get_nowait()
            while True:
                if isinstance(one, Exception):
                    raise one
                found.append(one)
                one = self._results.get_nowait()
        except queue.Empty:
            return found

    def cancel(self, groups: Iterable[str]) -> None:
        """Forget these groups. What was sent for no other group is cancelled at the service too; other results may
        still come, and are for nobody."""
        forgotten = set(groups)
        for call in self._calls:
            call.groups.difference_update(forgotten)
            if not call.groups:
                call.future.cancel()

    async def _connect(self) -> RewardClient:
        url, token, deadline_seconds = self._arguments
        return RewardClient(url, token, deadline_seconds)

    async def _score(self, items: list[ScoreItem]) -> None:
        try:
            async for result in self._client.score(items):
                self._results.put(result)
        except Exception as error:
            self._results.put(error)  # raised where the results are read
