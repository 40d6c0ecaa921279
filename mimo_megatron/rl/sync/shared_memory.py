"""Buckets to engine processes of the same machine: two slots of shared memory, written in turn.

The trainer's first rank writes, any number of engines read the same bytes. What travels over an engine's own
connection is small: a ``SlotNotice`` there, and back the word that the bucket has been copied. While engines copy from
one slot the next bucket is gathered into the other. Invariants, tested under these words:

* A slot is written again only after every reader has released it, or was dropped.
* A reader maps the slots without the right to write.
* The memory goes with ``close``, and with the last process where they were killed: its name, random and for this user
  alone, is needed only until all readers have opened it (``unlink``). A name whose writer was killed before that is
  removed by the next ring: a living writer holds a lock on it.
"""

import fcntl
import mmap
import os
import secrets
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from mimo_megatron.errors import SyncError
from mimo_megatron.rl.sync.buckets import STRICT, Bucket, BucketHeader, Count, read_form

SHARED_MEMORY = Path("/dev/shm")
NUM_SLOTS = 2
_PREFIX = "mimo-weights-"


@dataclass(frozen=True)
class SlotNotice:
    """Where a bucket lies; what a reader is told."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    slot: Annotated[int, Field(ge=0, lt=NUM_SLOTS)]
    start: Count
    """Of the bucket's bytes in the shared memory."""
    header: BucketHeader

    def to_json(self) -> bytes:
        return _NOTICE.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> "SlotNotice":
        """``SyncError`` for anything that ``to_json`` would not have written."""
        notice = read_form(_NOTICE, data, "a notice of a slot")
        notice.header.check()
        return notice


_NOTICE = TypeAdapter(SlotNotice)


class SlotRing:
    """The writer's end. ``room`` gives the next slot's memory to pack a bucket in, and ``write`` hands it over::

    for bucket in publisher.buckets(version, room):     # room waits for releases, then asks ring.room
        notice = ring.write(bucket)                     # copies only a bucket that was packed elsewhere
        ...                                             # the notice to every reader; ring.release as each answers
    """

    def __init__(self, slot_bytes: int, readers: Collection[str], folder: Path = SHARED_MEMORY):
        remove_abandoned(folder)
        self.path, self._file = _create(folder)
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._readers = set(readers)
        self._holders: list[set[str]] = [set() for _ in range(NUM_SLOTS)]
        self._next = 0
        size = NUM_SLOTS * self._slot_bytes
        try:
            os.posix_fallocate(self._file, 0, size)  # here, and not by a signal in the middle of an update
        except OSError as fault:
            self.close()
            raise SyncError(
                f"{folder} has no room for {NUM_SLOTS} slots of {self._slot_bytes} bytes ({fault.strerror}); "
                "enlarge it, or choose smaller buckets"
            ) from fault
        self._bytes = _map(self._file, size, mmap.PROT_READ | mmap.PROT_WRITE)

    def holders(self) -> set[str]:
        """The readers that have not released the slot that is next to be written."""
        return set(self._holders[self._next])

    def room(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of the next slot. ``SyncError`` while a reader holds it, or where it is too small."""
        if self._holders[self._next]:
            raise SyncError(
                f"slot {self._next} is still read by {', '.join(sorted(self._holders[self._next]))}: wait for their "
                "release, or drop those that are lost"
            )
        if num_bytes > self._slot_bytes:
            raise SyncError(
                f"a bucket of {num_bytes} bytes does not fit a slot of {self._slot_bytes}; make slots of the "
                "publisher's largest_bucket_bytes"
            )
        start = self._next * self._slot_bytes
        return self._bytes[start : start + num_bytes]

    def write(self, bucket: Bucket) -> SlotNotice:
        """Hand the bucket to every reader; the slot is theirs until each has released it."""
        room = self.room(bucket.data.numel())
        if room.data_ptr() != bucket.data.data_ptr():
            room.copy_(bucket.data)
        slot = self._next
        self._holders[slot] = set(self._readers)
        self._next = (slot + 1) % NUM_SLOTS
        return SlotNotice(slot, slot * self._slot_bytes, bucket.header)

    def release(self, reader: str, notice: SlotNotice) -> None:
        """The reader has copied the bucket of this notice. ``SyncError`` where it does not hold its slot."""
        if reader not in self._holders[notice.slot]:
            raise SyncError(f"{reader} releases slot {notice.slot}, which it does not hold; replace that engine")
        self._holders[notice.slot].remove(reader)

    def drop(self, reader: str) -> None:
        """The reader is lost: nothing more is kept for it."""
        self._readers.discard(reader)
        for holders in self._holders:
            holders.discard(reader)

    def unlink(self) -> None:
        """Every reader has opened the memory: take away its name, so that no crash can leave it behind."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the memory back; views that are still held keep their pages until they go."""
        self.unlink()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class SlotReader:
    """A reader's end."""

    def __init__(self, path: Path):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as fault:
            raise SyncError(
                f"{path} cannot be opened ({fault.strerror}): its writer is gone, on another machine, or of another "
                "user; start the engine on the trainer's machine, as its user"
            ) from fault
        try:
            self._bytes = _map(file, os.fstat(file).st_size, mmap.PROT_READ)
        finally:
            os.close(file)

    def read(self, notice: SlotNotice) -> Bucket:
        """The bucket, where it lies: its bytes stay until this reader's release. ``SyncError`` where the notice points
        outside the memory. Writing to them ends the process."""
        end = notice.start + notice.header.num_bytes
        if end > len(self._bytes):
            raise SyncError(f"a notice points at bytes {notice.start} to {end} of a memory of {len(self._bytes)}")
        return notice.header.with_data(self._bytes[notice.start : end])

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)


class LocalBuckets:
    """The writer's end for engines that answer a bucket before the next one comes: it is copied once for all of them,
    and none holds a slot longer than its call. Engines may come and go, so the name stays until ``close``."""

    def __init__(self, largest_bucket_bytes: int) -> None:
        self._ring = SlotRing(largest_bucket_bytes, ())
        self._written: tuple[Bucket, SlotNotice] | None = None

    @property
    def path(self) -> Path:
        return self._ring.path

    def begin(self) -> None:
        """An update begins: what lies there is not to be told again."""
        self._written = None

    def notice(self, bucket: Bucket) -> SlotNotice:
        if self._written is None or self._written[0] is not bucket:
            self._written = bucket, self._ring.write(bucket)
        return self._written[1]

    def close(self) -> None:
        self._written = None
        self._ring.close()


def remove_abandoned(folder: Path = SHARED_MEMORY) -> None:
    """Remove this user's memory whose writer was killed before it could."""
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:  # its writer lives
            pass
        finally:
            os.close(file)


def _create(folder: Path) -> tuple[Path, int]:
    """A new file, locked for as long as its writer lives."""
    while True:
        path = folder / f"{_PREFIX}{secrets.token_hex(8)}"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as fault:
            raise SyncError(f"no shared memory can be made in {folder} ({fault.strerror})") from fault
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another writer is just removing what it takes for abandoned
            os.close(file)
            continue
        if os.fstat(file).st_nlink:
            return path, file
        os.close(file)


def _map(file: int, size: int, rights: int) -> Tensor:
    """uint8 [size], all pages present."""
    memory = mmap.mmap(file, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=rights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)
