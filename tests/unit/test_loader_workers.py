"""Workers: the packs of the thread, whatever happens to them; nothing of theirs stays behind."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mimo_megatron.data.ahead import Budget
from mimo_megatron.data.loader import PackLoader, open_maker
from mimo_megatron.data.making import MadePack
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.shared_pack import read_shared, write_shared
from mimo_megatron.data.worker import Progress
from mimo_megatron.errors import DataError
from tests.data_fixtures import (
    TINY,
    image_sample,
    mixed_samples,
    recipe,
    video_sample,
    write_source,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One source of many samples, one whose three samples have a shard each."""
    home = tmp_path_factory.mktemp("workers")
    folders = [home / "many", home / "few"]
    data = recipe(folders, write_tokenizer(home / "tokenizer"), workers=2)
    write_source(folders[0], [*mixed_samples(20), video_sample(20)], data)
    write_source(folders[1], [image_sample(100 + number) for number in range(3)], data, samples_per_shard=1)
    return data


@pytest.fixture(scope="module")
def handles_before():
    return set(handles())


@pytest.fixture(scope="module")
def pool(data, handles_before):
    pool = open_maker(data, TINY)
    yield pool
    pool.close()


@pytest.fixture
def stream(data, pool):
    """The packs of so many steps by workers, or by the thread; or of a given loader."""
    opened = []

    def packs(num_steps, *, workers=True, seed=4):
        changes = {} if workers else {"workers": 0}
        loader = PackLoader(
            data.model_copy(update=changes), TINY, packs_per_step=2, seed=seed, maker=pool if workers else None
        )
        opened.append(loader)
        loader.steps_to_come = num_steps
        return [pack for _ in range(num_steps) for pack in loader.next_step()], loader

    yield packs
    for loader in opened:
        loader.close()


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name, value in vars(one).items():
            assert_same(value, getattr(other, name), name)


def assert_same(one, other, name):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other), name
    elif hasattr(one, "grids_I3"):
        for inner, value in vars(one).items():
            assert_same(value, getattr(other, inner), f"{name}.{inner}")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for inner, value in one.items():
            assert_same(value, other[inner], f"{name}.{inner}")
    else:
        assert one == other and type(one) is type(other), name


def test_workers_make_the_packs_of_the_thread(stream):
    ours, loader = stream(8)
    theirs, other = stream(8, workers=False)
    assert_equal(ours, theirs)
    assert (loader.plan_digest, loader.packs_digest) == (other.plan_digest, other.packs_digest)
    assert {name.split("-")[0] for pack in ours for name in pack.sample_ids} == {"text", "image", "video"}


def test_a_pack_outlives_its_memory_s_descriptor_and_its_memory_ends_with_it(stream):
    packs, _ = stream(2)
    assert "memfd:mimo-pack" in Path("/proc/self/maps").read_text()
    held = packs[0].token_ids_S.clone()
    kept = packs[0].token_ids_S
    del packs
    assert torch.equal(kept, held)
    del kept
    end = time.monotonic() + 10  # the pool's thread lets go of what it gave a moment later
    while "memfd:mimo-pack" in Path("/proc/self/maps").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not any("mimo-pack" in os.readlink(f"/proc/self/fd/{name}") for name in handles())


def handles():
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.readlink(f"/proc/self/fd/{name}")
            yield name


def test_a_pack_with_columns_and_faults_comes_back_equal(stream):
    (pack, *_), _ = stream(1, workers=False)
    full = type(pack)(**{**vars(pack), "columns": {"advantage": torch.arange(3, dtype=torch.float32)}})
    made = MadePack(full, ((3, SampleError("a", "slow", "ü")),), b"12")
    file, num_bytes = write_shared(made)
    found = read_shared(file, num_bytes)
    os.close(file)
    assert_equal([found.batch], [made.batch])
    ((number, fault),) = found.faults
    assert (number, vars(fault)) == (3, vars(made.faults[0][1])) and found.digest == b"12"


def damage(pool, name):
    """Overwrite the sample's picture; the bytes that stood there, to put them back."""
    corpus = pool.corpus
    number = next(n for n in range(24) if corpus.sample_id(n) == name)
    (ref,) = corpus.read(number).media
    with open(ref.path, "r+b") as file:
        file.seek(ref.offset)
        before = file.read(ref.num_bytes)
        file.seek(ref.offset)
        file.write(bytes(ref.num_bytes))
    return lambda: Path(ref.path).write_bytes(
        (content := Path(ref.path).read_bytes())[: ref.offset] + before + content[ref.offset + ref.num_bytes :]
    )


def test_a_damaged_sample_is_left_out_by_a_worker_as_by_the_thread(stream, pool):
    mend = damage(pool, "image-1")
    try:
        ours, loader = stream(6)
        theirs, other = stream(6, workers=False)
    finally:
        mend()
    assert_equal(ours, theirs)
    assert loader.skipped == other.skipped and set(loader.skipped) == {"changed"}


def workers_of(pool):
    return [worker for worker in list(pool._workers) if worker.is_born]


def test_a_killed_worker_is_replaced_and_nothing_is_lost(stream, pool, data):
    expected, _ = stream(16, workers=False)
    num_before, found = pool.num_lost, []
    loader = PackLoader(data, TINY, packs_per_step=2, seed=4, maker=pool)
    for step in range(16):
        if step % 4 == 2:
            for worker in workers_of(pool):
                os.kill(worker.pid, signal.SIGKILL)
        found += loader.next_step()
    loader.close()
    assert pool.num_lost - num_before >= 3
    assert not loader.skipped
    assert_equal(found, expected)


def test_the_end_of_the_nursery_loses_nothing(stream, pool):
    expected, _ = stream(6, workers=False)
    stream(1)
    pool._nursery.kill()
    found, loader = stream(6)
    assert not loader.skipped
    assert_equal(found, expected)


def test_progress_is_never_seen_half_written():
    """With ``struct`` in place of a store it is, within a few thousand looks."""
    page = os.memfd_create("page")
    os.ftruncate(page, Progress.PAGE_BYTES)
    progress = Progress(page)
    os.close(page)
    progress.begin(0)
    began = progress.since
    writer = os.fork()
    if not writer:
        while True:
            progress.begin(1)
    try:
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert began <= progress.since <= time.monotonic()
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert progress.place == 1


@pytest.fixture
def blocked(data, pool):
    """The shard of one sample is a pipe that nobody writes to: reading it hangs. The sample's id."""
    (name,) = (f"image-{100 + number}" for number in (1,))
    shard = data.sources[1].path / "shard-000001.tar"
    away = shard.with_suffix(".away")
    shard.rename(away)
    os.mkfifo(shard)
    try:
        yield name
    finally:
        shard.unlink()
        away.rename(shard)


def without(packs, name):
    return [tuple(one for one in pack.sample_ids if one != name) for pack in packs]


def test_a_read_that_hangs_is_killed_tried_again_and_left_out(data, pool, stream, monkeypatch):
    expected, _ = stream(2, workers=False)
    monkeypatch.setattr(pool.corpus, "data", data.model_copy(update={"sample_seconds": 0.5}))
    num_before = pool.num_lost
    with contextlib.contextmanager(blocked.__wrapped__)(data, pool) as name:
        found, loader = stream(2)
    times = [pack.sample_ids.count(name) for pack in expected]
    assert sum(times) and loader.skipped == {"slow": sum(times)}
    assert pool.num_lost - num_before == 2 * np.count_nonzero(times)
    assert [pack.sample_ids for pack in found] == without(expected, name)
    assert "took longer than data.sample_seconds 0.5" in loader.take_skip_log()[0]["detail"]


def test_a_sample_that_ends_three_workers_is_left_out(blocked, pool, stream, data):
    is_over = threading.Event()

    def kill_who_reads_it():
        while not is_over.wait(0.01):
            for worker in workers_of(pool):
                if worker.number is not None and pool.corpus.sample_id(worker.number) == blocked:
                    with contextlib.suppress(ProcessLookupError):  # it was killed a moment ago
                        os.kill(worker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_who_reads_it)
    killer.start()
    try:
        _, loader = stream(2)
    finally:
        is_over.set()
        killer.join()
    assert set(loader.skipped) == {"worker_lost"} and {row["id"] for row in loader.take_skip_log()} == {blocked}


def test_workers_that_cannot_start_are_an_error(data, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    pool = open_maker(data, TINY)
    try:
        with pytest.raises(DataError, match="data workers did not start, 2 times"):
            pool.start([0], {}).result(timeout=120)
        with pytest.raises(DataError, match="data workers did not start"):
            pool.start([0], {})
    finally:
        pool.close()


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def train_until_killed(data, said):
    loader = PackLoader(data, TINY, packs_per_step=1, seed=1)
    loader.next_step()
    while not all(worker.is_born for worker in loader.maker._workers):
        time.sleep(0.01)
    said.send([loader.maker._nursery.pid, *(worker.pid for worker in loader.maker._workers)])
    time.sleep(60)


def test_no_worker_outlives_a_killed_trainer(data):
    ours, theirs = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(data, theirs))
    trainer.start()
    assert ours.poll(60)
    pids = ours.recv()
    assert len(pids) == 3 and all(map(is_running, pids))
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_what_is_ahead_stays_within_the_bound_and_the_stream_is_the_same(data):
    """Of packs of 317 KB one can be made while another waits in 1 MiB."""
    tight = data.model_copy(update={"workers": 0, "prefetch_mib": 1})
    loader = PackLoader(tight, TINY, packs_per_step=4, seed=4)
    wide = PackLoader(data.model_copy(update={"workers": 0}), TINY, packs_per_step=4, seed=4)
    least = []
    try:
        for _ in range(5):
            found, expected = loader.next_step(), wide.next_step()
            least.append(loader._ahead._budget._bytes)
            assert_equal(found, expected)
    finally:
        loader.close()
        wide.close()
    assert min(least) >= 0
    assert tight.making_bytes(TINY, tight.pack_patches) < 1 << 20


def test_bytes_of_a_pack_are_at_most_those_that_are_counted_by_the_second_frame_of_stills(data, stream):
    packs, _ = stream(4, workers=False)
    for pack in packs:
        tensors = [
            pack.token_ids_S,
            pack.labels_S,
            pack.loss_weights_S,
            pack.positions_3S,
            pack.pixels_Y,
            pack.splice_M,
            pack.splice_rows_M,
        ]
        tensors += [pack.vision.rope_hw_P2, pack.vision.window_order_M] if pack.vision else []
        held = sum(one.numel() * one.element_size() for one in tensors)
        runs = pack.vision.pixel_runs if pack.vision else []
        not_stored = sum(patches for is_still, patches in runs if is_still) * TINY.vision.still_bytes
        assert held + not_stored == pytest.approx(data.pack_bytes(TINY, pack.num_patches), rel=0.01)


def test_a_budget_gives_in_turn_and_ends_when_closed():
    budget, taken = Budget(100, 2), []

    def take():
        for num_bytes in (60, 60, 10):
            taken.append(budget.take(num_bytes))

    thread = threading.Thread(target=take)
    thread.start()
    time.sleep(0.05)
    assert taken == [True], "60 + 60 > 100"
    budget.give_back(30)
    time.sleep(0.05)
    assert taken == [True, True]
    budget.give_back(90)
    time.sleep(0.05)
    assert taken == [True, True], "two packs are ahead"
    budget.close()
    thread.join(5)
    assert taken == [True, True, False]


# -- the end: no test after it can use the pool ------------------------------------------------------------------------


def test_a_closed_pool_leaves_no_process_and_no_handle(pool, handles_before):
    pool.start([0], {}).result(timeout=60)
    pids = [pool._nursery.pid, *(worker.pid for worker in workers_of(pool))]
    pool.close()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert set(handles()) == handles_before
