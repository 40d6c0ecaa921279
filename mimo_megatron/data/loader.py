"""The training loader: packs of a plan, made ahead of time for one data-parallel rank (docs/loader.md).

Packs of a step are dealt by predicted cost, equally many to each rank. Invariants: the packs of a step, and their
order, do not depend on the number of ranks or workers; ``state`` speaks of consumed packs, never of those made ahead; a
damaged sample is dropped from its pack, counted and listed, and changes nothing else.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.ahead import Ahead, PlannedStep, Share, made_pack
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.making import PackMaker, ThreadMaker
from mimo_megatron.data.media_part import ALL_MEDIA, MediaPart
from mimo_megatron.data.plan import Position
from mimo_megatron.data.pool import WorkerPool
from mimo_megatron.data.records import SampleError
from mimo_megatron.errors import ConfigError
from mimo_megatron.log import get_logger
from mimo_megatron.types import PackedBatch


def short_digest(digest: bytes) -> int:
    """The first 62 bits: an int64 whose negative is one too."""
    return int.from_bytes(digest[:8], "big") >> 2


def open_maker(data: DataConfig, model: ModelConfig, part: MediaPart = ALL_MEDIA) -> PackMaker:
    """What makes the packs of this recipe: ``data.workers`` processes, or a thread. Several loaders may share it."""
    corpus = Corpus(data, model, part)
    return WorkerPool(corpus) if data.workers else ThreadMaker(corpus)


class PackLoader:
    """This rank's microbatches, step by step, without end.

    ``skipped`` counts left-out samples by reason; ``take_skip_log`` lists them. A sample that exceeds a capacity is
    counted by data-parallel rank 0 alone, when the loader opens, so that sums over ranks are exact. ``part`` is of a
    pack's media that which this rank needs decoded. A ``maker`` that is given stays the caller's, and its part holds;
    otherwise the loader opens one and ends it.
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
        part: MediaPart = ALL_MEDIA,
        maker: PackMaker | None = None,
    ) -> None:
        if packs_per_step % dp_size:
            raise ConfigError(
                f"train.packs_per_step ({packs_per_step}) % data-parallel size ({dp_size}) = "
                f"{packs_per_step % dp_size}, must be 0; every rank takes equally many packs of a step"
            )
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        self._owns_maker = maker is None
        self.maker = maker or open_maker(data, model, part)
        self.corpus: Corpus = self.maker.corpus
        self._share = Share(packs_per_step, dp_rank, dp_size)
        self._seed = seed
        self._plan = self.corpus.plan(seed)
        self._position = Position(epoch=0, consumed=0)
        too_long = self.corpus.count_by_source(self._plan.over_capacity)
        self._sizes = [length - without for length, without in zip(map(len, self.corpus.parts), too_long, strict=True)]
        self._used = [0] * len(self._sizes)
        self._ahead: Ahead | None = None
        self._step: PlannedStep | None = None
        self._faults: list[dict[int, SampleError]] = []
        self._digests: list[bytes] = []
        self.steps_to_come: int | None = None
        """How many will be asked for: none is made beyond them. To be set before the first; None for no end."""
        self.places: tuple[int, ...] = ()
        """Of the last step's packs of this rank, among those of all ranks."""
        self.plan_digest = 0
        """Of the last step's packs of all ranks by sample number and id: equal on all ranks that follow one plan."""
        self.skipped: Counter[str] = Counter()
        self._skip_log: list[dict[str, str]] = []
        if dp_rank == 0:
            self._record(self._over_capacity(data))
            for source, parts in zip(self.corpus.sources, self.corpus.parts, strict=True):
                if any(parts.num_cut):
                    name = source.describe()["name"]
                    get_logger().info("%s: %d texts longer than a pack, in %d parts", name, *parts.num_cut)

    def next_step(self) -> list[PackedBatch]:
        """This rank's microbatches of the next step. What went wrong while they were made is raised here; a call after
        that begins with the same step anew."""
        if self._ahead is None:
            self._ahead = Ahead(self.maker, self._plan, self._seed, self._position, self._share, self.steps_to_come)
        try:
            step, packs = self._ahead.next_step()
        except BaseException:
            self._drop_ahead()
            raise
        self._position, self.places = step.after, step.places
        if self.steps_to_come is not None:
            self.steps_to_come -= 1
        self._used = [used + more for used, more in zip(self._used, step.samples_of_sources, strict=True)]
        self.plan_digest = short_digest(step.plan_digest)
        self._step = step
        self._faults, self._digests = [dict(pack.faults) for pack in packs], [pack.digest for pack in packs]
        self._record([fault for pack in packs for _, fault in pack.faults])
        return [pack.batch for pack in packs]

    @property
    def packs_digest(self) -> int:
        """Of the last step's packs of this data-parallel rank as they were read: samples and tokens."""
        return short_digest(hashlib.sha256(b"".join(self._digests)).digest())

    @property
    def faults(self) -> dict[int, SampleError]:
        """Of the last step's packs, by the sample's number."""
        return {number: fault for faults in self._faults for number, fault in faults.items()}

    @property
    def num_drawn(self) -> int:
        """Samples of the last step's packs of all ranks as planned, those that were left out among them. A pair is one,
        and so is a part of a long text."""
        return sum(self._step.samples_of_sources) if self._step else 0

    def leave_out(self, batches: Sequence[PackedBatch], faults: Mapping[int, SampleError]) -> list[PackedBatch]:
        """The last step's microbatches without these samples, which another rank could not decode: packs that hold one
        are made again, while the caller waits."""
        assert self._step is not None and len(batches) == len(self._step.samples), "not the last step's microbatches"
        left = list(batches)
        for place, numbers in enumerate(self._step.samples):
            known = self._faults[place]
            if any(number in faults and number not in known for number in numbers):
                remade = made_pack(self.maker.start(numbers, {**faults, **known}), self.maker)
                self._record([fault for number, fault in remade.faults if number not in known])
                left[place], self._digests[place] = remade.batch, remade.digest
                self._faults[place] = dict(remade.faults)
        return left

    def take_skip_log(self) -> list[dict[str, str]]:
        """Samples left out since the last call: id, reason, detail."""
        taken, self._skip_log = self._skip_log, []
        return taken

    def epochs_of_sources(self) -> dict[str, float]:
        """How often the samples of each source that fit a pack were used so far, over all ranks, on the mean."""
        names = unique_names([str(source.describe()["name"]) for source in self.corpus.sources])
        return {name: used / size for name, used, size in zip(names, self._used, self._sizes, strict=True)}

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as plain JSON; the same on every rank, and good for any number of ranks."""
        return {
            "epoch": self._position.epoch,
            "consumed": self._position.consumed,
            "used": list(self._used),
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
                f"the data stream cannot be resumed ({listed}): the seed, the sources, their weights or "
                "long_samples, the pack capacities or window_samples changed; restore them, or start the data from the "
                "beginning"
            )
        self._drop_ahead()
        self._position = Position(int(state["epoch"]), int(state["consumed"]))
        self._used = [int(used) for used in state["used"]]

    def close(self) -> None:
        """End what makes packs ahead."""
        self._drop_ahead()
        if self._owns_maker:
            self.maker.close()

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

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


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, those that occur again with a number."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found
