"""Workers that are killed and replaced, so that no job can take another's time, memory or verdict.

Invariants: the clock of a job starts when a worker gets it; a job whose worker had to be killed is given to one
more worker, then never again; a worker lost without the job's fault costs the job nothing but a repetition; when this
process dies, by whatever signal, no worker outlives it. A ProcessPoolExecutor with timeouts has none of the four.

What travels to and from workers is JSON. Nothing is pickled, not even at start.
"""

import asyncio
import hashlib
import signal
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

from mimo_megatron.errors import RewardError
from mimo_megatron.log import get_logger
from mimo_megatron.reward.loop_thread import LoopThread
from mimo_megatron.reward.service import frames
from mimo_megatron.reward.service.nursery import Nursery, NurseryLost, Worker
from mimo_megatron.reward.service.worker import Limits
from mimo_megatron.reward.verdict import Reason

_OWN_FAULT_SIGNALS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU}
"""How a process dies of what it computes. SIGKILL that we did not send comes from outside."""
MAX_KILLS, MAX_LOSSES = 2, 3


@dataclass(frozen=True)
class PoolSettings:
    num_workers: int = 2
    limits: Limits = field(default_factory=Limits)
    recycle_jobs: int = 2000
    recycle_rss_bytes: int = 400 << 20
    quarantine_size: int = 10_000
    target: str = "mimo_megatron.reward.service.jobs:handle"
    warm: str = "mimo_megatron.reward.service.jobs:warm"


@dataclass(frozen=True)
class Outcome:
    """What a job returned, or why it did not: ``killed_twice``, ``worker_lost`` or ``internal``."""

    value: dict[str, Any] | None
    reason: Reason | None = None


class AsyncPool:
    """For one event loop. ``events`` counts kills by cause (``deadline``, ``memory``, ``crash``), losses, spawns,
    recycled workers and jobs answered from quarantine."""

    def __init__(self, settings: PoolSettings | None = None) -> None:
        self.settings = settings or PoolSettings()
        self.events: Counter[str] = Counter()
        self.workers: list[Worker | None] = [None] * self.settings.num_workers
        self._nursery = Nursery(self.settings.target, self.settings.warm, self.settings.limits)
        self._starting = asyncio.Lock()
        self._jobs: deque[tuple[dict[str, Any], asyncio.Future[Outcome]]] = deque()
        self._bell = asyncio.Event()
        """Rung when a job arrives or a worker ends: idle slots look round."""
        self._quarantine: OrderedDict[bytes, None] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_warm(self) -> bool:
        return all(worker is not None and not worker.ended.done() for worker in self.workers)

    @property
    def is_isolated(self) -> bool:
        return self._nursery.isolated

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantine)

    async def start(self) -> None:
        """Warm the zygote and begin to fork workers. ``RewardError`` where the self-test finds problems."""
        await self._nursery.start()
        self._tasks = [asyncio.create_task(self._work(slot)) for slot in range(self.settings.num_workers)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            if worker is not None:
                worker.close()
        await self._nursery.close()
        for _, answer in self._jobs:
            answer.cancel()

    async def call(self, job: dict[str, Any]) -> Outcome:
        """The outcome of ``job`` on some worker. A cancelled call gives its place in the queue back."""
        if _digest(job) in self._quarantine:
            self.events["quarantined"] += 1
            return Outcome(None, Reason.KILLED_TWICE)
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._jobs.append((job, answer))
        self._bell.set()
        return await answer

    async def _work(self, slot: int) -> None:
        while True:
            worker = await self._worker(slot)
            if not self._jobs:
                self._bell.clear()
                await self._bell.wait()
                continue
            job, answer = self._jobs.popleft()
            if answer.done():
                continue
            try:
                outcome = await self._run(slot, worker, job, answer)
            except Exception:  # a worker that answers what none of ours would; its slot must live on
                get_logger().exception("a reward worker was given up")
                self._discard(slot)
                outcome = Outcome(None, Reason.INTERNAL)
            if not answer.done():
                answer.set_result(outcome)

    async def _run(self, slot: int, worker: Worker, job: dict[str, Any], answer: asyncio.Future[Outcome]) -> Outcome:
        """The outcome after as many workers as ``job`` may cost."""
        frame = frames.encode(job)
        kills = losses = 0
        while not answer.cancelled():
            reply, cause = await self._once(worker, frame)
            if reply is not None:
                self._maybe_recycle(slot, worker)
                if "value" in reply:
                    return Outcome(reply["value"])
                get_logger().warning("a reward worker failed: %s", reply.get("text"))
                return Outcome(None, Reason.INTERNAL)
            self.events[cause] += 1
            kills += cause != "lost"
            losses += cause == "lost"
            self._discard(slot)
            if kills == MAX_KILLS:
                self._put_in_quarantine(job)
                return Outcome(None, Reason.KILLED_TWICE)
            if losses == MAX_LOSSES:
                return Outcome(None, Reason.WORKER_LOST)
            worker = await self._worker(slot)
        return Outcome(None, Reason.CANCELLED)

    async def _once(self, worker: Worker, frame: bytes) -> tuple[dict[str, Any] | None, str]:
        """The reply and "", or None and the cause: ``deadline``, ``memory``, ``crash`` or ``lost``."""
        try:
            reply = await worker.ask(frame, self.settings.limits.seconds)
        except TimeoutError:
            return None, "deadline"
        if reply is None:
            try:
                ended_by = await asyncio.wait_for(asyncio.shield(worker.ended), 1.0)
            except TimeoutError:  # its socket is closed but it lives: not what a worker of ours does by itself
                return None, "crash"
            return None, "crash" if ended_by in _OWN_FAULT_SIGNALS else "lost"
        if reply.get("fault") == "memory":
            return None, "memory"
        worker.rss_bytes = int(reply.get("rss", worker.rss_bytes))
        return reply, ""

    async def _worker(self, slot: int) -> Worker:
        """The living worker of this slot; a new one where there is none."""
        while (worker := self.workers[slot]) is None or worker.ended.done():
            if worker is not None:
                self.events["lost"] += 1
                self._discard(slot)
            try:
                worker = self.workers[slot] = await self._nursery.spawn()
                worker.ended.add_done_callback(lambda _: self._bell.set())
                self.events["spawned"] += 1
            except NurseryLost:
                await self._restart_nursery()
            except OSError as error:  # out of file handles, say, which may pass
                get_logger().error("no reward worker can be started: %s", error)
                await asyncio.sleep(1.0)
        return worker

    async def _restart_nursery(self) -> None:
        async with self._starting:
            if self._nursery.is_alive:
                return
            get_logger().warning("the process that reward workers are forked from died; starting another")
            await self._nursery.close()
            try:
                await self._nursery.start()
            except (RewardError, OSError) as error:  # a full machine, say; jobs wait, and end by their own deadlines
                get_logger().error("%s", error)
                await asyncio.sleep(1.0)

    def _discard(self, slot: int) -> None:
        if worker := self.workers[slot]:
            worker.close()
            self.workers[slot] = None

    def _maybe_recycle(self, slot: int, worker: Worker) -> None:
        if worker.num_jobs >= self.settings.recycle_jobs or worker.rss_bytes > self.settings.recycle_rss_bytes:
            self.events["recycled"] += 1
            self._discard(slot)

    def _put_in_quarantine(self, job: dict[str, Any]) -> None:
        self._quarantine[_digest(job)] = None
        while len(self._quarantine) > self.settings.quarantine_size:
            self._quarantine.popitem(last=False)


class MathPool:
    """The same pool for plain threads, on an event loop of its own: ``with MathPool() as pool: pool.call(job)``."""

    def __init__(self, settings: PoolSettings | None = None) -> None:
        self._settings = settings

    def __enter__(self) -> Self:
        self._thread = LoopThread("reward-pool")
        self.pool = self._thread.run(self._make())
        try:
            self._thread.run(self.pool.start())
        except BaseException:
            self._thread.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.run(self.pool.close())
        self._thread.close()

    def call(self, job: dict[str, Any]) -> Outcome:
        return self._thread.run(self.pool.call(job))

    def map(self, jobs: list[dict[str, Any]]) -> list[Outcome]:
        """Outcomes in the order of ``jobs``, all workers at work."""
        return self._thread.run(_gather(self.pool.call, jobs))

    async def _make(self) -> AsyncPool:
        return AsyncPool(self._settings)


async def _gather(call: Callable[[dict[str, Any]], Awaitable[Outcome]], jobs: list[dict[str, Any]]) -> list[Outcome]:
    return list(await asyncio.gather(*map(call, jobs)))


def _digest(job: dict[str, Any]) -> bytes:
    return hashlib.sha256(frames.encode(job)).digest()
