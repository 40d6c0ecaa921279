"""The training loader: packs of a plan, encoded and collated for one data-parallel rank, one step ahead.

Packs of a step are dealt by predicted cost, equally many to each rank. Invariants: the packs of a step do not depend on
the number of ranks; ``state`` speaks of consumed packs, never of prefetched ones; a damaged sample is dropped
from its pack, counted and listed, and changes nothing else.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.plan import Position
from mimo_megatron.data.records import SampleError
from mimo_megatron.errors import ConfigError
from mimo_megatron.log import get_logger
from mimo_megatron.types import EncodedSample, PackedBatch


def short_digest(digest: bytes) -> int:
    """The first 62 bits: an int64 whose negative is one too."""
    return int.from_bytes(digest[:8], "big") >> 2


@dataclass(frozen=True)
class _Step:
    """A step made ahead of time: this rank's microbatches, where the stream stands after it, and what was dropped."""

    batches: list[PackedBatch]
    after: Position
    faults: list[SampleError]
    plan_digest: int
    packs_digest: int


class PackLoader:
    """This rank's microbatches, step by step, without end.

    ``skipped`` counts left-out samples by reason; ``take_skip_log`` lists them. A sample that exceeds a capacity is
    counted by data-parallel rank 0 alone, when the loader opens, so that sums over ranks are exact.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        *,
        packs_per_step: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        if packs_per_step % dp_size:
            raise ConfigError(
                f"train.packs_per_step ({packs_per_step}) % data-parallel size ({dp_size}) = "
                f"{packs_per_step % dp_size}, must be 0; every rank takes equally many packs of a step"
            )
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        self._model = model
        self._num_slots = data.pack_tokens
        self._packs_per_step = packs_per_step
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._seed = seed
        self.corpus = Corpus(data, model)
        self._plan = self.corpus.plan(seed)
        self._position = Position(epoch=0, consumed=0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pack-loader")
        self._ahead: Future[_Step] | None = None
        self.plan_digest = 0
        """Of the last step's packs of all ranks by sample number and id: equal on all ranks that follow one plan."""
        self.packs_digest = 0
        """Of the last step's packs of this data-parallel rank as they were read: samples and tokens."""
        self.skipped: Counter[str] = Counter()
        self._skip_log: list[dict[str, str]] = []
        if dp_rank == 0:
            self._record(self._over_capacity(data))

    def next_step(self) -> list[PackedBatch]:
        """This rank's microbatches of the next step. What went wrong while they were made is raised here."""
        if self._ahead is None:
            self._ahead = self._thread.submit(self._make_step, self._position)
        step = self._ahead.result()
        self._position = step.after
        self.plan_digest, self.packs_digest = step.plan_digest, step.packs_digest
        self._ahead = self._thread.submit(self._make_step, self._position)
        self._record(step.faults)
        return step.batches

    def take_skip_log(self) -> list[dict[str, str]]:
        """Samples left out since the last call: id, reason, detail."""
        taken, self._skip_log = self._skip_log, []
        return taken

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as plain JSON; the same on every rank, and good for any number of ranks."""
        return {
            "epoch": self._position.epoch,
            "consumed": self._position.consumed,
            "seed": self._seed,
            "plan": self._plan.fingerprint,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken. ``ConfigError`` if this loader's stream is another one."""
        own = self.state()
        changed = [key for key in ("seed", "plan") if state[key] != own[key]]
        if changed:
            listed = "; ".join(f"{key}: saved {state[key]!r}, now {own[key]!r}" for key in changed)
            raise ConfigError(
                f"the data stream cannot be resumed ({listed}): the seed, the sources, their weights, the pack "
                "capacities or window_samples changed; restore them, or start the data from the beginning"
            )
        self._drop_ahead()
        self._position = Position(int(state["epoch"]), int(state["consumed"]))

    def close(self) -> None:
        """Wait for the step under way and end the thread."""
        self._drop_ahead()
        self._thread.shutdown()

    def _drop_ahead(self) -> None:
        if self._ahead is not None and not self._ahead.cancel():
            self._ahead.exception()  # wait; a fault of a step that nobody takes is raised again when it is made anew
        self._ahead = None

    def _make_step(self, position: Position) -> _Step:
        packs, after = self._plan.take(position, self._packs_per_step)
        faults: list[SampleError] = []
        mine = self._plan.deal(packs, self._dp_size)[self._dp_rank]
        batches = [self._collate(packs[place], faults) for place in mine]
        return _Step(batches, after, faults, self._digest_plan(position, packs), _digest_packs(batches))

    def _digest_plan(self, position: Position, packs: Sequence[NDArray[np.int64]]) -> int:
        content = hashlib.sha256(repr((self._seed, self._plan.fingerprint, position)).encode())
        for pack in packs:
            content.update(repr([(number, self.corpus.sample_id(number)) for number in pack.tolist()]).encode())
        return short_digest(content.digest())

    def _collate(self, pack: NDArray[np.int64], faults: list[SampleError]) -> PackedBatch:
        samples: list[EncodedSample] = []
        for number in pack.tolist():
            try:
                samples += self.corpus.encode(number)
            except SampleError as fault:
                faults.append(fault)
        return collate(samples, self._model, self._num_slots)

    def _over_capacity(self, data: DataConfig) -> list[SampleError]:
        faults = []
        for number in self._plan.over_capacity.tolist():
            tokens, patches = self.corpus.planned_lengths(number)
            detail = (
                f"{tokens} tokens and {patches} patches; a pack holds data.pack_tokens {data.pack_tokens} and "
                f"data.pack_patches {data.pack_patches}"
            )
            faults.append(SampleError(self.corpus.sample_id(number), "over_capacity", detail))
        return faults

    def _record(self, faults: Sequence[SampleError]) -> None:
        for fault in faults:
            self.skipped[fault.reason] += 1
            self._skip_log.append({"id": fault.sample_id, "reason": fault.reason, "detail": fault.detail})
        if faults:
            get_logger().warning("left out %d samples, the first: %s", len(faults), faults[0])


def _digest_packs(batches: Sequence[PackedBatch]) -> int:
    content = hashlib.sha256()
    for batch in batches:
        content.update(repr(batch.sample_ids).encode())
        content.update(batch.token_ids_S.numpy().tobytes())
    return short_digest(content.digest())
