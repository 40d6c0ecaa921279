"""The trainer's weights into every engine, compared, and the gate opened; or the run stops with nothing sampled.

A transaction: announce, send, check every tensor, forget caches, compare log-probabilities, open. Until the last part
every engine's gate is closed. What fails is sent once more, whole; then ``SyncError`` on all ranks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    pending = list(engines)
    for attempt in (1, 2):
        faults = _sent(publisher, pending, version)
        pending = [engine for engine, fault in zip(pending, faults, strict=True) if fault]
        if not (everywhere := _of_all_ranks(faults)):
            break
        get_logger().warning("policy version %d, attempt %d: %s", version, attempt, everywhere[0])
    else:
        raise SyncError(f"policy version {version} did not reach the engines, sent twice: {everywhere[0]}")
    expected = trainer_logprobs(trainer, canary)
    compared = [_compared(engine, canary, expected, limits, version) for engine in engines]
    if everywhere := _of_all_ranks([found for found in compared if isinstance(found, str)]):
        raise SyncError(everywhere[0])
    for engine in engines:
        engine.open_gate()
    gaps = [found for found in compared if not isinstance(found, str)]
    return Published(version, time.perf_counter() - began, tuple(gaps[0]) if gaps else ())


def _sent(publisher: Publisher, engines: Sequence[RolloutEngine], version: int) -> list[str]:
    """What went wrong with each engine of this rank, or nothing. The buckets are gathered to their end whatever happens
    to an engine: the other ranks wait in the same collectives."""
    manifest = publisher.manifest(version)
    faults = [_fault_of(engine.begin_update, manifest) for engine in engines]
    for bucket in publisher.buckets(version):
        faults = [fault or _fault_of(one.receive, bucket) for fault, one in zip(faults, engines, strict=True)]
    return [fault or _fault_of(one.finish_update) for fault, one in zip(faults, engines, strict=True)]


def _fault_of(action: Callable[..., None], *arguments: object) -> str:
    try:
        action(*arguments)
    except EngineError as error:
        return str(error)
    return ""


def _compared(
    engine: RolloutEngine,
    canary: Sequence[EncodedSample],
    expected: Sequence[NDArray[np.float32]],
    limits: SyncConfig,
    version: int,
) -> list[Gap] | str:
    """The gaps, or what is wrong."""
    try:
        return compare(engine.logprobs(list(canary)), expected, limits, version)
    except EngineError as error:
        return str(error)


def _of_all_ranks(faults: Sequence[str]) -> list[str]:
    """Those that are any. A collective over all ranks."""
    return [one for some in gather_objects(list(faults), world()) for one in some if one]
