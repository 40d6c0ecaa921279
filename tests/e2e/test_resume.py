"""A run that is killed and started again ends with the very bits of one that was left alone."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mimo_megatron.config.run import ParallelConfig, RunConfig
from mimo_megatron.convert.checkpoint_io import CheckpointReader
from mimo_megatron.convert.families import rules_for
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.loop import pretrain
from tests.data_fixtures import TINY, mixed_samples, recipe, write_source, write_tokenizer
from tests.samples import run_config

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = write_tokenizer(folder / "tokenizer")
    limits = {"max_pixels": 100_000, "video": {"max_total_tokens": 128}}
    settings = recipe(folder / "source", tokenizer, pack_patches=1024, window_samples=8, **limits)
    write_source(folder / "source", mixed_samples(24), settings)
    return settings


def run_of(data, folder: Path, **fields) -> RunConfig:
    checkpoint = {"every_steps": 1, "keep": 10}
    config = run_config(TINY, steps=STEPS, packs_per_step=2, checkpoint=checkpoint, **fields)
    return config.model_copy(update={"dir": folder, "data": data})


def start(config: RunConfig, num_ranks: int) -> multiprocessing.Process:
    """The run in a process group of its own."""

    def body() -> None:
        os.setpgrp()
        torch.set_num_threads(1)
        run_local(pretrain, num_ranks, config)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def finish(config: RunConfig, num_ranks: int) -> None:
    process = start(config, num_ranks)
    process.join(120)
    assert process.exitcode == 0


def kill_after_step(step: int, config: RunConfig) -> None:
    """Start the run on two ranks and kill it once the checkpoint of ``step`` is there."""
    process = start(config, 2)
    deadline = time.monotonic() + 60
    while not (config.dir / "checkpoints" / f"step_{step:06d}").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def weights_of(config: RunConfig) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(config.dir / "checkpoints" / f"step_{STEPS:06d}")
    return {rule.ours.name: reader.read(rule.ours.name).clone() for rule in rules_for(config.model)}


def losses_of(config: RunConfig) -> dict[int, float]:
    rows = [json.loads(line) for line in (config.dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=["dp2", "tp2"])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(layout, data, tmp_path):
    parallel = ParallelConfig(**layout)
    whole = run_of(data, tmp_path / "whole", parallel=parallel)
    finish(whole, 2)
    killed = run_of(data, tmp_path / "killed", parallel=parallel)
    kill_after_step(3, killed)
    finish(killed, 2)
    assert losses_of(killed) == losses_of(whole)
    ours, theirs = weights_of(killed), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    events = [json.loads(line)["event"] for line in (killed.dir / "events.jsonl").read_text().splitlines()]
    assert "resume" in events


def test_a_run_goes_on_with_the_same_data_on_other_layouts(data, tmp_path):
    """Killed as dp 2, again as pp 2 x vpp 2, ended by one process: the losses of a run that one process made alone."""
    whole = run_of(data, tmp_path / "whole")
    finish(whole, 1)
    killed = run_of(data, tmp_path / "killed")
    kill_after_step(2, killed)
    kill_after_step(4, run_of(data, tmp_path / "killed", parallel=ParallelConfig(pp=2, vpp=2)))
    finish(killed, 1)
    assert losses_of(killed) == pytest.approx(losses_of(whole), rel=3e-6)
    ours, theirs = weights_of(killed), weights_of(whole)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_a_finished_run_started_again_changes_nothing(data, tmp_path):
    config = run_of(data, tmp_path / "run")
    finish(config, 2)
    before = losses_of(config)
    finish(config, 2)
    assert losses_of(config) == before


def test_old_checkpoints_are_dropped_and_the_newest_kept(data, tmp_path):
    config = run_of(data, tmp_path / "run")
    kept = config.train.checkpoint.model_copy(update={"keep": 2})
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint": kept})})
    finish(config, 2)
    folder = config.dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_000005", "step_000006"]
    assert (folder / "latest").read_text() == "step_000006\n"
