"""A pack made from the numbers of its samples; by a thread of this process, or, behind the same protocol, by others.

A rank that encodes a part of the media (``media_part.py``) first reads all and takes their sizes from the headers, then
decodes its part. Invariants: what is made depends on the numbers and the stored bytes alone; a damaged sample is left
out of its pack and named, and changes nothing else. What only decoding shows (``DECODING``) is not known to ranks that
do not decode the sample; they are told before the step (``train/agreement.py``).
"""

import hashlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from mimo_megatron.data.collate import collate, joined_pixels, media_of
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.encode import decode_pixels
from mimo_megatron.data.media_part import ALL_MEDIA
from mimo_megatron.data.records import SampleError, blame
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedMedia, EncodedSample, PackedBatch

SLOW = "slow"
"""Reason of a sample that took longer than ``data.sample_seconds``."""
LOST = "worker_lost"
"""Reason of a sample at which workers end: it crashes its decoder, or needs more memory than there is."""
MEDIA = "media"
"""Reason of a sample whose image or video cannot be decoded."""
DECODING = frozenset({SLOW, LOST, MEDIA})
"""Reasons that a rank may see alone, since it alone decodes; with any other its storage differs."""


@dataclass(frozen=True)
class MadePack:
    """A pack, the samples that were left out of it, by number, and a digest of its samples and tokens."""

    batch: PackedBatch
    faults: tuple[tuple[int, SampleError], ...]
    digest: bytes


class PackMaker(Protocol):
    """Makes packs in the order in which they are asked for, or several at once."""

    @property
    def corpus(self) -> Corpus: ...

    @property
    def num_workers(self) -> int: ...

    def start(self, numbers: Sequence[int], left_out: Mapping[int, SampleError]) -> "Future[MadePack]":
        """What will be the pack of these samples but those that are to be left out."""
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
    encoded: dict[int, tuple[EncodedSample, ...]] = {}
    faults: dict[int, SampleError] = {}
    for place, number in enumerate(numbers):
        begin(place)
        try:
            if number in left_out:
                raise left_out[number]
            encoded[place] = corpus.encode(number)
        except SampleError as fault:
            faults[place] = fault
    while True:
        begin(len(numbers))
        samples = [sample for members in encoded.values() for sample in members]
        batch = collate(samples, corpus.model, corpus.data.pack_tokens)
        if corpus.part == ALL_MEDIA:
            break
        batch, found = _with_part(corpus, batch, encoded, numbers, begin)
        if not found:
            break
        faults |= found
        encoded = {place: members for place, members in encoded.items() if place not in found}
    in_order = tuple((numbers[place], faults[place]) for place in sorted(faults))
    return MadePack(batch, in_order, _digest(batch))


def _with_part(
    corpus: Corpus,
    batch: PackedBatch,
    encoded: Mapping[int, tuple[EncodedSample, ...]],
    numbers: Sequence[int],
    begin: Callable[[int], object],
) -> tuple[PackedBatch, dict[int, SampleError]]:
    """The pack with the pixels of the corpus' part of its media; and the samples, by place, whose decoding failed: the
    pack is to be put together without them."""
    media = media_of([sample for members in encoded.values() for sample in members])
    grids_I3 = [one.grid for one in media]
    assert not media or (batch.vision is not None and list(batch.vision.grids_I3) == grids_I3), "not the pack's media"
    place_of = {id(one): place for place, members in encoded.items() for sample in members for one in sample.media}
    pieces = corpus.part.pieces(grids_I3, corpus.model)
    medium_and_step_U = [
        (number, step) for number, (num_steps, _, _) in enumerate(grids_I3) for step in range(num_steps)
    ]
    decoded: list[EncodedMedia] = []
    found: dict[int, SampleError] = {}
    for number, own in itertools.groupby((medium_and_step_U[piece] for piece in pieces), key=lambda one: one[0]):
        medium = media[number]
        place = place_of[id(medium)]
        begin(place)
        try:
            with blame(corpus.sample_id(numbers[place]), MEDIA):
                pixels_PZ = decode_pixels(medium, [step for _, step in own], corpus.model, corpus.data)
        except SampleError as fault:
            found[place] = fault
        else:
            decoded.append(replace(medium, pixels_PZ=pixels_PZ))
    begin(len(numbers))
    return replace(batch, pixels_Y=joined_pixels(decoded), pieces_held=pieces), found


def _digest(batch: PackedBatch) -> bytes:
    content = hashlib.sha256(repr(batch.sample_ids).encode())
    content.update(batch.token_ids_S.numpy().data)
    return content.digest()


class _Job(NamedTuple):
    numbers: Sequence[int]
    left_out: Mapping[int, SampleError]
    future: "Future[MadePack]"


class ThreadMaker:
    """A ``PackMaker`` that makes one pack after another in a thread of this process."""

    num_workers = 0

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._begun: tuple[int | None, float] = (None, 0.0)
        self._is_closed = False
        # A daemon: where a read hangs for ever, it must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="pack-loader", daemon=True)
        self._thread.start()

    def start(self, numbers: Sequence[int], left_out: Mapping[int, SampleError]) -> "Future[MadePack]":
        job = _Job(numbers, left_out, Future())
        self._jobs.put(job)
        return job.future

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
        """End the thread after the sample under way; one that hangs is left to itself."""
        self._is_closed = True
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue

            def begin(place: int, numbers: Sequence[int] = job.numbers) -> None:
                if self._is_closed:
                    raise DataError("the pack is not made: the loader was closed")
                self._begun = (numbers[place] if place < len(numbers) else None, time.monotonic())

            try:
                job.future.set_result(make_pack(self.corpus, job.numbers, job.left_out, begin))
            except BaseException as error:
                job.future.set_exception(error)
