"""A run that is killed and started again ends with the very bits of one that was left alone."""

import os
import signal

import pytest
import torch

from mimo_megatron.config.run import ParallelConfig, RunConfig
from tests.e2e.faults_run import (
    assert_same_run,
    events_of,
    finish,
    losses_of,
    run_of,
    start,
    wait_for,
    weights_of,
    write_data,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


OVERLAPPED = dict(
    overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=50_000, offload_activations="all"
)


@pytest.mark.parametrize(
    ("layout", "train"), [({}, {}), ({"tp": 2}, {}), ({}, OVERLAPPED)], ids=["dp2", "tp2", "dp2, overlapped, offloaded"]
)
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(layout, train, data, tmp_path):
    """Checkpoints are taken while parameters are still being gathered, where that is overlapped."""
    parallel = ParallelConfig(**layout)
    whole = run_of(data, tmp_path / "whole", parallel=parallel, **train)
    finish(whole, 2)
    killed = run_of(data, tmp_path / "killed", parallel=parallel, **train)
    kill_after_step(3, killed)
    finish(killed, 2)
    assert_same_run(killed, whole)
    assert "resume" in [row["event"] for row in events_of(killed)]


def kill_after_step(step: int, config: RunConfig) -> None:
    """Start the run on two ranks and kill it once the checkpoint of ``step`` is there."""
    process = start(config, 2)
    wait_for((config.dir / "checkpoints" / f"step_{step:06d}").exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


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
