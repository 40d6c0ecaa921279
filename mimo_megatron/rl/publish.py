"""The trainer's weights into every engine, compared, and the gate opened; or the run stops with nothing sampled.

A transaction: announce, send, check every tensor, forget caches, compare log-probabilities, open. Until the last part
every engine's gate is closed. What fails is sent once more, whole; then ``SyncError`` on all ranks.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mimo_megatron.config.rl import SyncConfig
from mimo_megatron.errors import EngineError, SyncError
from mimo_megatron.log import get_logger
from mimo_megatron.mcore.boot import world
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.rl.engine.protocol import RolloutEngine
from mimo_megatron.rl.sync.canary import Gap, compare, trainer_logprobs
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.train.step import Trainer
from mimo_megatron.types import EncodedSample


@dataclass(frozen=True)
class Published:
    version: int
    seconds: float
    gaps: tuple[Gap, ...]
    """Of this rank's first engine, by prompt of the canary; the same prompts each time."""


def publish(
    trainer: Trainer,
    publisher: Publisher,
    engines: Sequence[RolloutEngine],
    version: int,
    canary: Sequence[EncodedSample],
    limits: SyncConfig,
) -> Published:
    """Bring policy ``version`` into this rank's ``engines``. A collective over all ranks."""
    began = time.perf_counter()
    for attempt in (1, 2):
        faults = _everywhere(_sent(publisher, engines, version))
        if not faults:
            break
        get_logger().warning("policy version %d, attempt %d: %s", version, attempt, faults[0])
    else:
        raise SyncError(f"policy version {version} did not reach the engines, sent twice: {faults[0]}")
    expected = trainer_logprobs(trainer, canary)
    gaps: list[Gap] = []

    def check() -> None:
        for engine in engines:
            found = compare(engine.logprobs(list(canary)), expected, limits, version)
            gaps.extend(found if not gaps else ())

    if faults := _everywhere(_first_fault([check])()):
        raise SyncError(faults[0])
    for engine in engines:
        engine.open_gate()
    return Published(version, time.perf_counter() - began, tuple(gaps))


def _sent(publisher: Publisher, engines: Sequence[RolloutEngine], version: int) -> str:
    """What went wrong on this rank, or nothing. The buckets are gathered to their end whatever happens to an engine:
    the other ranks wait in the same collectives."""
    manifest = publisher.manifest(version)
    fault = _first_fault(engine.begin_update for engine in engines)(manifest)
    for bucket in publisher.buckets(version):
        fault = fault or _first_fault(engine.receive for engine in engines)(bucket)
    return fault or _first_fault(engine.finish_update for engine in engines)()


def _first_fault(actions: Iterable[Callable[..., None]]) -> Callable[..., str]:
    """Calls one after another, until one fails: its fault, or nothing."""

    def call(*arguments: object) -> str:
        try:
            for action in actions:
                action(*arguments)
        except EngineError as error:
            return str(error)
        return ""

    return call


def _everywhere(fault: str) -> list[str]:
    """The faults of all ranks."""
    return [one for one in gather_objects(fault, world()) if one]
