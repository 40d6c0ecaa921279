"""The service without HTTP: takes requests, routes items to lanes, answers in time."""

import asyncio
import contextlib
import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from mimo_megatron.log import get_logger
from mimo_megatron.reward import rules
from mimo_megatron.reward.service.lanes import Queue, judge_math
from mimo_megatron.reward.service.ledger import Key, Ledger, Ticket, item_key
from mimo_megatron.reward.service.metrics import Metrics
from mimo_megatron.reward.service.model_lane import ModelLane
from mimo_megatron.reward.service.pool import AsyncPool
from mimo_megatron.reward.service.replicas import make_replica
from mimo_megatron.reward.service.settings import ServiceSettings
from mimo_megatron.reward.verdict import Reason, Verdict, unknown
from mimo_megatron.reward.wire import (
    MAX_ITEM_BYTES,
    CancelRequest,
    CancelResponse,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    chat_problem,
    image_names,
)

MODEL_TASKS = ("rm_text", "rm_multimodal")
_LANES = {"math": "math", **dict.fromkeys(rules.RULES, "cheap")}
_PACKAGES = ("math-verify", "latex2sympy2-extended", "antlr4-python3-runtime", "sympy", "mpmath", "scipy")
_BURST_SECONDS = 0.004
"""After so long in cheap rules, other requests get their turn."""
_HEALTH_SECONDS = 2.0


class Refused(Exception):
    """A request that breaks a rule of the wire format which its models cannot state."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class _Asked:
    item: ScoreItem
    lane: str
    num_bytes: int
    key: Key | None
    """None in the cheap lane, where working a verdict out costs less than looking it up."""


class Scorer:
    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.pool = AsyncPool(settings.pool)
        self.ledger = Ledger(settings.cached_verdicts)
        self.queues = {
            name: Queue(name, settings.queue_items, settings.queue_bytes) for name in ("cheap", "math", *MODEL_TASKS)
        }
        self.models: dict[str, ModelLane] = {}
        self.metrics = Metrics(self.pool, self.queues, self.ledger, self.models)
        self._fixed_version = _version_of_rules(settings)
        self._are_models_ready: dict[str, bool] = {}
        self._health: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """``RewardError`` where the packages give wrong verdicts; nothing is served then."""
        await self.pool.start()
        by_task = defaultdict(list)
        for spec in self.settings.models:
            by_task[spec.task].append(make_replica(spec))
        for task, replicas in by_task.items():
            self.models[task] = ModelLane(task, replicas, self.settings.image_root)
        self._health = asyncio.create_task(self._watch_models())

    async def close(self) -> None:
        if self._health is not None:
            self._health.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health
        for lane in self.models.values():
            await lane.close()
        await self.pool.close()

    @property
    def reward_version(self) -> str:
        """Of all that can change a verdict. The models' part is known when they have answered."""
        models = {task: lane.version for task, lane in self.models.items()}
        return hashlib.sha256(json.dumps([self._fixed_version, models]).encode()).hexdigest()[:16]

    def readiness(self) -> dict[str, Any]:
        """What /readyz says; ``ready`` needs every worker warm and one replica of each model answering."""
        waiting = [] if self.pool.is_warm else ["workers"]
        waiting += [task for task in self.models if not self._are_models_ready.get(task)]
        degraded = [] if self.pool.is_isolated else ["workers can reach the network: this kernel gives them none apart"]
        return dict(
            ready=not waiting, waiting_for=waiting, degraded=degraded, reward_version=self.reward_version,
            tasks=sorted({*_LANES, *self.models}),
        )  # fmt: skip

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """A verdict for every item by the request's deadline. ``Refused``, ``Overloaded``."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        seconds = self.settings.deadline_seconds if request.deadline_ms is None else request.deadline_ms / 1000
        asked = [self._prepare(item) for item in request.items]
        if len({one.item.id for one in asked}) < len(asked):
            raise Refused(422, "repeated_id", "two items of the batch have the same id")
        self._admit(asked)
        tickets = {
            one.item.id: self.ledger.ask(one.key, request.batch_id, partial(self._judge, one))
            for one in asked
            if one.key is not None
        }
        try:
            cheap = await self._judge_cheap([one for one in asked if one.key is None], began + seconds)
            await self._wait(tickets, began + seconds)
        finally:
            for one in asked:
                if one.key is not None and not tickets[one.item.id].verdict.done():
                    self.ledger.leave(one.key, tickets[one.item.id], Reason.DEADLINE)
        results = []
        for one in asked:
            ticket = tickets.get(one.item.id)
            verdict, finished = cheap[one.item.id] if ticket is None else (ticket.verdict.result(), ticket.finished)
            self.metrics.observe(one.item.task, verdict, finished - began)
            results.append(_result(one.item.id, verdict, finished - began))
        return ScoreResponse(batch_id=request.batch_id, reward_version=self.reward_version, results=results)

    def cancel(self, request: CancelRequest) -> CancelResponse:
        return CancelResponse(cancelled=self.ledger.cancel(request.batch_id, request.ids))

    def _prepare(self, item: ScoreItem) -> _Asked:
        blob = item.model_dump_json(exclude={"id"}).encode()
        if len(blob) > MAX_ITEM_BYTES:
            raise Refused(413, "item_too_large", f"item {item.id!r} has {len(blob)} bytes, at most {MAX_ITEM_BYTES}")
        if item.task in MODEL_TASKS:
            self._check_messages(item)
            return _Asked(item, item.task, len(blob), item_key(item, blob, self.reward_version))
        lane = _LANES[item.task]
        key = None if lane == "cheap" else item_key(item, blob, self._fixed_version)
        return _Asked(item, lane, len(blob), key)

    def _check_messages(self, item: ScoreItem) -> None:
        if item.task not in self.models:
            raise Refused(422, "no_model", f"no reward model serves {item.task}: start the service with --reward-model")
        if problem := chat_problem(item.meta.messages):
            raise Refused(422, "bad_messages", f"item {item.id!r}: meta.{problem}")
        if item.task == "rm_text" and image_names(item.meta.messages):
            raise Refused(422, "bad_messages", f"item {item.id!r}: rm_text takes no images; use rm_multimodal")

    def _admit(self, asked: list[_Asked]) -> None:
        """All items or none: a batch that is half taken would have to be sent again in full."""
        for lane, queue in self.queues.items():
            new = [
                one.num_bytes
                for one in asked
                if one.lane == lane and (one.key is None or not self.ledger.knows(one.key))
            ]
            queue.check_room(len(new), sum(new))

    async def _judge(self, one: _Asked) -> Verdict:
        try:
            with self.queues[one.lane].holds(one.num_bytes):
                if one.lane == "math":
                    return await judge_math(self.pool, one.item)
                return await self.models[one.lane].judge(one.item)
        except Exception:
            # Like rules.score: a fault of ours must not end the service, nor teach anything.
            get_logger().exception("lane %s failed on an item of %d bytes", one.lane, one.num_bytes)
            return unknown(Reason.INTERNAL)

    async def _judge_cheap(self, asked: list[_Asked], until: float) -> dict[str, tuple[Verdict, float]]:
        """By id: verdict, and the time at which it was there."""
        loop = asyncio.get_running_loop()
        verdicts: dict[str, tuple[Verdict, float]] = {}
        with self.queues["cheap"].holds(sum(one.num_bytes for one in asked), len(asked)):
            turn = loop.time()
            for one in asked:
                item = one.item
                if (now := loop.time()) > turn + _BURST_SECONDS:
                    await asyncio.sleep(0)
                    turn = now = loop.time()
                late = now > until
                verdict = (
                    unknown(Reason.DEADLINE) if late else rules.score(item.task, item.response, item.gold, item.meta)
                )
                verdicts[item.id] = verdict, loop.time()
        return verdicts

    async def _wait(self, tickets: dict[str, Ticket], until: float) -> None:
        if waiting := [ticket.verdict for ticket in tickets.values() if not ticket.verdict.done()]:
            await asyncio.wait(waiting, timeout=max(until - asyncio.get_running_loop().time(), 0))

    async def _watch_models(self) -> None:
        while True:
            for task, lane in self.models.items():
                self._are_models_ready[task] = await lane.is_ready()
            await asyncio.sleep(_HEALTH_SECONDS)


def _version_of_rules(settings: ServiceSettings) -> str:
    """The rules' sources, packages and limits: with the same ones, the same verdict."""
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(rules.__file__).parent.glob("*.py"))))
    limits = asdict(settings.pool.limits)
    calibrations = [asdict(spec.calibration) for spec in settings.models if spec.calibration]
    return json.dumps([sources.hexdigest(), {name: _installed(name) for name in _PACKAGES}, limits, calibrations])


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _result(name: str, verdict: Verdict, seconds: float) -> ScoreResult:
    return ScoreResult(
        id=name, status=verdict.status, reward=verdict.reward, reason=verdict.reason, parts=dict(verdict.parts),
        answer=verdict.answer, ms=round(max(seconds, 0.0) * 1000, 3),
    )  # fmt: skip
