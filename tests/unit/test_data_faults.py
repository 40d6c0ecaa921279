"""Storage that fails while a run reads it: tried again, then left out with a reason; good samples stay as they were."""

import errno
import os
import resource
import threading
import time
from collections import Counter

import pytest
import torch

from mimo_megatron.data import reading
from mimo_megatron.data.index import SKIPPED_FILE, build_index
from mimo_megatron.data.loader import PackLoader
from mimo_megatron.data.reading import ReadError, read_bytes, read_until_right
from mimo_megatron.data.source import INDEX_FILE, SIDECAR_FILE, IndexedSource
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import DataError
from mimo_megatron.train.skip_limit import SkipLimit
from tests.data_fixtures import TINY, image_sample, recipe, text_sample, write_source, write_tokenizer

PER_SHARD = 4


@pytest.fixture
def stored(tmp_path):
    """Twelve samples, texts and images, in three shards; the recipe, and the second shard."""
    folder = tmp_path / "source"
    data = recipe(folder, write_tokenizer(tmp_path / "tokenizer"), pack_tokens=128)
    samples = [(image_sample if number % 2 else text_sample)(number) for number in range(12)]
    write_source(folder, samples, data, samples_per_shard=PER_SHARD)
    return data, folder / "shard-000001.tar"


@pytest.fixture(autouse=True)
def forget_failing_files():
    reading._failing.clear()


@pytest.fixture
def open_loader():
    opened = []

    def open_one(data):
        opened.append(PackLoader(data, TINY, packs_per_step=2, seed=3))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def remove(shard):
    shard.unlink()


def cut_in_the_middle(shard):
    os.truncate(shard, shard.stat().st_size // 2)


def replace_by_another(shard):
    size = shard.stat().st_size
    shard.unlink()
    shard.write_bytes(b"x" * size)


def replace_by_device_that_fails(shard):
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # nothing is mapped at the offsets of a shard: EIO
    with pytest.raises(OSError) as caught, shard.open("rb") as file:
        os.pread(file.fileno(), 10, 1000)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (remove, "missing"),
        (cut_in_the_middle, "truncated"),
        (replace_by_another, "changed"),
        (replace_by_device_that_fails, "io_error"),
    ],
)
def test_a_shard_that_fails_during_a_run_costs_its_samples_and_changes_no_other(stored, open_loader, fault, reason):
    data, shard = stored
    whole = open_loader(data)
    expected = [pack for _ in range(4) for pack in whole.next_step()]
    loader = open_loader(data)
    fault(shard)
    found = [pack for _ in range(4) for pack in loader.next_step()]
    lost = {entry["id"] for entry in loader.take_skip_log()}
    of_shard = {name for pack in expected for name in pack.sample_ids if PER_SHARD <= int(name.split("-")[1]) < 8}
    assert lost == of_shard if fault is not cut_in_the_middle else set() < lost < of_shard
    assert set(loader.skipped) == {reason}
    for before, after in zip(expected, found, strict=True):
        assert after.sample_ids == tuple(name for name in before.sample_ids if name not in lost)
        if after.sample_ids == before.sample_ids:
            assert torch.equal(after.token_ids_S, before.token_ids_S)
            assert torch.equal(after.pixels_Y, before.pixels_Y)


def test_a_shard_replaced_by_a_copy_of_itself_costs_nothing(stored, open_loader):
    data, shard = stored
    loader = open_loader(data)
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content)
    for _ in range(4):
        loader.next_step()
    assert not loader.skipped


def test_a_file_that_comes_back_in_time_costs_nothing(stored):
    _, shard = stored
    away = shard.with_suffix(".away")
    shard.rename(away)
    threading.Timer(0.05, away.rename, (shard,)).start()
    config = reading.ReadConfig(attempts=8, backoff_seconds=0.01)  # in all 1.27 s
    assert len(read_until_right(str(shard), 0, 512, "", config)) == 512
    with pytest.raises(ReadError, match="does not exist") as caught:
        read_until_right(str(away), 0, 512, "", config.model_copy(update={"attempts": 2}))
    assert caught.value.reason == "missing"


def test_pauses_double_and_a_lost_file_costs_them_once(tmp_path, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    config = reading.ReadConfig(attempts=4, backoff_seconds=0.5)
    path = tmp_path / "file"
    for _ in range(3):
        with pytest.raises(ReadError):
            read_until_right(str(path), 0, 4, "", config)
    assert pauses == [0.5, 1.0, 2.0]
    path.write_bytes(b"1234")
    assert read_until_right(str(path), 0, 4, "", config) == b"1234"
    path.unlink()
    with pytest.raises(ReadError):
        read_until_right(str(path), 0, 4, "", config)
    assert pauses == [0.5, 1.0, 2.0] * 2, "it was good again in between"


def test_a_read_that_the_system_gives_in_pieces_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, offset: pread(file, min(count, 7), offset))
    assert read_bytes(path, 3, 60) == bytes(range(3, 63))


def test_a_read_that_hangs_in_the_thread_ends_the_run_and_names_the_sample(stored, open_loader):
    data, shard = stored
    loader = open_loader(data.model_copy(update={"sample_seconds": 0.3}))
    shard.unlink()
    os.mkfifo(shard)  # opening it for reading waits for a writer
    began = time.monotonic()
    try:
        with pytest.raises(DataError, match=r"sample '(text|image)-[4-7]' has been read .* data\.sample_seconds 0\.3"):
            for _ in range(4):
                loader.next_step()
    finally:
        os.close(os.open(shard, os.O_WRONLY))  # the thread goes on
    assert time.monotonic() - began < 10


def test_a_source_whose_shard_is_missing_is_refused_at_the_start(stored):
    data, shard = stored
    shard.unlink()
    with pytest.raises(DataError, match="has None bytes"):
        IndexedSource(data.sources[0].path, "train")


# -- the limit ---------------------------------------------------------------------------------------------------------


def test_the_run_stops_above_the_share_and_ten_samples_are_always_allowed():
    limit = SkipLimit(0.01)
    assert limit.exceeded_by(15, Counter(missing=10)) == ""
    assert "11 of 16 samples" in limit.exceeded_by(1, Counter(changed=1))
    limit = SkipLimit(0.01)
    for _ in range(100):
        assert limit.exceeded_by(100, Counter(io_error=1)) == ""
    assert "101 of 10,001 samples since the run was started were left out (100 io_error, 1 slow)" in limit.exceeded_by(
        1, Counter(slow=1)
    )


def test_samples_that_no_pack_can_hold_are_no_fault():
    assert SkipLimit(0.0).exceeded_by(1, Counter(over_capacity=1000)) == ""


# -- the index ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_index_and_nothing_half_written(stored):
    data, _ = stored
    folder = data.sources[0].path
    names = (INDEX_FILE, SIDECAR_FILE, SKIPPED_FILE)
    before = {name: (folder / name).read_bytes() for name in names}
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    more = [text_sample(number) for number in range(100, 160)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[INDEX_FILE]) // 2, most[1]))
    try:
        with pytest.raises(DataError, match=r"index cannot be written to .*source .*bytes are free"):
            reindex(folder, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert not list(folder.glob("*.part"))
    IndexedSource(folder, "train")
    write_source(folder / "new", more, data)  # with room, the same call goes well


def reindex(folder, data):
    return build_index(folder, load_tokenizer(data.tokenizer, TINY.tokens, TINY.text.vocab_size), TINY, data)


def test_an_index_is_not_built_without_a_shard_that_the_storage_refuses(stored):
    data, shard = stored
    replace_by_device_that_fails(shard)
    with pytest.raises(DataError, match=r"shard-000001\.tar cannot be read"):
        reindex(data.sources[0].path, data)
    assert not list(data.sources[0].path.glob("*.part"))
