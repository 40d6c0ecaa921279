"""A run's folder belongs to one run at a time, and lists every sample that was left out once."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from mimo_megatron.errors import ConfigError
from mimo_megatron.train import run_folder
from mimo_megatron.train.run_folder import RunFolder


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "_END_SECONDS", 0.1)
    monkeypatch.setattr(run_folder, "_LOOK_SECONDS", 0.02)


@pytest.mark.usefixtures("impatient")
def test_a_folder_in_use_is_refused_by_its_holder_until_it_is_free(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    used = rf"used by another run \(process .*:{os.getpid()}\)"
    with folder.in_use(), pytest.raises(ConfigError, match=used), RunFolder(folder.root).in_use():
        pytest.fail("two runs in one folder")
    with folder.in_use():
        pass


@pytest.mark.usefixtures("impatient")
def test_a_killed_process_holds_nothing(tmp_path):
    held = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with RunFolder(tmp_path).in_use():
            held.set()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert held.wait(10)
    with pytest.raises(ConfigError, match=f":{process.pid}"), RunFolder(tmp_path).in_use():
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with RunFolder(tmp_path).in_use():
        pass


def test_a_killed_run_whose_last_process_is_still_going_is_waited_for(tmp_path, log_lines):
    fork = multiprocessing.get_context("fork")

    def hold() -> None:
        with RunFolder(tmp_path).in_use():
            fork.Process(target=time.sleep, args=(1.5,)).start()  # a writer, say, that stands in the disk
            os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=hold)
    process.start()
    process.join()
    began = time.monotonic()
    with RunFolder(tmp_path).in_use():
        assert time.monotonic() - began > 0.2
    assert [f":{process.pid}): waiting for its end" in line for line in log_lines] == [True]


def test_the_claim_of_another_machine_is_waited_for_and_then_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_LEASE_SECONDS", 0.5)
    monkeypatch.setattr(run_folder, "_LOOK_SECONDS", 0.02)
    is_over = threading.Event()

    def hold(until: threading.Event) -> None:
        with RunFolder(tmp_path).in_use():
            (tmp_path / ".in-use").write_text("elsewhere:7\n")
            is_held.set()
            until.wait(30)

    for ends in (False, True):
        is_held, is_over = threading.Event(), threading.Event()
        thread = threading.Thread(target=hold, args=(is_over,))
        thread.start()
        assert is_held.wait(10)
        if ends:
            threading.Timer(0.1, is_over.set).start()
            with RunFolder(tmp_path).in_use():
                assert is_over.is_set()
        else:
            with pytest.raises(ConfigError, match="elsewhere:7"), RunFolder(tmp_path).in_use():
                pass
            is_over.set()
        thread.join()


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"file/run cannot be written .*name another"), folder.in_use():
        pass


def test_what_was_left_out_after_the_step_that_a_run_goes_on_from_is_listed_once(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.record_skipped([{"id": f"sample-{step}", "reason": "json", "detail": ""}], step)
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"step": 3, "id": "sam')  # killed there
    folder.forget_skipped_after(1)
    for step in (2, 3):
        folder.record_skipped([{"id": f"sample-{step}", "reason": "json", "detail": ""}], step)
    folder.record_skipped([], 4)
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["id"]) for row in rows] == [(1, "sample-1"), (2, "sample-2"), (3, "sample-3")]


def test_rows_of_older_versions_which_name_no_step_stay(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"id": "old", "reason": "json", "detail": ""}\n')
    RunFolder(tmp_path).forget_skipped_after(0)
    assert "old" in (tmp_path / "skipped.jsonl").read_text()
