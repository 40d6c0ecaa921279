"""Slots of shared memory between real processes: nothing is overwritten before its release, nothing is left behind."""

import faulthandler
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mimo_megatron.errors import SyncError
from mimo_megatron.rl.sync.buckets import Bucket, checksum, pack, sealed
from mimo_megatron.rl.sync.shared_memory import SHARED_MEMORY, LocalBuckets, SlotNotice, SlotReader, SlotRing

MEGABYTE = 1 << 20
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no POSIX shared memory here")


def names() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("mimo-weights-*")}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = names()
    yield
    assert names() <= before


def small(number: int) -> Bucket:
    return pack(1, number, [("a", torch.full((100,), float(number)))])


def read_all(path: Path, wire: Connection) -> None:
    """A reader process: checks every bucket, slowly, and releases it."""
    torch.set_num_threads(1)
    reader = SlotReader(path)
    wire.send_bytes(b"open")
    while data := wire.recv_bytes():
        bucket = reader.read(SlotNotice.from_json(data))
        time.sleep(0.02)  # time for the writer to spoil the slot, if it could
        wrong = [one.entry.name for one in bucket.tensors if checksum(bucket.view(one)) != one.checksum]
        wire.send_bytes(f"{bucket.number} {len(wrong)}".encode())


def test_two_readers_get_100_megabytes_unspoiled_from_slots_of_4() -> None:
    values = torch.empty(MEGABYTE, dtype=torch.int32)
    ring = SlotRing(values.nbytes, ["one", "two"])
    wires, processes = {}, []
    for name in ("one", "two"):
        wires[name], theirs = FORK.Pipe()
        processes.append(FORK.Process(target=read_all, args=(ring.path, theirs)))
        processes[-1].start()
        assert wires[name].recv_bytes() == b"open"
    ring.unlink()
    given: list[SlotNotice] = []
    for number in range(25):
        if number >= 2:  # the slot's last bucket
            for name, wire in wires.items():
                assert wire.recv_bytes() == f"{number - 2} 0".encode()
                ring.release(name, given[number - 2])
        room = ring.room(values.nbytes).view(torch.int32).copy_(values.random_())
        entries = [packed.entry for packed in pack(1, number, [("a", values)]).tensors]
        given.append(ring.write(sealed(1, number, entries, [0], room.view(torch.uint8))))
        for wire in wires.values():
            wire.send_bytes(given[-1].to_json())
    for number in (23, 24):
        assert [wire.recv_bytes() for wire in wires.values()] == [f"{number} 0".encode()] * 2
    for wire in wires.values():
        wire.send_bytes(b"")
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    ring.close()


def test_a_slot_is_not_given_out_before_every_reader_has_released_it() -> None:
    ring = SlotRing(MEGABYTE, ["one", "two"])
    first, _second = ring.write(small(0)), ring.write(small(1))
    assert ring.holders() == {"one", "two"}
    with pytest.raises(SyncError, match="slot 0 is still read by one, two"):
        ring.room(10)
    ring.release("one", first)
    with pytest.raises(SyncError, match="slot 0 is still read by two"):
        ring.write(small(2))
    with pytest.raises(SyncError, match="one releases slot 0, which it does not hold"):
        ring.release("one", first)
    ring.drop("two")
    assert ring.write(small(2)).slot == 0
    assert ring.holders() == {"one"}
    ring.close()


def test_a_bucket_packed_in_the_slot_is_not_copied() -> None:
    ring = SlotRing(MEGABYTE, ["one"])
    reader = SlotReader(ring.path)
    bucket = small(0)
    room = ring.room(bucket.data.numel()).copy_(bucket.data)
    read = reader.read(ring.write(Bucket(1, 0, bucket.tensors, room)))
    assert torch.equal(read.view(read.tensors[0]), torch.zeros(100))
    room[:4] = 255  # the reader sees the writer's memory
    assert read.view(read.tensors[0])[0].isnan()
    ring.close()


def test_the_memory_is_this_users_alone_and_its_name_random() -> None:
    rings = [SlotRing(MEGABYTE, ["one"]) for _ in range(2)]
    assert rings[0].path != rings[1].path
    for ring in rings:
        assert stat.S_IMODE(ring.path.stat().st_mode) == 0o600
        ring.close()


def write_to_slot(path: Path) -> None:
    faulthandler.disable()  # it would tell of the fault that is wanted
    SlotReader(path)._bytes[0] = 1


def test_a_reader_cannot_write() -> None:
    ring = SlotRing(MEGABYTE, ["one"])
    process = FORK.Process(target=write_to_slot, args=(ring.path,))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGSEGV
    assert int(ring.room(1)[0]) == 0
    ring.close()


def test_what_does_not_fit_is_refused() -> None:
    ring = SlotRing(4096, ["one"])
    with pytest.raises(SyncError, match="a bucket of 4097 bytes does not fit a slot of 4096"):
        ring.room(4097)
    with pytest.raises(SyncError, match="has no room for 2 slots"):
        SlotRing(1 << 50, ["one"])
    notice = ring.write(small(0))
    with pytest.raises(SyncError, match="points at bytes 999999"):
        SlotReader(ring.path).read(SlotNotice(0, 999_999, notice.header))
    ring.close()


def test_a_ring_that_is_gone_is_named() -> None:
    ring = SlotRing(MEGABYTE, ["one"])
    ring.close()
    ring.close()
    with pytest.raises(SyncError, match="cannot be opened"):
        SlotReader(ring.path)


def hold(path: Path, wire: Connection) -> None:
    reader = SlotReader(path)
    wire.send_bytes(b"open")
    reader.read(SlotNotice.from_json(wire.recv_bytes()))
    wire.send_bytes(b"read")
    time.sleep(60)


def test_nothing_is_left_after_a_reader_is_killed() -> None:
    ring = SlotRing(MEGABYTE, ["one"])
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(ring.path, theirs))
    process.start()
    assert mine.recv_bytes() == b"open"
    mine.send_bytes(ring.write(small(0)).to_json())
    assert mine.recv_bytes() == b"read"
    process.kill()
    process.join()
    ring.write(small(1))
    assert ring.holders() == {"one"}
    ring.drop("one")
    ring.write(small(2))
    ring.close()
    assert not ring.path.exists()


def make_and_hang(wire: Connection) -> None:
    ring = SlotRing(MEGABYTE, ["one"])
    wire.send_bytes(str(ring.path).encode())
    time.sleep(60)


def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_what_lives_is_not() -> None:
    living = SlotRing(MEGABYTE, ["one"])
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=make_and_hang, args=(theirs,))
    process.start()
    left = Path(mine.recv_bytes().decode())
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert left.exists()
    SlotRing(MEGABYTE, ["one"]).close()
    assert not left.exists() and living.path.exists()
    living.close()


def test_a_bucket_for_several_engines_is_written_once_and_in_the_next_update_again() -> None:
    memory = LocalBuckets(4096)
    reader = SlotReader(memory.path)
    try:
        first, second = small(3), small(4)
        memory.begin()
        notice = memory.notice(first)
        first.data.zero_()
        assert memory.notice(first) == notice and reader.read(notice).data.any()  # what lies there is the first writing
        assert memory.notice(second).slot != notice.slot
        memory.begin()
        assert not reader.read(memory.notice(first)).data.any()
    finally:
        reader.close()
        memory.close()
    assert not memory.path.exists()
