"""A collective that does not come back ends the run, and the ranks that hold it up are named."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mimo_megatron.config.run import ParallelConfig, RunConfig
from mimo_megatron.data.loader import PackLoader
from mimo_megatron.errors import HUNG_EXIT_CODE, HungError
from mimo_megatron.mcore.boot import RankAddress, megatron, side_store
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.loop import pretrain
from mimo_megatron.train.watchdog import Place, Watchdog, explain
from tests.e2e.faults_run import run_of, write_data
from tests.harness import run_ranks

LIMIT_SECONDS = 2.0


def watched(address: RankAddress, folder: Path, sleeper_phase: str) -> None:
    """Four ranks; rank 2 sleeps in step 5 while the others are in an all-reduce."""
    with megatron(ParallelConfig(), address, timeout_seconds=60):
        store = side_store("heartbeats")
        if sleeper_phase == "dead" and address.rank == 2:
            time.sleep(60)
        with Watchdog(store, address.rank, address.world_size, LIMIT_SECONDS, folder) as watchdog:
            watchdog.at(5, "data")
            if sleeper_phase == "data" and address.rank == 2:
                time.sleep(60)
            watchdog.at(5, "forward-backward")
            if sleeper_phase == "forward-backward" and address.rank == 2:
                time.sleep(60)
            dist.all_reduce(torch.ones(1))


class StuckStore:
    """A file store whose file is gone looks for it until the limit of the collectives."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()

    def set(self, key: str, value: str) -> None:
        self.is_asked.set()
        time.sleep(60)


def test_a_rank_on_its_way_out_does_not_wait_for_a_store_that_is_stuck(tmp_path):
    store = StuckStore()
    with pytest.raises(KeyboardInterrupt), Watchdog(store, 0, 2, LIMIT_SECONDS, tmp_path):  # type: ignore[arg-type]
        assert store.is_asked.wait(20)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20


def report_of(folder: Path, phase: str) -> str:
    began = time.monotonic()
    with pytest.raises(mp.ProcessExitedException) as caught:
        run_ranks(watched, 4, folder, phase)
    assert caught.value.exit_code == HUNG_EXIT_CODE
    assert time.monotonic() - began < 40
    (report,) = folder.iterdir()
    return report.read_text()


def test_a_rank_that_sleeps_in_an_earlier_phase_is_named_with_its_place(tmp_path):
    said = report_of(tmp_path, "data")
    assert "did not arrive: rank 2 in step 5, data, for " in said and "test_watchdog.py" in said
    assert "waiting: ranks 0-1, 3 in step 5, forward-backward" in said


def test_a_rank_that_sleeps_in_the_same_phase_is_told_by_not_being_in_a_collective(tmp_path):
    said = report_of(tmp_path, "forward-backward")
    assert "not in a collective: rank 2 in step 5, forward-backward" in said
    assert "waiting: ranks 0-1, 3" in said and "all_reduce" in said


def test_a_rank_that_gives_no_sign_of_life_is_named(tmp_path):
    said = report_of(tmp_path, "dead")
    assert "no sign of life: rank 2; last seen never" in said and "waiting: ranks 0-1, 3" in said


def late_on_rank_1(address: RankAddress, config: RunConfig) -> None:
    read = PackLoader.next_step

    def next_step(self: PackLoader):
        time.sleep(60 if address.rank == 1 and self.state()["consumed"] >= 4 else 0)
        return read(self)

    PackLoader.next_step = next_step  # this process is the rank's own
    pretrain(address, config)


def test_a_training_run_whose_data_stalls_on_one_rank_names_it(tmp_path):
    config = run_of(write_data(tmp_path), tmp_path / "run", checkpoint={"every_steps": 0}, collective_timeout_seconds=8)
    with pytest.raises(HungError, match="hang_step"):
        run_local(late_on_rank_1, 2, config)
    said = (tmp_path / "run" / "faults" / "hang_step_000003.txt").read_text()
    assert "did not arrive: rank 1 in step 3, data" in said and "waiting: rank 0 in step 3, agreement" in said


def place(step: int, phase: str, beat: int, is_waiting: bool = True) -> Place:
    return Place(step, phase, 9.0, ("here.py:1 f",), is_waiting, beat)  # type: ignore[arg-type]


def test_a_rank_whose_beat_stands_still_is_silent_even_when_it_is_behind():
    before = {0: place(4, "save", 1), 1: place(3, "data", 1)}
    now = {0: place(4, "save", 2), 1: place(3, "data", 1)}
    said = explain(before, now, 2, 30)
    assert "no sign of life: rank 1; last seen in step 3, data" in said and "did not arrive" not in said


def test_where_all_ranks_wait_in_collectives_it_says_so():
    before, now = ({rank: place(4, "optimizer", beat) for rank in range(3)} for beat in (1, 2))
    said = explain(before, now, 3, 30)
    assert "all ranks wait inside collectives" in said and "waiting: ranks 0-2 in step 4, optimizer" in said


def test_where_no_rank_waits_in_a_collective_it_says_that_instead():
    before, now = ({rank: place(4, "save", beat, is_waiting=False) for rank in range(3)} for beat in (1, 2))
    said = explain(before, now, 3, 30)
    assert "no rank is inside a collective" in said and "ranks 0-2 in step 4, save" in said


def test_a_rank_that_speaks_up_between_the_readings_is_alive():
    now = {0: place(4, "save", 2), 1: place(4, "save", 1)}
    assert "no sign of life" not in explain({0: place(4, "save", 1)}, now, 2, 30)


def test_a_run_that_moves_is_left_alone(tmp_path):
    run_ranks(moving, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


def moving(address: RankAddress, folder: Path) -> None:
    with (
        megatron(ParallelConfig(), address) as mesh,
        Watchdog(side_store("beats"), address.rank, mesh.dp.size, 1.0, folder) as watchdog,
    ):
        for step in range(1, 9):
            watchdog.at(step, "data")
            time.sleep(0.3)
            dist.barrier()
