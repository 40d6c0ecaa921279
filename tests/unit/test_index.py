"""The index: exact lengths, stable splits, every sample either in it or listed with a reason."""

import hashlib
import io
import json
import tarfile
from collections import Counter

import pyarrow.parquet as pq
import pytest

from mimo_megatron.data import index
from mimo_megatron.data.encode import encode_sample
from mimo_megatron.data.index import INDEX_FILE, SIDECAR_FILE, SKIPPED_FILE
from mimo_megatron.data.reading import read_bytes
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.data.source import IndexedSource
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import ConfigError, DataError
from tests.data_fixtures import (
    TINY,
    image_sample,
    mixed_samples,
    picture,
    recipe,
    text_sample,
    user_and_assistant,
    video_sample,
    write_source,
    write_tokenizer,
)


@pytest.fixture
def data(tmp_path):
    return recipe(tmp_path / "source", write_tokenizer(tmp_path / "tokenizer"))


def rows(folder):
    return pq.read_table(folder / INDEX_FILE).to_pylist()


def skipped(folder):
    return [json.loads(line) for line in (folder / SKIPPED_FILE).read_text().splitlines()]


def test_indexed_lengths_equal_encoded_lengths(tmp_path, data):
    boxed = ShardSample(
        "000099",
        {
            "messages": user_and_assistant(
                [{"type": "image", "image": "image0.jpg"}, {"type": "text", "text": "Where?"}],
                "<|box|>7,7,333,99<|/box|>",
            )
        },
        {"image0.jpg": picture(100, 333, format="JPEG")},
    )
    folder = tmp_path / "source"
    samples = [*mixed_samples(6), video_sample(6), boxed]
    report = write_source(folder, samples, data, samples_per_shard=3)
    source = IndexedSource(folder, "train")
    tokenizer = load_tokenizer(data.tokenizer, TINY.tokens, TINY.text.vocab_size)
    for number in range(len(samples)):
        sample = encode_sample(source.read(number), tokenizer, TINY, data)
        assert sample.num_tokens == source.lengths.num_tokens_N[number]
        assert sample.num_patches == source.lengths.num_patches_N[number]
        assert sample.num_tokens**2 == source.lengths.segment_squares_N[number]
        frames = [(one.grid[0], one.grid[1] * one.grid[2]) for one in sample.media]
        assert sum(count * patches**2 for count, patches in frames) == source.lengths.frame_squares_N[number]
    assert (report.num_tokens, report.num_patches) == tuple(int(one.sum()) for one in source.lengths[:2])
    assert source.sample_id(7) == "shard-000002/000099"


def test_media_rows_hold_offset_and_hash_of_the_bytes(tmp_path, data):
    folder = tmp_path / "source"
    sample = image_sample(0, [(56, 56), (84, 84)])
    write_source(folder, [sample], data)
    (row,) = rows(folder)
    for media, content in zip(row["media"], sample.members.values(), strict=True):
        assert read_bytes(folder / row["shard"], media["offset"], media["num_bytes"]) == content
        assert media["sha256"] == hashlib.sha256(content).hexdigest()
    assert json.loads(read_bytes(folder / row["shard"], row["json_offset"], row["json_bytes"])) == sample.record


def test_sidecar_describes_shards_by_size_and_hash(tmp_path, data):
    folder = tmp_path / "source"
    write_source(folder, mixed_samples(5), data, samples_per_shard=2)
    sidecar = json.loads((folder / SIDECAR_FILE).read_text())
    assert sidecar["num_samples"] == {"train": 5}
    assert len(sidecar["shards"]) == 3
    for shard in sidecar["shards"]:
        content = (folder / shard["name"]).read_bytes()
        assert (shard["num_bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_split_is_the_samples_own_or_a_hash_of_its_id(tmp_path, data):
    own = ShardSample("own", {"split": "test", "messages": user_and_assistant("a", "b")})
    samples = [text_sample(number) for number in range(60)]
    for name, order in (("a", [own, *samples]), ("b", [*samples[::-1], own])):
        write_source(tmp_path / name, order, data, held_out_fraction=0.25)
    first, second = ({row["id"].split("/")[-1]: row["split"] for row in rows(tmp_path / name)} for name in "ab")
    assert first == second
    counts = Counter(first.values())
    assert counts["test"] == 1 and counts["validation"] + counts["train"] == 60
    assert 6 <= counts["validation"] <= 24, "a quarter of 60, within four standard deviations"


def foreign_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def asking(*names):
    parts = [{"type": "image", "image": name} for name in names]
    return json.dumps({"messages": user_and_assistant([*parts, {"type": "text", "text": "?"}], "!")}).encode()


def test_broken_samples_are_listed_by_reason_and_the_others_indexed(tmp_path, data):
    folder, image = tmp_path / "source", picture(56, 56)
    folder.mkdir()
    broken = {
        "json": [("a.json", b"{")],
        "messages": [("b.json", b'{"messages": []}')],
        "media_missing": [("c.json", asking("image0.png"))],
        "media_unused": [("d.json", asking("x.png")), ("d.x.png", image), ("d.y.png", image)],
        "media": [("e.json", asking("x.png")), ("e.x.png", b"no image")],
        "coordinates": [("f.json", b'{"messages": [{"role": "user", "content": "<|point|>1,1<|/point|>"}]}')],
        "duplicate_name": [("g.json", asking()), ("g.json", asking())],
    }
    good = [("good.json", asking("x.png")), ("good.x.png", image)]
    foreign_tar(folder / "0.tar", [member for members in broken.values() for member in members] + good)
    report = write_source(folder, [], data)
    assert report.skipped == Counter(list(broken))
    assert [row["id"] for row in rows(folder)] == ["0/good"]
    listed = skipped(folder)
    assert {fault["id"]: fault["reason"] for fault in listed} == {
        f"0/{members[0][0].split('.')[0]}": reason for reason, members in broken.items()
    }
    assert all(fault["shard"] == "0.tar" and fault["detail"] for fault in listed)


def test_a_sample_without_json_is_listed(tmp_path, data):
    folder = tmp_path / "source"
    folder.mkdir()
    foreign_tar(folder / "0.tar", [("a.png", b"x"), ("b.json", asking())])
    write_source(folder, [], data)
    assert [(fault["id"], fault["reason"]) for fault in skipped(folder)] == [("0/a", "json")]


def test_a_second_sample_of_the_same_id_is_listed(tmp_path, data):
    folder = tmp_path / "source"
    write_source(folder, [text_sample(0), ShardSample("again", text_sample(0).record)], data, samples_per_shard=1)
    assert [row["key"] for row in rows(folder)] == ["000000"]
    assert [(fault["key"], fault["reason"]) for fault in skipped(folder)] == [("again", "duplicate_id")]


def test_a_torn_shard_is_listed_and_its_whole_samples_indexed(tmp_path, data):
    folder = tmp_path / "source"
    write_source(folder, [image_sample(number, [(280, 280)]) for number in range(4)], data, samples_per_shard=2)
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 7 // 10])
    report = write_source(folder, [], data)
    assert report.skipped["shard"] == 1
    assert [row["id"] for row in rows(folder)] == ["image-0", "image-2", "image-3"]


def test_samples_over_the_capacity_stay_in_the_index_and_are_counted(tmp_path, data):
    folder = tmp_path / "source"
    report = write_source(folder, [text_sample(0), image_sample(1, [(560, 560)])], data)
    assert (report.num_over_capacity, report.num_samples["train"]) == (1, 2)


def test_an_index_may_lie_in_another_folder(tmp_path, data):
    write_source(tmp_path / "tars", mixed_samples(3), data, out=tmp_path / "deep" / "index")
    assert not (tmp_path / "tars" / INDEX_FILE).exists()
    assert IndexedSource(tmp_path / "deep" / "index", "train").read(1).media[0].path.startswith(str(tmp_path / "tars"))


def test_an_interrupted_build_leaves_what_was_there(tmp_path, data, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "source"
    write_source(folder, mixed_samples(4), data, samples_per_shard=2)
    IndexedSource(folder, "train")
    monkeypatch.setattr(index, "measure_stored", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_source(folder, [], data)
    assert len(IndexedSource(folder, "train").lengths.num_tokens_N) == 4
    with pytest.raises(KeyboardInterrupt):
        write_source(tmp_path / "new", mixed_samples(4), data)
    with pytest.raises(ConfigError, match="is not indexed yet"):
        IndexedSource(tmp_path / "new", "train")
    assert not [*folder.glob("*.part"), *(tmp_path / "new").glob("*.part")]


def test_a_folder_without_shards_is_refused(tmp_path, data):
    with pytest.raises(DataError, match=r"holds no \*\.tar shard"):
        write_source(tmp_path / "source", [], data)
