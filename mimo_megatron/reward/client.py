"""The service's client, for event loops and plain code. Every item gets a result; what cannot be had is ``unknown``.

A restart of the service, a full queue or a lost connection is waited out and asked again, which is free: the service
works each verdict out once. At the deadline the rest is ``unknown``. Only a caller's own mistake raises: a wrong token,
items that break the wire format. How many items are under way follows the service: a few more with every answer, half
as many after a refusal or a lost connection (AIMD, as in TCP).
"""

import asyncio
import random
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from pydantic import ValidationError

from mimo_megatron.errors import RewardError
from mimo_megatron.log import get_logger
from mimo_megatron.reward.loop_thread import LoopThread
from mimo_megatron.reward.verdict import Reason, Verdict, invalid, unknown
from mimo_megatron.reward.wire import (
    MAX_BODY_BYTES,
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    CancelRequest,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
)

_MAX_BATCH_BYTES = MAX_BODY_BYTES * 3 // 4
_MAX_DEADLINE_MS = 600_000
_GRACE_SECONDS = 2.0
"""For the answer's way back after the service's own deadline."""
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds before asking again, by the number of failures in a row."""


class Window:
    """How many items may be under way. Shared by all calls of a client."""

    def __init__(self, start: int = 256, most: int = 4096) -> None:
        self.limit = float(start)
        self.in_flight = 0
        self._most = most
        self._halved = 0.0
        self._changed = asyncio.Event()

    @property
    def room(self) -> int:
        return max(int(self.limit) - self.in_flight, 0)

    async def wait(self) -> None:
        """Until there is room."""
        while not self.room:
            self._changed.clear()
            await self._changed.wait()

    def take(self, num_items: int) -> None:
        self.in_flight += num_items

    def give(self, num_items: int) -> None:
        self.in_flight -= num_items
        self._changed.set()

    def grow(self, num_items: int) -> None:
        """32 more for every window's worth of answers."""
        self.limit = min(self.limit + 32 * num_items / self.limit, self._most)

    def halve(self) -> None:
        """Once a second at most: what was sent together is refused together."""
        if time.monotonic() - self._halved >= 1.0:
            self._halved = time.monotonic()
            self.limit = max(self.limit / 2, 1.0)


@dataclass
class _Call:
    """One call of ``score``."""

    until: float
    todo: deque[ScoreItem]
    failures: int = 0
    not_before: float = 0.0
    batches: dict[str, list[ScoreItem]] = field(default_factory=dict)


class RewardClient:
    """For one event loop; ``score`` may be called by many tasks at once."""

    def __init__(
        self, url: str, token: str | None = None, deadline_seconds: float = 600.0, batch_items: int = 64
    ) -> None:
        assert 1 <= batch_items <= MAX_ITEMS
        if not url.startswith(("http://", "https://")):
            raise RewardError(f"the reward service's address {url!r} must begin with http:// or https://")
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, trust_env=False)
        self._deadline_seconds, self._batch_items = deadline_seconds, batch_items
        self.window = Window()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def score_all(self, items: Sequence[ScoreItem], deadline_seconds: float | None = None) -> list[ScoreResult]:
        """Results in the order of the items, one each."""
        results = {}
        async with aclosing(self.score(items, deadline_seconds)) as stream:
            async for result in stream:
                results[result.id] = result
        return [results[item.id] for item in items]

    async def score(
        self, items: Sequence[ScoreItem], deadline_seconds: float | None = None
    ) -> AsyncGenerator[ScoreResult, None]:
        """Results as they come, one for each item. Leaving the loop early cancels the rest at the service.

        Raises ``RewardError`` where the caller must mend something; faults of the service are ``unknown`` results.
        """
        if len({item.id for item in items}) < len(items):
            raise RewardError("two items have the same id; ids tell results apart")
        seconds = self._deadline_seconds if deadline_seconds is None else deadline_seconds
        call = _Call(time.monotonic() + seconds, deque())
        for item in items:
            if (too_large := _too_large(item)) is not None:
                yield too_large
            else:
                call.todo.append(item)
        running: set[asyncio.Task[list[ScoreResult]]] = set()
        room: asyncio.Task[None] | None = None
        try:
            while call.todo or running:
                self._start(call, running)
                room = asyncio.create_task(self._room(call)) if call.todo else None
                waiting: set[asyncio.Task[Any]] = {*running, room} if room else {*running}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if room:
                    room.cancel()
                if call.todo and time.monotonic() >= call.until:
                    while call.todo:  # batches may be put back while the caller holds a result
                        yield _result(call.todo.popleft(), unknown(Reason.DEADLINE))
                for done in [one for one in running if one.done()]:
                    running.discard(done)
                    for result in done.result():
                        yield result
        finally:
            for task in (*running, *([room] if room else [])):
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._cancel(list(call.batches))

    def _start(self, call: _Call, running: set[asyncio.Task[list[ScoreResult]]]) -> None:
        now = time.monotonic()
        while call.todo and self.window.room and call.not_before <= now < call.until:
            batch, num_bytes = [call.todo.popleft()], 0
            num_items = min(self._batch_items, self.window.room)
            while call.todo and len(batch) < num_items and num_bytes < _MAX_BATCH_BYTES - MAX_ITEM_BYTES:
                batch.append(call.todo.popleft())
                num_bytes += len(batch[-1].model_dump_json())
            self.window.take(len(batch))
            running.add(asyncio.create_task(self._send(call, batch)))

    async def _room(self, call: _Call) -> None:
        """Until more may be sent, or the deadline."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(call.until - time.monotonic(), 0)):
                await asyncio.sleep(max(call.not_before - time.monotonic(), 0))
                await self.window.wait()

    async def _send(self, call: _Call, batch: list[ScoreItem]) -> list[ScoreResult]:
        """Their results; none where they were put back, to be sent again."""
        name = uuid.uuid4().hex
        call.batches[name] = batch
        left = call.until - time.monotonic()
        deadline_ms = min(max(int(left * 1000), 1), _MAX_DEADLINE_MS)
        request = ScoreRequest(batch_id=name, items=batch, deadline_ms=deadline_ms)
        try:
            async with asyncio.timeout(left + _GRACE_SECONDS):
                answer = await self._http.post("/v1/score", content=request.model_dump_json(), timeout=None)
            results = self._read(answer, batch)
        except TimeoutError:
            self.window.halve()
            results = [_result(item, unknown(Reason.DEADLINE)) for item in batch]
        except (httpx.HTTPError, _AskAgain) as error:
            self._put_back(call, batch, error)
            results = []
        finally:
            self.window.give(len(batch))
        call.batches.pop(name)
        if results:
            call.failures = 0
            self.window.grow(len(batch))
        return results

    def _read(self, answer: httpx.Response, batch: list[ScoreItem]) -> list[ScoreResult]:
        if answer.status_code == 429 or answer.status_code >= 500 or answer.status_code == 408:
            raise _AskAgain(f"status {answer.status_code}", answer.headers.get("retry-after", ""))
        if answer.status_code != 200:
            raise RewardError(f"the reward service refuses the request ({answer.status_code}): {answer.text[:500]}")
        try:
            results = ScoreResponse.model_validate_json(answer.content).results
        except ValidationError as error:
            raise _AskAgain("an answer that is none", "") from error
        if [result.id for result in results] != [item.id for item in batch]:
            raise _AskAgain("results of other items", "")
        return results

    def _put_back(self, call: _Call, batch: list[ScoreItem], error: Exception) -> None:
        self.window.halve()
        call.todo.extendleft(reversed(batch))
        pause = _PAUSES[min(call.failures, len(_PAUSES) - 1)]
        call.failures += 1
        if isinstance(error, _AskAgain) and error.retry_after.isdigit():
            pause = float(error.retry_after)
        call.not_before = max(call.not_before, time.monotonic() + pause * random.uniform(0.8, 1.2))
        get_logger().info("reward service: %r; %d items wait %.2f s", error, len(batch), pause)

    async def _cancel(self, batches: list[str]) -> None:
        async def one(name: str) -> None:
            content = CancelRequest(batch_id=name).model_dump_json()
            with suppress(httpx.HTTPError):
                await self._http.post("/v1/cancel", content=content, timeout=1.0)

        await asyncio.gather(*map(one, batches))


class SyncRewardClient:
    """The same for plain code; any number of threads may share one, and its window."""

    def __init__(
        self, url: str, token: str | None = None, deadline_seconds: float = 600.0, batch_items: int = 64
    ) -> None:
        self._arguments = (url, token, deadline_seconds, batch_items)

    def __enter__(self) -> Self:
        self._thread = LoopThread("reward-client")
        try:
            self._client = self._thread.run(self._make())
        except BaseException:
            self._thread.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.run(self._client.__aexit__())
        self._thread.close()

    def score_all(self, items: Sequence[ScoreItem], deadline_seconds: float | None = None) -> list[ScoreResult]:
        return self._thread.run(self._client.score_all(items, deadline_seconds))

    def score(self, items: Sequence[ScoreItem], deadline_seconds: float | None = None) -> Iterator[ScoreResult]:
        stream = self._client.score(items, deadline_seconds)
        try:
            while (result := self._thread.run(_next(stream))) is not None:
                yield result
        finally:
            self._thread.run(_close(stream))

    async def _make(self) -> RewardClient:
        return RewardClient(*self._arguments)


class _AskAgain(Exception):
    def __init__(self, what: str, retry_after: str) -> None:
        super().__init__(what)
        self.retry_after = retry_after


async def _next(stream: AsyncGenerator[ScoreResult, None]) -> ScoreResult | None:
    return await anext(stream, None)


async def _close(stream: AsyncGenerator[ScoreResult, None]) -> None:
    await stream.aclose()


def _too_large(item: ScoreItem) -> ScoreResult | None:
    """The verdict on a response that is beyond what the service takes; ``RewardError`` where the rest is."""
    if (num_bytes := len(item.model_dump_json().encode())) <= MAX_ITEM_BYTES:
        return None
    rest = len(item.model_copy(update={"response": ""}).model_dump_json().encode())
    if rest > MAX_ITEM_BYTES // 2:
        raise RewardError(
            f"item {item.id!r} has {num_bytes} bytes, {rest} of them outside the response; the service takes "
            f"{MAX_ITEM_BYTES}. Shorten gold or messages"
        )
    return _result(item, invalid(Reason.TOO_LARGE))


def _result(item: ScoreItem, verdict: Verdict) -> ScoreResult:
    return ScoreResult(id=item.id, status=verdict.status, reward=verdict.reward, reason=verdict.reason, ms=0.0)
