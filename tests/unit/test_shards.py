"""Tar shards: valid, reproducible, scanned by offset; torn files are noticed."""

import io
import json
import tarfile

import pytest

from mimo_megatron.data.reading import read_bytes
from mimo_megatron.data.shards import ShardSample, scan_samples, write_shards
from mimo_megatron.errors import DataError
from tests.data_fixtures import image_sample, mixed_samples, text_sample


def test_scanned_offsets_hold_the_bytes_that_were_written(tmp_path):
    samples = mixed_samples(7)
    found = {}
    for path in write_shards(samples, tmp_path, samples_per_shard=3):
        for key, members in scan_samples(path):
            found[key] = {member.name: read_bytes(path, member.offset, member.num_bytes) for member in members}
    assert list(found) == [sample.key for sample in samples]
    for sample in samples:
        assert json.loads(found[sample.key].pop("json")) == sample.record
        assert found[sample.key] == sample.members


def test_any_tar_reader_sees_the_samples_side_by_side(tmp_path):
    paths = write_shards([image_sample(0), image_sample(1, [(56, 56), (56, 56)])], tmp_path, samples_per_shard=5)
    assert [path.name for path in paths] == ["shard-000000.tar"]
    with tarfile.open(paths[0]) as tar:
        names = tar.getnames()
    assert names == ["000000.json", "000000.image0.png", "000001.json", "000001.image0.png", "000001.image1.png"]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first, second = (write_shards(mixed_samples(4), tmp_path / name, samples_per_shard=4) for name in "ab")
    assert first[0].read_bytes() == second[0].read_bytes()
    with tarfile.open(first[0]) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


def test_shards_are_never_overwritten(tmp_path):
    write_shards([text_sample(0)], tmp_path, samples_per_shard=1)
    with pytest.raises(DataError, match="exists already"):
        write_shards([text_sample(1)], tmp_path, samples_per_shard=1)


def test_a_failed_write_leaves_no_shard(tmp_path):
    with pytest.raises(DataError, match="must not be empty or hold a dot"):
        write_shards([text_sample(0), ShardSample("a.b", {})], tmp_path, samples_per_shard=2)
    assert not list(tmp_path.glob("*.tar"))


def test_two_samples_of_one_key_are_refused(tmp_path):
    with pytest.raises(DataError, match="'000000': two samples of one shard have this key"):
        write_shards([text_sample(0), text_sample(0)], tmp_path, samples_per_shard=2)


def test_a_member_named_json_is_refused(tmp_path):
    with pytest.raises(DataError, match="rename the member"):
        write_shards([ShardSample("a", {}, {"json": b""})], tmp_path, samples_per_shard=1)


def test_long_and_foreign_names_and_folders_are_scanned(tmp_path):
    key = "folder.v1/" + "很长的名字" * 30
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("folder.v1"), None)
        for name in (f"{key}.json", f"{key}.image0.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    folder, (found, members) = list(scan_samples(path))
    assert folder[0] == "folder"
    assert found == key
    assert [member.name for member in members] == ["json", "image0.jpg"]
    assert read_bytes(path, members[1].offset, 2) == b"{}"


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_torn_tar_gives_its_whole_samples_and_then_an_error(tmp_path, kept):
    (path,) = write_shards([image_sample(number, [(280, 280)]) for number in range(6)], tmp_path, samples_per_shard=6)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    given = []
    with pytest.raises(DataError, match=r"shard-000000\.tar is torn"):
        for key, _ in scan_samples(path):
            given.append(key)
    assert given == [f"{number:06d}" for number in range(len(given))]
    assert len(given) < 6


def test_bytes_beyond_the_end_of_a_file_are_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    assert read_bytes(path, 1, 3) == b"234"
    with pytest.raises(DataError, match="holds 2 of 3 bytes at offset 2"):
        read_bytes(path, 2, 3)
