"""Kills and overload: what is lost is worked out again, or ``unknown``; it is never a reward of 0."""

import random
import signal
import threading
import time

import psutil

from mimo_megatron.reward.client import SyncRewardClient
from mimo_megatron.reward.wire import ScoreItem, ScoreResult
from tests.reward_harness import SCRIPTED, running, wait_until

SLOW_RIGHT = {"do": "sleep", "seconds": 0.02}


def right(count: int, prefix: str, seconds: float = 0.02) -> list[ScoreItem]:
    gold = {**SLOW_RIGHT, "seconds": seconds}
    return [ScoreItem(id=f"{prefix}{place}", task="math", response="right", gold=gold) for place in range(count)]


def test_killed_workers_cost_no_item_its_reward_and_are_back_within_five_seconds() -> None:
    with running(pool=SCRIPTED, limits={"seconds": 5.0}) as service, SyncRewardClient(service.url) as client:
        results: list[ScoreResult] = []
        asking = threading.Thread(target=lambda: results.extend(client.score_all(right(200, "k"))))
        asking.start()
        for _ in range(6):
            time.sleep(0.25)
            victims = service.workers()
            for worker in victims:
                worker.kill()
            ids = {worker.pid for worker in victims}
            assert wait_until(lambda gone=ids: len({one.pid for one in service.workers()} - gone) == 2, 5) < 5
        asking.join()
        assert {(one.status, one.reward) for one in results} == {("ok", 1.0)} and len(results) == 200
        assert service.metric("reward_worker_events_total", event="lost") >= 6


def test_a_killed_service_leaves_no_process_and_the_client_gets_every_verdict_after_its_restart() -> None:
    with running(pool=SCRIPTED, limits={"seconds": 5.0}) as service, SyncRewardClient(service.url) as client:
        results: list[ScoreResult] = []
        asking = threading.Thread(target=lambda: results.extend(client.score_all(right(300, "s"), 60)))
        asking.start()
        time.sleep(0.7)
        family = service.descendants()
        service.stop(signal.SIGKILL)
        assert len(family) == 3 and wait_until(lambda: not any(map(psutil.Process.is_running, family)), 5) < 5
        assert asking.is_alive()
        service.start()
        asking.join()
        assert {(one.status, one.reward) for one in results} == {("ok", 1.0)} and len(results) == 300


def test_without_a_service_every_result_is_unknown_by_the_deadline() -> None:
    with SyncRewardClient("http://127.0.0.1:1") as client:
        began = time.monotonic()
        results = client.score_all(right(100, "n"), deadline_seconds=1.0)
        assert time.monotonic() - began < 4
    assert {(one.status, one.reward, one.reason.value) for one in results} == {("unknown", None, "deadline")}


def test_twenty_times_too_much_is_refused_in_time_and_memory_stays_bounded() -> None:
    settings = dict(pool=SCRIPTED, limits={"seconds": 5.0}, queue_items=128)
    with running(**settings) as service:  # two workers at 20 ms: 100 items a second
        process = psutil.Process(service.process.pid)
        before, peak, stop = process.memory_info().rss, 0, time.monotonic() + 6
        results: list[list[ScoreResult]] = []

        def ask(number: int) -> None:
            with SyncRewardClient(service.url, batch_items=64) as client:
                client._client.window.limit = 4096  # who does not listen
                some = right(1000, f"o{number}-")
                some = [item.model_copy(update={"response": "right" + " " * 20_000}) for item in some[:500]] + some[
                    500:
                ]
                random.Random(number).shuffle(some)
                results.append(client.score_all(some, stop - time.monotonic()))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.05)
        refused = service.metric("reward_requests_total", path="/v1/score", code="429")
        answered = [one for some in results for one in some]
        assert len(answered) == 8000 and refused > 20
        assert all(one.status != "unknown" or one.reward is None for one in answered)
        assert {one.reward for one in answered if one.status == "ok" and one.answer == "right"} == {1.0}
        assert peak - before < 150 << 20
        assert wait_until(lambda: service.metric("reward_queue_items", lane="math") == 0, 10) < 10
