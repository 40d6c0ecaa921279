"""A run that gets a signal saves, ends with its own exit code, and goes on to the bits of an uninterrupted one."""

import os
import signal
import time

import psutil
import pytest

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.errors import Interrupted
from mimo_megatron.train.run_folder import RunFolder
from tests.e2e.faults_run import assert_same_run, events_of, finish, rows_of, run_of, start, wait_for, write_data

RARELY = {"every_steps": 100}  # so that only the signal saves


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("layout", "number", "to_one_rank"),
    [({}, signal.SIGTERM, False), ({"tp": 2}, signal.SIGUSR1, True), ({"pp": 2}, signal.SIGTERM, True)],
    ids=["dp2-launcher", "tp2-one-rank", "pp2-one-rank"],
)
def test_a_signalled_run_is_saved_and_goes_on_to_the_same_bits(layout, number, to_one_rank, data, tmp_path):
    steps, parallel = 24, ParallelConfig(**layout)
    whole = run_of(data, tmp_path / "whole", steps, checkpoint=RARELY, parallel=parallel)
    finish(whole, 2)
    stopped = run_of(data, tmp_path / "stopped", steps, checkpoint=RARELY, parallel=parallel)
    process = start(stopped, 2)
    at_least = 2
    wait_for(lambda: len(rows_of(stopped)) >= at_least, process)
    target = psutil.Process(process.pid).children()[1].pid if to_one_rank else process.pid
    os.kill(target, number)
    process.join(60)
    assert process.exitcode == Interrupted.exit_code
    last_step = len(rows_of(stopped))
    assert at_least <= last_step < steps
    assert RunFolder(stopped.dir).checkpoint_steps() == [last_step]
    (row,) = [row for row in events_of(stopped) if row["event"] == "interrupted"]
    assert row["step"] == last_step
    finish(stopped, 2)
    assert_same_run(stopped, whole)
    assert [row["step"] for row in events_of(stopped) if row["event"] == "resume"] == [last_step]


@pytest.mark.parametrize("to", ["group", "launcher"])
def test_ctrl_c_ends_all_ranks_at_once_and_the_next_start_goes_on(to, data, tmp_path):
    config = run_of(data, tmp_path / "run", 40, parallel=ParallelConfig(pp=2))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs these tests may ignore it
    try:
        process = start(config, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: RunFolder(config.dir).checkpoint_steps(), process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    began = time.monotonic()
    (os.killpg if to == "group" else os.kill)(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode not in (None, 0) and time.monotonic() - began < 20
    assert not [one for one in ranks if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    last = max(RunFolder(config.dir).checkpoint_steps())
    shorter = config.model_copy(update={"train": config.train.model_copy(update={"steps": last + 1})})
    finish(shorter, 2)
    assert "resume" in [row["event"] for row in events_of(config)]


def test_one_rank_in_the_launchers_own_process_heeds_signals_too(data, tmp_path):
    config = run_of(data, tmp_path / "run", 40, checkpoint=RARELY)
    process = start(config, 1)
    wait_for(lambda: len(rows_of(config)) >= 1, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == Interrupted.exit_code
