"""The worker pool: what a hung, greedy or killed worker costs, and whom. Real processes, killed for real."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mimo_megatron.errors import RewardError
from mimo_megatron.reward.service import frames
from mimo_megatron.reward.service.nursery import Worker
from mimo_megatron.reward.service.pool import MathPool, Outcome, PoolSettings
from mimo_megatron.reward.service.worker import Limits
from mimo_megatron.reward.verdict import Reason
from tests.repository import ROOT
from tests.reward_harness import wait_until

KILLED = Outcome(None, Reason.KILLED_TWICE)


def settings(seconds: float = 1.0, **changes: Any) -> PoolSettings:
    given = dict(num_workers=2, target="tests.reward_jobs:handle", warm="tests.reward_jobs:warm")
    return PoolSettings(limits=Limits(seconds=seconds), **{**given, **changes})


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    with MathPool(settings()) as pool:
        yield pool


def pids(pool: MathPool) -> set[int]:
    return {worker.pid for worker in pool.pool.workers if worker and not worker.ended.done()}


def test_a_hog_costs_its_neighbours_nothing(pool: MathPool) -> None:
    jobs: list[dict[str, Any]] = [{"do": "echo", "say": place} for place in range(200)]
    hogs = [50, 120]
    for place in hogs:
        jobs[place] = {"do": "spin", "place": place}
    outcomes = pool.map(jobs)
    assert [outcomes[place] for place in hogs] == [KILLED, KILLED]
    for place in set(range(200)) - set(hogs):
        value = outcomes[place].value
        assert value is not None and value["said"] == place


def test_a_job_that_killed_two_workers_is_answered_at_once(pool: MathPool) -> None:
    hog = {"do": "spin", "place": "quarantine"}
    assert pool.call(hog) == KILLED
    began = time.monotonic()
    assert pool.call(hog) == KILLED
    assert time.monotonic() - began < 0.5
    assert pool.call({"do": "echo", "place": "quarantine"}).value  # another job is not taken for it


def test_the_quarantine_is_bounded() -> None:
    with MathPool(settings(0.1, quarantine_size=2)) as pool:
        pool.map([{"do": "spin", "place": place} for place in range(4)])
        assert pool.pool.num_quarantined == 2


def test_the_clock_of_a_job_starts_when_a_worker_gets_it(pool: MathPool) -> None:
    outcomes = pool.map([{"do": "sleep", "seconds": 0.4, "place": place} for place in range(12)])  # the last waits 2 s
    assert all(outcome.value for outcome in outcomes)


def test_a_memory_bomb_stays_under_the_limit_and_is_the_jobs_fault() -> None:
    limit = 300 << 20
    with MathPool(
        PoolSettings(1, Limits(limit, 5.0), target="tests.reward_jobs:handle", warm="tests.reward_jobs:warm")
    ) as pool:
        peaks = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                for pid in pids(pool):
                    try:
                        peaks.append(psutil.Process(pid).memory_info().rss)
                    except psutil.NoSuchProcess:
                        continue
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert pool.call({"do": "eat"}) == KILLED
        stop.set()
        watcher.join()
        assert pool.pool.events["memory"] == 2
        assert 50 << 20 < max(peaks) <= limit
        assert pool.call({"do": "echo"}).value


def test_a_crash_is_the_jobs_fault(pool: MathPool) -> None:
    assert pool.call({"do": "crash"}) == KILLED


def test_a_worker_killed_from_outside_is_not_the_jobs_fault(pool: MathPool) -> None:
    assert pool.call({"do": "kill_self"}) == Outcome(None, Reason.WORKER_LOST)
    assert pool.call({"do": "echo"}).value


def test_a_job_whose_worker_is_killed_from_outside_once_is_done_by_another(pool: MathPool) -> None:
    before = pids(pool)
    answers: list[Outcome] = []
    asking = threading.Thread(target=lambda: answers.extend(pool.map([{"do": "sleep", "seconds": 0.5}] * 2)))
    asking.start()
    time.sleep(0.2)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    asking.join()
    assert all(answer.value and answer.value["pid"] not in before for answer in answers)


def test_idle_workers_that_die_are_replaced(pool: MathPool) -> None:
    before = pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: len(pids(pool) - before) == 2, 20) < 20


def test_a_dead_zygote_is_replaced(pool: MathPool) -> None:
    zygote = psutil.Process(next(iter(pids(pool)))).parent()
    assert zygote is not None and zygote.pid != os.getpid()
    zygote.kill()
    assert pool.call({"do": "echo", "say": "still here"}).value
    wait_until(lambda: pool.pool.is_warm)


def test_a_failing_job_says_so_and_keeps_its_worker() -> None:
    with MathPool(settings(num_workers=1)) as pool:
        first = pool.call({"do": "echo"}).value
        assert pool.call({"do": "fail"}) == Outcome(None, Reason.INTERNAL)
        assert first and pool.call({"do": "echo"}).value == first


def test_workers_are_replaced_after_so_many_jobs_and_when_they_have_grown() -> None:
    with MathPool(settings(num_workers=1, recycle_jobs=3)) as pool:
        seen = [outcome.value["pid"] for outcome in pool.map([{"do": "echo"}] * 7) if outcome.value]
        assert seen[0] == seen[2] != seen[3] == seen[5] != seen[6]
    with MathPool(settings(num_workers=1, recycle_rss_bytes=60 << 20)) as pool:
        grown = pool.call({"do": "grow", "mib": 80}).value
        after = pool.call({"do": "echo"}).value
        assert grown and after and grown["pid"] != after["pid"]


def test_a_worker_reaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    target = tmp_path / "file"
    target.touch()
    with socket.create_server(("127.0.0.1", 0)) as server, MathPool(settings()) as pool:
        socket.create_connection(server.getsockname()).close()  # from here it works
        seen = pool.call({"do": "look", "port": server.getsockname()[1], "file": str(target)}).value
        assert seen is not None
        if pool.pool.is_isolated:
            assert seen["network"] == "OSError"
    assert seen["file"] == "OSError" and target.read_bytes() == b""
    assert seen["no_new_privs"] == "1" and seen["ground_types"] == "python" and seen["secret"] is None
    assert seen["heavy"] == [] and seen["rss_kib"] < 60 << 10


def test_no_worker_outlives_a_process_that_is_killed() -> None:
    code = (
        "import time; from tests.unit.test_reward_pool import *\n"
        "with MathPool(settings(60)) as pool:\n"
        "    wait_until(lambda: pool.pool.is_warm)\n"
        "    print(*pids(pool), flush=True)\n"
        "    pool.map([{'do': 'spin'}] * 2)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    zygote = workers[0].parent()
    assert zygote is not None and len(workers) == 2
    time.sleep(0.2)  # both are busy now, deaf to their sockets
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert wait_until(lambda: not any(one.is_running() for one in (*workers, zygote)), 5) < 5


def test_a_pool_whose_self_test_fails_does_not_start() -> None:
    with pytest.raises(RewardError, match="antlr4-python3-runtime is 4"):
        MathPool(settings(warm="tests.reward_jobs:warm_badly")).__enter__()
    with pytest.raises(RewardError, match="ModuleNotFoundError"):
        MathPool(settings(target="tests.nowhere:handle")).__enter__()


def test_many_threads_may_share_a_pool(pool: MathPool) -> None:
    said: list[Any] = []

    def ask(number: int) -> None:
        for place in range(10):
            value = pool.call({"do": "echo", "say": [number, place]}).value
            said.append(value and value["said"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == [[number, place] for number in range(16) for place in range(10)]


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\4nope", b"\0\0\0\2[]", b"\0\0\0\1\xff"])
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    with pytest.raises(frames.BadFrame):
        frames.take(bytearray(data))


def test_frames_are_read_however_they_are_cut() -> None:
    sent = [{"a": 1}, {"b": "é" * 1000}, {}]
    data = b"".join(map(frames.encode, sent))
    buffer, got = bytearray(), []
    for place in range(len(data)):
        buffer += data[place : place + 1]
        if (message := frames.take(buffer)) is not None:
            got.append(message)
    assert got == sent and not buffer


def test_an_answer_that_is_nonsense_costs_its_own_job_and_no_slot() -> None:
    with MathPool(settings(num_workers=1)) as pool:
        told: list[Any] = [{"value": {}, "rss": "much"}]
        ask = Worker.ask

        async def lie(self: Worker, frame: bytes, seconds: float) -> Any:
            return told.pop() if told else await ask(self, frame, seconds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Worker, "ask", lie)
            assert pool.call({"do": "echo", "say": 1}) == Outcome(None, Reason.INTERNAL)
            assert (pool.call({"do": "echo", "say": 2}).value or {})["said"] == 2


def test_without_file_handles_jobs_wait_and_are_done_when_there_are_some() -> None:
    with MathPool(settings(num_workers=1)) as pool:
        assert pool.call({"do": "echo", "say": 0}).value
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        (worker,) = (one for one in pool.pool.workers if one)
        outcomes: list[Outcome] = []
        asking = threading.Thread(target=lambda: outcomes.append(pool.call({"do": "echo", "say": 1})))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.3)
            asking.start()
            time.sleep(0.5)
            assert not outcomes
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        asking.join(10)
        assert outcomes and (outcomes[0].value or {})["said"] == 1
