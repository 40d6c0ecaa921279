"""The trainer's weights into every engine, compared, and the gate opened; or the run stops with nothing sampled.

A transaction: announce, send, check every tensor, forget caches, compare log-probabilities, open. Until the last part
every engine's gate is closed. What fails is sent once more, whole; then ``SyncError`` on all ranks. An engine that is
lost on the way is no fault of the weights: the others go on, and so does the one that takes its place.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mimo_megatron.config.rl import SyncConfig
from mimo_megatron.errors import EngineError, EngineLostError, SyncError
from mimo_megatron.log import get_logger
from mimo_megatron.mcore.boot import world
from mimo_megatron.mcore.overlap import finish_param_gather
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.rl.engine.protocol import RolloutEngine
from mimo_megatron.rl.engine.several import SeveralEngines
from mimo_megatron.rl.sync.canary import Gap, compare, trainer_logprobs
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.train.step import Trainer
from mimo_megatron.types import EncodedSample

_MOST_ATTEMPTS = 5
_MOST_REFUSALS = 2
"""Of one version, by engines that live."""


@dataclass(frozen=True)
class Published:
    version: int
    seconds: float
    gaps: tuple[Gap, ...]
    """Of this rank's first engine, by prompt of the canary; the same prompts each time."""


def publish(
    trainer: Trainer,
    publisher: Publisher,
    engines: SeveralEngines | None,
    version: int,
    canary: Sequence[EncodedSample],
    limits: SyncConfig,
) -> Published:
    """Bring policy ``version`` into this rank's ``engines``. A collective over all ranks."""
    began = time.perf_counter()
    finish_param_gather(trainer.chunks)  # the publisher reads parameters, of modules that it was given at the start
    current: list[RolloutEngine] = []
    num_refused = 0
    for _ in range(_MOST_ATTEMPTS):
        pending = _without(engines, current)
        faults = _sent(publisher, pending, version)
        current += [one for one, fault in zip(pending, faults, strict=True) if fault is None]
        _let_go(engines, pending, faults)
        if not (everywhere := _of_all_ranks(faults)):
            break
        get_logger().warning("policy version %d is sent again: %s", version, everywhere[0])
        num_refused += any(not isinstance(fault, EngineLostError) for fault in everywhere)
        if num_refused == _MOST_REFUSALS:
            raise SyncError(f"policy version {version} did not reach the engines, sent twice: {everywhere[0]}")
    else:
        raise EngineLostError(f"engines end whenever policy version {version} is sent to them: {everywhere[0]}")
    gaps = _compared(trainer, engines, canary, limits, version)
    for engine in list(engines.engines) if engines is not None else ():
        try:
            engine.open_gate()
        except EngineLostError as fault:
            assert engines is not None
            engines.lose(engine, fault)
    return Published(version, time.perf_counter() - began, gaps)


def _without(engines: SeveralEngines | None, current: Sequence[RolloutEngine]) -> list[RolloutEngine]:
    """This rank's engines, with another for each that was lost, but for those that are ``current``."""
    if engines is None:
        return []
    engines.mend()
    return [one for one in engines.engines if one not in current]


def _sent(publisher: Publisher, engines: Sequence[RolloutEngine], version: int) -> list[EngineError | None]:
    """What went wrong with each engine of this rank, or None. The buckets are gathered to their end whatever happens to
    an engine: the other ranks wait in the same collectives."""
    manifest = publisher.manifest(version)
    faults = [_fault_of(engine.begin_update, manifest) for engine in engines]
    for bucket in publisher.buckets(version):
        faults = [fault or _fault_of(one.receive, bucket) for fault, one in zip(faults, engines, strict=True)]
    return [fault or _fault_of(one.finish_update) for fault, one in zip(faults, engines, strict=True)]


def _fault_of(action: Callable[..., None], *arguments: object) -> EngineError | None:
    try:
        action(*arguments)
    except EngineError as error:
        return error
    return None


def _let_go(
    engines: SeveralEngines | None, asked: Sequence[RolloutEngine], faults: Sequence[EngineError | None]
) -> None:
    """Those that are lost."""
    for engine, fault in zip(asked, faults, strict=True):
        if engines is not None and isinstance(fault, EngineLostError):
            engines.lose(engine, fault)


def _compared(
    trainer: Trainer, engines: SeveralEngines | None, canary: Sequence[EncodedSample], limits: SyncConfig, version: int
) -> tuple[Gap, ...]:
    """The gaps of this rank's first engine. ``SyncError`` on all ranks where one is too large anywhere; an engine that
    is lost meanwhile is let go, unless it is a rank's last."""
    expected = trainer_logprobs(trainer, canary)
    asked = list(engines.engines) if engines is not None else []
    gaps: list[Sequence[Gap]] = []
    faults: list[EngineError | None] = []
    for engine in asked:
        try:
            gaps.append(compare(engine.logprobs(list(canary)), expected, limits, version))
            faults.append(None)
        except EngineError as error:
            faults.append(error)
    _let_go(engines, asked, faults)
    is_without = bool(asked) and engines is not None and not engines.engines
    serious = [one for one in faults if is_without or not isinstance(one, EngineLostError)]
    if everywhere := _of_all_ranks(serious):
        raise SyncError(str(everywhere[0]))
    return tuple(gaps[0]) if gaps else ()


def _of_all_ranks(faults: Sequence[EngineError | None]) -> list[EngineError]:
    """Those that are any. A collective over all ranks."""
    return [one for some in gather_objects(list(faults), world()) for one in some if one is not None]
