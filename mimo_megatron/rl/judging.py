"""Rewards while responses are still being sampled: each is judged as it comes, by the service, in the background."""

import queue
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from mimo_megatron.reward.client import RewardClient
from mimo_megatron.reward.loop_thread import LoopThread
from mimo_megatron.reward.wire import ScoreItem, ScoreResult


class Judging:
    """Items under way by the name of their group. Everything asked for comes back once, or is cancelled.

    A service that does not answer is waited for until the deadline; then a result is ``unknown``, never 0.
    """

    def __init__(self, url: str, token: str | None, deadline_seconds: float) -> None:
        self._arguments = (url, token, deadline_seconds)
        self._results: queue.SimpleQueue[ScoreResult | Exception] = queue.SimpleQueue()
        self._running: dict[str, list[Future[None]]] = {}

    def __enter__(self) -> Self:
        self._thread = LoopThread("judging")
        self._client = self._thread.run(self._connect())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel(list(self._running))
        self._thread.run(self._client.__aexit__())
        self._thread.close()

    def ask(self, group: str, items: Sequence[ScoreItem]) -> None:
        self._running = {
            name: open_ones
            for name, futures in self._running.items()
            if (open_ones := [one for one in futures if not one.done()])
        }
        self._running.setdefault(group, []).append(self._thread.begin(self._score(list(items))))

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

    def cancel(self, groups: Sequence[str]) -> None:
        """Forget these groups, here and at the service. Their results may still come, and are for nobody."""
        ending = [future for group in groups for future in self._running.pop(group, [])]
        for future in ending:
            future.cancel()

    async def _connect(self) -> RewardClient:
        url, token, deadline_seconds = self._arguments
        return RewardClient(url, token, deadline_seconds)

    async def _score(self, items: list[ScoreItem]) -> None:
        try:
            async for result in self._client.score(items):
                self._results.put(result)
        except Exception as error:
            self._results.put(error)  # raised where the results are read
