"""Items for one reward model: gathered into micro-batches, sent to the replica with the least to do.

A batch that takes longer than nearly all before it, or fails, is sent once more, to another replica if there is one;
the first good answer counts. Where no replica answers, the items are ``unknown``, reason ``model_unavailable``.
"""

import asyncio
import time
from collections import Counter, deque
from pathlib import Path

from mimo_megatron.log import get_logger
from mimo_megatron.reward.answer import Unscorable, final_answer
from mimo_megatron.reward.images import MediaMissing, image_path, read_image
from mimo_megatron.reward.service.replicas import NativeReplica, ReplicaFailed, VllmReplica
from mimo_megatron.reward.verdict import Reason, Verdict, invalid, unknown
from mimo_megatron.reward.wire import ModelItem, ScoreItem, image_names

MAX_BATCH_ITEMS, GATHER_SECONDS = 32, 0.010
MIN_HEDGE_SECONDS = 0.050
_FIRST_HEDGE_SECONDS = 5.0
"""Before twenty answers have shown how long one takes."""
_BATCHES_PER_REPLICA = 4
AnyReplica = NativeReplica | VllmReplica
_Waiting = tuple[ModelItem, dict[str, bytes], asyncio.Future[Verdict]]


class ModelLane:
    """``events`` counts second attempts, failed ones and batches without an answer."""

    def __init__(self, task: str, replicas: list[AnyReplica], image_root: Path | None) -> None:
        self.task = task
        self.replicas = replicas
        self.events: Counter[str] = Counter()
        self.version: str | None = None
        """Of the first replica that answered; another version is refused: one service gives one kind of reward."""
        self._image_root = image_root
        self._sends_images = any(isinstance(replica, VllmReplica) for replica in replicas)
        self._waiting: deque[_Waiting] = deque()
        self._bell = asyncio.Event()
        self._room = asyncio.Semaphore(_BATCHES_PER_REPLICA * len(replicas))
        self._seconds: deque[float] = deque(maxlen=200)
        self._tasks: set[asyncio.Task[None]] = set()
        self._gatherer = asyncio.create_task(self._gather())

    async def close(self) -> None:
        tasks = [self._gatherer, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self.replicas:
            await replica.close()

    async def is_ready(self) -> bool:
        """At least one replica answers."""
        ready = await asyncio.gather(*(replica.is_ready() for replica in self.replicas))
        if self.version is None:
            self.version = next((one.version for one, yes in zip(self.replicas, ready, strict=True) if yes), None)
        return any(ready)

    async def judge(self, item: ScoreItem) -> Verdict:
        try:
            answer = final_answer(item.response, item.meta)
            names = set(image_names(item.meta.messages)) if self._sends_images else set()
            images = await asyncio.to_thread(self._images, names) if names else {}
        except Unscorable as fault:
            return invalid(fault.reason, fault.answer)
        except MediaMissing:
            return unknown(Reason.MEDIA_MISSING)
        asked = ModelItem(id=item.id, messages=item.meta.messages, response=answer)
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, images, verdict))
        self._bell.set()
        return await verdict

    async def _gather(self) -> None:
        while True:
            await self._bell.wait()
            if len(self._waiting) < MAX_BATCH_ITEMS:
                await asyncio.sleep(GATHER_SECONDS)
            await self._room.acquire()  # while every replica has enough to do, the batch grows
            batch: list[_Waiting] = []
            ids: set[str] = set()
            while self._waiting and len(batch) < MAX_BATCH_ITEMS and self._waiting[0][0].id not in ids:
                one = self._waiting.popleft()
                if not one[2].done():
                    batch.append(one)
                    ids.add(one[0].id)
            if not self._waiting:
                self._bell.clear()
            if not batch:
                self._room.release()
                continue
            task = asyncio.create_task(self._answer(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: self._room.release())

    async def _answer(self, batch: list[_Waiting]) -> None:
        items = [item for item, _, _ in batch]
        images = {name: data for _, some, _ in batch for name, data in some.items()}
        verdicts = await self._verdicts(items, images)
        for (_, _, future), verdict in zip(batch, verdicts, strict=True):
            if not future.done():
                future.set_result(verdict)

    async def _verdicts(self, items: list[ModelItem], images: dict[str, bytes]) -> list[Verdict]:
        """From the first of at most two attempts that succeeds."""
        attempts: dict[asyncio.Task[list[Verdict]], AnyReplica] = {}
        try:
            while len(attempts) < 2:
                replica = self._choose(attempts)
                if replica is None:
                    break
                attempts[self._begin(replica, items, images)] = replica
                if (verdicts := await _first(attempts, self._hedge_seconds())) is not None:
                    return verdicts
                self.events["second_attempts"] += len(attempts) == 1
            if attempts and (verdicts := await _first(attempts, None)) is not None:
                return verdicts
        finally:
            for attempt in attempts:
                attempt.cancel()
        self.events["unanswered"] += 1
        return [unknown(Reason.MODEL_UNAVAILABLE)] * len(items)

    def _begin(
        self, replica: AnyReplica, items: list[ModelItem], images: dict[str, bytes]
    ) -> asyncio.Task[list[Verdict]]:
        """An attempt that counts as in flight from now on, so that the next choice sees it."""

        def end(_: object) -> None:
            replica.in_flight -= 1

        replica.in_flight += 1
        replica.breaker.begin()
        attempt = asyncio.create_task(self._attempt(replica, items, images))
        attempt.add_done_callback(end)
        return attempt

    async def _attempt(self, replica: AnyReplica, items: list[ModelItem], images: dict[str, bytes]) -> list[Verdict]:
        began = time.monotonic()
        try:
            verdicts = await replica.rewards(items, images)
            self.version = self.version or replica.version
            if replica.version != self.version:
                raise ReplicaFailed(f"{replica.url} serves {replica.version}, not {self.version}; restart the service")
        except ReplicaFailed as error:
            replica.breaker.fail()
            self.events["failed"] += 1
            get_logger().warning("reward model: %s", error)
            raise
        except BaseException:  # taken back: the other attempt was faster. A replica that never answers must show as one
            is_slow = time.monotonic() - began >= self._hedge_seconds()
            replica.breaker.fail() if is_slow else replica.breaker.drop()
            raise
        replica.breaker.succeed()
        self._seconds.append(time.monotonic() - began)
        return verdicts

    def _choose(self, attempts: dict[asyncio.Task[list[Verdict]], AnyReplica]) -> AnyReplica | None:
        """The untried replica with the least in flight; else one whose attempt has failed already. None where there is
        none whose breaker is closed."""
        usable = [replica for replica in self.replicas if not replica.breaker.is_open]
        fresh = [replica for replica in usable if replica not in attempts.values()]
        failed = [replica for attempt, replica in attempts.items() if attempt.done() and replica in usable]
        return min(fresh or failed, key=lambda replica: replica.in_flight, default=None)

    def _hedge_seconds(self) -> float:
        """The 99th percentile of the last answers, at least 50 ms."""
        if len(self._seconds) < 20:
            return _FIRST_HEDGE_SECONDS
        return max(sorted(self._seconds)[int(0.99 * (len(self._seconds) - 1))], MIN_HEDGE_SECONDS)

    def _images(self, names: set[str]) -> dict[str, bytes]:
        return {name: read_image(image_path(self._image_root, name), name) for name in names}


async def _first(
    attempts: dict[asyncio.Task[list[Verdict]], AnyReplica], seconds: float | None
) -> list[Verdict] | None:
    """The verdicts of the first attempt that succeeds; None when all have failed, or the time is up."""
    until = None if seconds is None else time.monotonic() + seconds
    while running := [attempt for attempt in attempts if not attempt.done()]:
        left = None if until is None else max(until - time.monotonic(), 0)
        done, _ = await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not done or any(not attempt.cancelled() and attempt.exception() is None for attempt in done):
            break
    good = [attempt for attempt in attempts if attempt.done() and not attempt.cancelled() and not attempt.exception()]
    return good[0].result() if good else None
