"""An indexed source: samples by number with media by reference, and a refusal of whatever changed since the index."""

import json
import os
from pathlib import Path

import pytest

from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.encode import length_settings
from mimo_megatron.data.reading import ReadError, read_media
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.data.source import INDEX_FILE, SIDECAR_FILE, IndexedSource
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import ConfigError, DataError
from tests.data_fixtures import TINY, image_sample, mixed_samples, recipe, text_sample, write_source, write_tokenizer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def data(tmp_path, folder):
    return recipe(folder, write_tokenizer(tmp_path / "tokenizer"))


def test_read_gives_the_stored_conversation_and_media(folder, data):
    samples = mixed_samples(8)
    write_source(folder, samples, data, samples_per_shard=3)
    source = IndexedSource(folder, "train")
    for number, sample in enumerate(samples):
        raw = source.read(number)
        assert (raw.id, raw.source) == (sample.record["id"], "source")
        assert [message["role"] for message in raw.messages] == ["user", "assistant"]
        assert [read_media(ref, data.read) for ref in raw.media] == list(sample.members.values())


def test_other_keys_of_a_record_are_its_meta(folder, data):
    record = {**text_sample(0).record, "task": "count", "split": "train"}
    write_source(folder, [ShardSample("a", record)], data)
    assert IndexedSource(folder, "train").read(0).meta == {"task": "count"}


def test_a_source_holds_its_split_only(folder, data):
    samples = [ShardSample(str(n), {**text_sample(n).record, "split": "ab"[n % 2]}) for n in range(5)]
    write_source(folder, samples, data)
    source = IndexedSource(folder, "b")
    assert [source.sample_id(n) for n in range(2)] == ["text-1", "text-3"]
    assert source.describe()["num_samples"] == len(source.lengths.num_tokens_N) == 2
    with pytest.raises(ConfigError, match=r"no sample in split 'c'; it has a \(3\), b \(2\)"):
        IndexedSource(folder, "c")


def test_reads_work_in_a_forked_child_while_the_parent_reads(folder, data):
    write_source(folder, [image_sample(number) for number in range(4)], data)
    source = IndexedSource(folder, "train")
    child = os.fork()
    if not child:
        status = 1  # the child must not return into pytest, whatever happens
        try:
            is_right = all(len(read_media(source.read(n).media[0], data.read)) for _ in range(20) for n in range(4))
            status = 0 if is_right else 1
        finally:
            os._exit(status)
    for _ in range(20):
        for number in range(4):
            read_media(source.read(number).media[0], data.read)
    assert os.waitpid(child, 0)[1] == 0


def test_an_index_built_under_other_settings_is_refused_with_what_differs(folder, data):
    write_source(folder, [text_sample(0)], data)
    tokenizer = load_tokenizer(data.tokenizer, TINY.tokens, TINY.text.vocab_size)
    source = IndexedSource(folder, "train")
    source.check_settings(length_settings(tokenizer, TINY, data))
    changed = data.model_copy(update={"max_pixels": 5000, "system_prompt": "New."})
    with pytest.raises(ConfigError, match=r"system_prompt: index None, recipe 'New\.'; max_pixels: .*data index"):
        source.check_settings(length_settings(tokenizer, TINY, changed))


def test_a_folder_that_is_not_there_or_not_indexed_is_refused(folder):
    with pytest.raises(ConfigError, match="does not exist; `mimo-megatron data index RECIPE`"):
        IndexedSource(folder, "train")
    folder.mkdir()
    with pytest.raises(ConfigError, match="is not indexed yet; `mimo-megatron data index RECIPE`"):
        IndexedSource(folder, "train")


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"cut")], ids=["missing", "cut"])
def test_an_index_whose_table_cannot_be_read_is_refused(folder, data, harm):
    write_source(folder, [text_sample(0)], data)
    harm(folder / INDEX_FILE)
    with pytest.raises(ConfigError, match=r"index\.parquet cannot be read .* run `mimo-megatron data index` again"):
        IndexedSource(folder, "train")


def test_a_recipe_without_sources_has_no_samples(data):
    with pytest.raises(ConfigError, match=r"data.sources is empty; .* `mimo-megatron rl`"):
        Corpus(data.model_copy(update={"sources": ()}), TINY)


def test_an_index_of_another_version_is_refused(folder, data):
    write_source(folder, [text_sample(0)], data)
    sidecar = json.loads((folder / SIDECAR_FILE).read_text())
    (folder / SIDECAR_FILE).write_text(json.dumps({**sidecar, "version": 0}))
    with pytest.raises(ConfigError, match="has version 0"):
        IndexedSource(folder, "train")


def test_a_shard_that_changed_size_is_refused(folder, data):
    write_source(folder, [text_sample(0)], data)
    with (folder / "shard-000000.tar").open("ab") as shard:
        shard.write(b"\0" * 512)
    with pytest.raises(DataError, match="bytes, 10240 when it was indexed"):
        IndexedSource(folder, "train")


def overwrite(folder, offset, content):
    with (folder / "shard-000000.tar").open("r+b") as shard:
        shard.seek(offset)
        shard.write(content)


def test_changed_media_bytes_fail_the_hash(folder, data):
    write_source(folder, [image_sample(0)], data)
    (ref,) = IndexedSource(folder, "train").read(0).media
    overwrite(folder, ref.offset, b"other")
    assert read_media(ref, data.read.model_copy(update={"verify": False})).startswith(b"other")
    with pytest.raises(ReadError, match="no longer has SHA-256"):
        read_media(ref, data.read)


@pytest.mark.parametrize("change", [{"id": "x"}, {"messages": [{"role": "user", "content": ""}]}])
def test_a_changed_record_is_refused_with_the_sample_named(folder, data, change):
    sample = image_sample(0)
    write_source(folder, [sample], data)
    source = IndexedSource(folder, "train")
    row = source._table.to_pylist()[0]
    overwrite(folder, row["json_offset"], json.dumps({**sample.record, **change}).ljust(row["json_bytes"]).encode())
    with pytest.raises(SampleError, match=r"sample 'image-0': .* no longer has SHA-256") as caught:
        source.read(0)
    assert caught.value.reason == "changed"
    unverified = IndexedSource(folder, "train", data.read.model_copy(update={"verify": False}))
    with pytest.raises(SampleError, match=r"sample 'image-0': its JSON in .* changed since it was indexed"):
        unverified.read(0)
