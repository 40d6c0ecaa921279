"""Packs made before they are asked for, from one position of the stream on, within a bound on their bytes.

A thread plans step after step, and has this rank's packs made in the order of the stream as far as memory and sense
reach. Invariants: packs come out in the order of the plan, whoever makes them and however long it takes; bytes of packs
that were started and not yet taken never exceed the bound.
"""

import hashlib
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.data.making import MadePack, PackMaker
from mimo_megatron.data.plan import Plan, Position

_LOOK_SECONDS = 1.0
"""Between two looks at whether what is waited for still moves."""


@dataclass(frozen=True)
class Share:
    """Which packs of a step this rank takes."""

    packs_per_step: int
    dp_rank: int
    dp_size: int

    @property
    def num_packs(self) -> int:
        return self.packs_per_step // self.dp_size


@dataclass(frozen=True)
class PlannedStep:
    """A step as planned: where the stream stands after it, what all ranks train on, and what this rank does."""

    after: Position
    plan_digest: bytes
    samples_of_sources: tuple[int, ...]
    """Of all ranks."""
    places: tuple[int, ...]
    samples: tuple[tuple[int, ...], ...]
    """Their numbers, in each of this rank's packs."""


class Ahead:
    """The steps from a position on, ``num_steps`` or without end, until ``close``. A fault of the planning is raised by
    the next call."""

    def __init__(
        self, maker: PackMaker, plan: Plan, seed: int, position: Position, share: Share, num_steps: int | None
    ) -> None:
        self._maker, self._plan, self._seed, self._share = maker, plan, seed, share
        self._num_steps = num_steps
        data = maker.corpus.data
        # Four steps hide a step whose packs take four times the mean; two packs a worker keep all of them busy.
        most_packs = max(4 * share.num_packs, 2 * maker.num_workers)
        self._budget = Budget(data.prefetch_mib << 20, most_packs)
        self._made: queue.SimpleQueue[PlannedStep | tuple[Future[MadePack], int] | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(position,), name="pack-planner", daemon=True)
        self._thread.start()

    def next_step(self) -> tuple[PlannedStep, list[MadePack]]:
        """The next step and this rank's packs of it."""
        step = self._made.get()
        if isinstance(step, Exception):
            raise step
        assert isinstance(step, PlannedStep)
        return step, [self._next_pack() for _ in step.places]

    def close(self) -> None:
        """Have no more packs made; what is under way is thrown away, and its planning ended."""
        self._budget.close()
        self._thread.join()  # two threads never ask one plan
        while not self._made.empty():
            item = self._made.get()
            if isinstance(item, tuple):
                item[0].cancel()

    def _next_pack(self) -> MadePack:
        item = self._made.get()
        if isinstance(item, Exception):
            raise item
        assert isinstance(item, tuple)
        future, num_bytes = item
        try:
            return made_pack(future, self._maker)
        finally:
            self._budget.give_back(num_bytes, packs=1)

    def _run(self, position: Position) -> None:
        try:
            for step in itertools.islice(self._steps(position), self._num_steps):
                self._made.put(step)
                for numbers in step.samples:
                    num_patches = sum(self._maker.corpus.planned_lengths(number)[1] for number in numbers)
                    config, model = self._maker.corpus.data, self._maker.corpus.model
                    making, made = config.making_bytes(model, num_patches), config.pack_bytes(model, num_patches)
                    if not self._budget.take(making):
                        return
                    future = self._maker.start(numbers, {})
                    future.add_done_callback(partial(self._shrink, making - made))
                    self._made.put((future, made))
            self._made.put(EOFError(f"no step was asked to be made after the {self._num_steps} that were"))
        except Exception as error:
            self._made.put(error)

    def _shrink(self, num_bytes: int, _: "Future[MadePack]") -> None:
        self._budget.give_back(num_bytes)

    def _steps(self, position: Position) -> Iterator[PlannedStep]:
        while True:
            packs, after = self._plan.take(position, self._share.packs_per_step, lambda: self._budget.is_closed)
            digest = self._digest(position, packs)
            of_sources = self._maker.corpus.count_by_source(np.concatenate(packs))
            mine = self._plan.deal(packs, self._share.dp_size)[self._share.dp_rank]
            samples = tuple(tuple(packs[place].tolist()) for place in mine)
            yield PlannedStep(after, digest, of_sources, tuple(mine), samples)
            position = after

    def _digest(self, position: Position, packs: Sequence[NDArray[np.int64]]) -> bytes:
        content = hashlib.sha256(repr((self._seed, self._plan.fingerprint, position)).encode())
        for pack in packs:
            content.update(repr([(number, self._maker.corpus.sample_id(number)) for number in pack.tolist()]).encode())
        return content.digest()


def made_pack(future: "Future[MadePack]", maker: PackMaker) -> MadePack:
    """The pack, once it is made. What went wrong while it was made, or holds it up for good, is raised."""
    while not wait([future], _LOOK_SECONDS).done:
        maker.check()
    return future.result()


class Budget:
    """Bytes and packs that may be ahead. One thread takes, others give back."""

    def __init__(self, num_bytes: int, num_packs: int) -> None:
        self.num_bytes = num_bytes
        self._bytes, self._packs = num_bytes, num_packs
        self.is_closed = False
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> bool:
        """True when a pack of so many bytes may be made, False when the budget was closed."""
        assert num_bytes <= self.num_bytes, f"a pack of {num_bytes} bytes never fits {self.num_bytes}"
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or (self._bytes >= num_bytes and self._packs > 0))
            if self.is_closed:
                return False
            self._bytes -= num_bytes
            self._packs -= 1
            return True

    def give_back(self, num_bytes: int, packs: int = 0) -> None:
        with self._changed:
            self._bytes += num_bytes
            self._packs += packs
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()
