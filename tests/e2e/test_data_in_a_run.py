"""A training run and its data: workers change no bit of it, and too many lost samples end it with everything saved."""

import json
import os
import signal

import pytest

from mimo_megatron.config.run import DataConfig, RunConfig
from mimo_megatron.errors import MimoError
from mimo_megatron.train import run_folder
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.loop import pretrain
from mimo_megatron.train.run_folder import RunFolder
from tests.data_fixtures import recipe, text_sample, write_source, write_tokenizer
from tests.e2e.faults_run import assert_same_run, finish, rows_of, run_of, start, wait_for, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return write_data(tmp_path_factory.mktemp("data"))


def with_data(config: RunConfig, **changes) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def test_a_run_with_workers_ends_with_the_bits_of_one_without(data, tmp_path):
    thread = run_of(data, tmp_path / "thread", steps=3)
    workers = with_data(run_of(data, tmp_path / "workers", steps=3), workers=2)
    finish(thread, 1)
    finish(workers, 1)
    assert_same_run(workers, thread)
    for row in rows_of(workers):
        assert 0 <= row["data_seconds"] <= row["seconds"]
    (name, epochs), *others = rows_of(workers)[-1]["numbers"].items()
    assert name == "epochs/source" and epochs > 0 and not others


def test_a_run_that_loses_too_many_samples_stops_with_its_last_step_saved_and_goes_on_when_they_are_back(
    data, tmp_path
):
    config = with_data(run_of(data, tmp_path / "run", checkpoint={"every_steps": 0}), max_skipped_fraction=0.2)
    shards = sorted(data.sources[0].path.glob("*.tar"))
    good = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards[1:], good[1:], strict=True):
        shard.write_bytes(bytes(len(content)))  # of the size that is checked at the start
    with pytest.raises(MimoError, match=r"stopped after step \d, which is saved: \d+ of \d+ samples .*changed"):
        run_local(pretrain, 2, config)
    steps = [row["step"] for row in rows_of(config)]
    assert 1 <= len(steps) < 6
    assert sum(rows_of(config)[-1]["skipped"].values()) > 10
    for shard, content in zip(shards, good, strict=True):
        shard.write_bytes(content)
    finish(config, 2)
    assert [row["step"] for row in rows_of(config)] == list(range(1, 7))
    listed = [json.loads(line) for line in (config.dir / "skipped.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in listed} == {"changed"}


def test_a_run_killed_before_its_first_checkpoint_lists_what_it_left_out_once(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    settings = recipe(tmp_path / "source", tokenizer, max_pixels=50_000, video={"max_total_tokens": 64})
    samples = [*(text_sample(number) for number in range(30)), text_sample(30, 400)]
    write_source(tmp_path / "source", samples, settings)
    config = run_of(settings, tmp_path / "run", steps=20, checkpoint={"every_steps": 0})
    process = start(config, 1)
    listed = config.dir / "skipped.jsonl"
    wait_for(lambda: listed.exists() and listed.read_text().endswith("\n"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    finish(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}), 1)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(row["step"], row["id"], row["reason"]) for row in rows] == [(1, "text-30", "over_capacity")]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_run_in_the_folder_of_one_that_runs_is_refused_and_touches_nothing(
    num_ranks, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_folder, "_END_SECONDS", 0.1)
    config = run_of(data, tmp_path / "run", steps=1)
    with RunFolder(config.dir).in_use(), pytest.raises(MimoError, match="used by another run"):
        run_local(pretrain, num_ranks, config)
    assert [path.name for path in config.dir.iterdir()] == [".in-use"]
    finish(config, num_ranks)
