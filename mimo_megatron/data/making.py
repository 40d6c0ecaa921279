"""A pack made from the numbers of its samples; by a thread of this process, or, behind the same protocol, by others.

Invariants: what is made depends on the numbers and the stored bytes alone; a damaged sample is left out of its pack and
named, and changes nothing else.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from mimo_megatron.data.collate import collate
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.records import SampleError
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedSample, PackedBatch

SLOW = "slow"
"""Reason of a sample that took longer than ``data.sample_seconds``."""


@dataclass(frozen=True)
class MadePack:
    """A pack, the samples that were left out of it, and a digest of its samples and tokens."""

    batch: PackedBatch
    faults: tuple[SampleError, ...]
    digest: bytes


class PackMaker(Protocol):
    """Makes packs in the order in which they are asked for, or several at once."""

    @property
    def corpus(self) -> Corpus: ...

    @property
    def num_workers(self) -> int: ...

    def start(self, numbers: Sequence[int]) -> "Future[MadePack]":
        """What will be the pack of these samples."""
        ...

    def check(self) -> None:
        """``DataError`` where a pack is held up by something that this maker cannot end."""
        ...

    def close(self) -> None: ...


def make_pack(
    corpus: Corpus,
    numbers: Sequence[int],
    left_out: Mapping[int, SampleError],
    begin: Callable[[int], object],
) -> MadePack:
    """The pack of these samples but those of ``left_out``. ``begin(place)`` is called before each of them, and with
    ``len(numbers)`` before they are put together."""
    samples: list[EncodedSample] = []
    faults: list[SampleError] = []
    for place, number in enumerate(numbers):
        begin(place)
        try:
            if number in left_out:
                raise left_out[number]
            samples += corpus.encode(number)
        except SampleError as fault:
            faults.append(fault)
    begin(len(numbers))
    batch = collate(samples, corpus.model, corpus.data.pack_tokens)
    return MadePack(batch, tuple(faults), _digest(batch))


def _digest(batch: PackedBatch) -> bytes:
    content = hashlib.sha256(repr(batch.sample_ids).encode())
    content.update(batch.token_ids_S.numpy().data)
    return content.digest()


class ThreadMaker:
    """A ``PackMaker`` that makes one pack after another in a thread of this process."""

    num_workers = 0

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._jobs: queue.SimpleQueue[tuple[Sequence[int], Future[MadePack]] | None] = queue.SimpleQueue()
        self._begun: tuple[int | None, float] = (None, 0.0)
        # A daemon: where a read hangs for ever, it must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="pack-loader", daemon=True)
        self._thread.start()

    def start(self, numbers: Sequence[int]) -> "Future[MadePack]":
        future: Future[MadePack] = Future()
        self._jobs.put((numbers, future))
        return future

    def check(self) -> None:
        number, since = self._begun
        limit = self.corpus.data.sample_seconds
        if number is not None and time.monotonic() - since > limit:
            raise DataError(
                f"sample {self.corpus.sample_id(number)!r} has been read and decoded for more than data.sample_seconds "
                f"{limit:g} and cannot be ended in a thread: look at its storage, or set data.workers=1 or more, with "
                "which such samples are left out"
            )

    def close(self) -> None:
        """End the thread after the pack under way; one that hangs is left to itself."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            numbers, future = job
            if not future.set_running_or_notify_cancel():
                continue

            def begin(place: int, numbers: Sequence[int] = numbers) -> None:
                self._begun = (numbers[place] if place < len(numbers) else None, time.monotonic())

            try:
                future.set_result(make_pack(self.corpus, numbers, {}, begin))
            except BaseException as error:
                future.set_exception(error)
