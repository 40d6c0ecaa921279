"""What every back end of ``DataSource`` guarantees, stated once and asked of each: ``indexed`` and ``energon``."""

import importlib.util
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mimo_megatron.config.run import ReadConfig, SourceConfig
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.encode import length_settings
from mimo_megatron.data.energon import INSTALL, META_FOLDER, EnergonSource, open_source
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.errors import ConfigError, DataError
from tests.data_fixtures import TINY, image_sample, mixed_samples, recipe, video_sample, write_source, write_tokenizer

HAS_ENERGON = importlib.util.find_spec("megatron.energon") is not None
needs_energon = pytest.mark.skipif(not HAS_ENERGON, reason=f"needs megatron-energon: {INSTALL}")
BACKENDS = ["indexed", pytest.param("energon", marks=needs_energon)]
SHARD = "shard-000001.tar"


def samples() -> list[ShardSample]:
    odd = image_sample(13, [(60, 100)])
    odd = replace(odd, record={**odd.record, "task": "ünï", "split": "validation"})
    return [*mixed_samples(12), video_sample(12), odd]


def prepare(folder: Path) -> None:
    """The command of the documentation, in this process."""
    from megatron.energon.tools.prepare import command

    options = "--non-interactive --sample-type CrudeWebdataset --split-ratio 1,0,0 --force-overwrite"
    command.main([str(folder), *options.split(), "--num-workers", "1", "--no-progress"], standalone_mode=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Tars, both indexes, and the recipe's data section."""
    root = tmp_path_factory.mktemp("conformance")
    data = recipe(root / "source", write_tokenizer(root / "tokenizer"))
    write_source(root / "source", samples(), data, samples_per_shard=5)
    if HAS_ENERGON:
        prepare(root / "source")
    return data


@pytest.fixture
def folder(stored, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(stored.sources[0].path, tmp_path / "source"))


def opened(folder, backend, split="train"):
    return open_source(SourceConfig(path=folder, backend=backend), split)


def with_backend(data, backend):
    return data.model_copy(
        update={"sources": tuple(one.model_copy(update={"backend": backend}) for one in data.sources)}
    )


def content(source) -> list:
    numbers = range(len(source.lengths.num_tokens_N))
    return [(raw := source.read(number), [read_media(ref, ReadConfig()) for ref in raw.media]) for number in numbers]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_lengths_samples_and_media_are_those_that_were_stored(stored, backend):
    source = opened(stored.sources[0].path, backend)
    written = samples()[:-1]
    assert len(source.lengths.num_tokens_N) == len(source.lengths.num_patches_N) == len(written)
    for number, sample in enumerate(written):
        raw = source.read(number)
        assert source.sample_id(number) == raw.id == sample.record["id"]
        assert [message["role"] for message in raw.messages] == ["user", "assistant"]
        assert [read_media(ref, ReadConfig()) for ref in raw.media] == list(sample.members.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_media_are_places_in_the_tars(stored, backend):
    """Pixels are read at the consumer, from a path, an offset and a size: no back end copies them."""
    source = opened(stored.sources[0].path, backend)
    for number, sample in enumerate(samples()[:-1]):
        for ref, expected in zip(source.read(number).media, sample.members.values(), strict=True):
            assert Path(ref.path).suffix == ".tar"
            with open(ref.path, "rb") as tar:
                tar.seek(ref.offset)
                assert tar.read(ref.num_bytes) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_equals_the_indexed_one_in_every_field(stored, backend):
    for split in ("train", "validation"):
        one, other = (opened(stored.sources[0].path, name, split) for name in ("indexed", backend))
        assert content(one) == content(other)
        assert all(np.array_equal(a, b) for a, b in zip(one.lengths, other.lengths, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_encodings_and_the_plan_equal_those_of_the_indexed_source(stored, backend):
    ours, theirs = (Corpus(with_backend(stored, name), TINY) for name in ("indexed", backend))
    assert ours.plan(7).fingerprint == theirs.plan(7).fingerprint
    for number in range(len(samples()) - 1):
        for one, other in zip(ours.encode(number), theirs.encode(number), strict=True):
            assert one.id == other.id
            assert np.array_equal(one.token_ids_T, other.token_ids_T)
            assert np.array_equal(one.loss_mask_T, other.loss_mask_T)
            assert [a.grid for a in one.media] == [b.grid for b in other.media]
            assert all(np.array_equal(a.patches_PC, b.patches_PC) for a, b in zip(one.media, other.media, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pickled_source_reads_the_same(stored, backend):
    source = opened(stored.sources[0].path, backend)
    expected = content(source)  # after reading: open handles must not travel
    assert content(pickle.loads(pickle.dumps(source))) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_a_forked_child_read_while_the_parent_reads(stored, backend):
    source = opened(stored.sources[0].path, backend)
    expected = content(source)
    child = os.fork()
    if not child:
        status = 1  # the child must not return into pytest, whatever happens
        try:
            status = 0 if all(content(source) == expected for _ in range(3)) else 1
        finally:
            os._exit(status)
    with ThreadPoolExecutor(4) as threads:
        assert all(found == expected for found in threads.map(lambda _: content(source), range(8)))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_settings_splits_and_folders_are_refused(stored, tmp_path, backend):
    source = opened(stored.sources[0].path, backend)
    settings = length_settings(Corpus(stored, TINY).tokenizer, TINY, stored)
    source.check_settings(settings)
    with pytest.raises(ConfigError, match=r"max_pixels: .*data index"):
        source.check_settings({**settings, "max_pixels": 1})
    with pytest.raises(ConfigError, match="no sample in split 'test'"):
        opened(stored.sources[0].path, backend, "test")
    with pytest.raises(ConfigError, match="is not indexed yet"):
        opened(tmp_path, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_that_is_missing_or_of_another_size_is_named_at_opening(folder, backend):
    with (folder / SHARD).open("ab") as shard:
        shard.write(b"\0" * 512)
    with pytest.raises(DataError, match=rf"{SHARD} has \d+ bytes, \d+ when it was indexed"):
        opened(folder, backend)
    (folder / SHARD).unlink()
    with pytest.raises(DataError, match=rf"{SHARD} has None bytes"):
        opened(folder, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_that_is_cut_while_open_costs_its_own_samples_by_name(folder, backend):
    source = opened(folder, backend)
    good = source.read(0)
    with (folder / SHARD).open("r+b") as shard:
        shard.truncate(100)
    with pytest.raises(SampleError, match=r"'video-12'|'text-9'|'image-\d'|'text-\d'") as caught:
        source.read(9)
    assert (caught.value.sample_id, caught.value.reason) == (source.sample_id(9), "truncated")
    assert source.read(0) == good


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_that_disappears_while_open_costs_its_own_samples_by_name(folder, backend):
    source = opened(folder, backend)
    (folder / SHARD).unlink()
    with pytest.raises(SampleError, match=SHARD) as caught:
        source.read(9)
    assert (caught.value.sample_id, caught.value.reason) == (source.sample_id(9), "missing")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_record_is_refused_by_name(folder, backend):
    source = opened(folder, backend)
    tar = folder / SHARD
    tar.write_bytes(tar.read_bytes().replace(b'"id": "text-9"', b'"id": "text-8"'))
    with pytest.raises(SampleError, match=r"'text-9'.*no longer has SHA-256"):
        source.read(9)


def test_energon_that_is_not_installed_is_refused_with_the_remedy(folder, monkeypatch):
    (folder / META_FOLDER).mkdir(exist_ok=True)
    (folder / META_FOLDER / "index.sqlite").touch()
    monkeypatch.setitem(__import__("sys").modules, "megatron.energon.cache.file_store", None)
    with pytest.raises(ConfigError, match=r"needs the package megatron-energon.*mimo-megatron\[energon\].*indexed"):
        EnergonSource(folder, "train")


def test_a_folder_that_energon_never_saw_is_refused_with_the_command(folder):
    shutil.rmtree(folder / META_FOLDER, ignore_errors=True)
    with pytest.raises(ConfigError, match=r"energon prepare \S+ --non-interactive.*backend=indexed"):
        EnergonSource(folder, "train")


@needs_energon
def test_energon_that_indexed_other_tars_is_caught_sample_by_sample(folder, stored):
    """Tars written again after ``energon prepare``: its offsets point into the middle of files."""
    shutil.rmtree(folder / META_FOLDER)
    prepare(folder)
    kept = Path(shutil.copytree(folder / META_FOLDER, folder.parent / "kept"))
    for file in folder.glob("*.tar*"):
        file.unlink()
    write_source(folder, samples()[::-1], stored, samples_per_shard=5)
    shutil.rmtree(folder / META_FOLDER, ignore_errors=True)
    shutil.move(kept, folder / META_FOLDER)
    source = EnergonSource(folder, "train")
    with pytest.raises(SampleError, match=r"energon has its 'json' at .*our index at .*energon prepare"):
        source.read(0)


@needs_energon
def test_energon_that_lacks_a_shard_is_refused_with_its_name(folder, stored):
    from megatron.energon.tools.prepare import command

    options = "--non-interactive --sample-type CrudeWebdataset --split-ratio 1,0,0 --force-overwrite"
    excluding = [*options.split(), "--num-workers", "1", "--no-progress", "--exclude", SHARD]
    command.main([str(folder), *excluding], standalone_mode=False)
    with pytest.raises(ConfigError, match=rf"knows nothing of {SHARD}"):
        EnergonSource(folder, "train")
