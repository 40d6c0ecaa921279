"""The reward service against what is usual, on the same items, in one run.

    python benchmarks/bench_rewards.py                 # all four parts, about ten minutes on two idle cores
    python benchmarks/bench_rewards.py math --items 1000
    python benchmarks/bench_rewards.py cheap --seconds 20
    python benchmarks/bench_rewards.py hogs --items 200
    python benchmarks/bench_rewards.py overload --seconds 10

``math``: mixed answers through the service, through a ProcessPoolExecutor with ``future.result(timeout)`` as verl uses
it (our own few lines of that pattern), and through bare Math-Verify in one process. ``cheap``: box, count and point
items in an open loop, latency counted from when a request was due. ``hogs``: 5 % of the items hang or eat memory; the
service's guard refuses most of them unread, so its workers are shown around bare Math-Verify as well, where they kill.
``overload``: some twenty times what one worker can do. CPU seconds count the service's processes, not the load
generator. The matrix among the hogs is small on purpose: eye(20000) takes 15 GB in a pool without a memory limit.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import psutil
from math_items import math_items
from math_verify import parse, verify
from provenance import ROOT, write_rows

from mimo_megatron.reward.client import SyncRewardClient
from mimo_megatron.reward.service.pool import MathPool, PoolSettings
from mimo_megatron.reward.service.worker import Limits
from mimo_megatron.reward.wire import ScoreItem, ScoreResult

WORKERS = 2
VERL_TIMEOUT = 3.0
HOGS = (
    "9^{9^{9^9}}", "(((9!)!)!)!", r"\operatorname{eye}(6000)", r"\Gamma(10^9)", "x" + "(" * 400 + "1" + ")" * 400,
    r"\sum_{k=1}^{10^9} \frac{1}{k^2}", r"\int_0^1 \frac{\sin(x^x)}{\ln(x+2)^x} dx", "(a+b+c+d+e)^{60}",
)  # fmt: skip
Item = tuple[str, str, bool]
Row = dict[str, Any]


# ---- processes and their cost ----------------------------------------------------------------------------------------


class Meter:
    """Wall and CPU seconds of a process and all that it starts, and the highest resident sizes."""

    def __init__(self, process: psutil.Process, including_itself: bool = True) -> None:
        self._process, self._with_it = process, including_itself
        self._cpu: dict[int, float] = {}
        self.peak_child_bytes = self.peak_own_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        self._look()
        self._first = sum(self._cpu.values())
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.wall = time.perf_counter() - self._began
        self.cpu = sum(self._cpu.values()) - self._first

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._look()

    def _look(self) -> None:
        for one in ([self._process] if self._with_it else []) + self._process.children(recursive=True):
            try:
                times = one.cpu_times()
                self._cpu[one.pid] = times.user + times.system  # of a process that ends: its last 50 ms are lost
                rss = one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            if one.pid == self._process.pid:
                self.peak_own_bytes = max(self.peak_own_bytes, rss)
            else:
                self.peak_child_bytes = max(self.peak_child_bytes, rss)


@contextmanager
def service(*options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A running service: its address and process."""
    command = [sys.executable, "-m", "mimo_megatron.cli", "serve-rewards", "--port", "0", "--workers", str(WORKERS)]
    server = subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    while httpx.get(url + "/readyz").status_code != 200:
        time.sleep(0.02)
    process = psutil.Process(server.pid)
    family = process.children(recursive=True)
    try:
        yield url, process
        family = process.children(recursive=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        _, left = psutil.wait_procs(family, timeout=5)
        assert not left, "the service left a process behind"


def through_service(items: list[Item], url: str) -> list[ScoreResult]:
    with SyncRewardClient(url) as client:
        return client.score_all(
            [
                ScoreItem(id=str(place), task="math", response=response, gold=gold)
                for place, (response, gold, _) in enumerate(items)
            ]
        )


# ---- the usual ways --------------------------------------------------------------------------------------------------


def math_verify_reward(response: str, gold: str) -> float:
    """Bare Math-Verify with its own timeouts, as most recipes call it."""
    try:
        return float(verify(parse(f"${gold}$"), parse(response)))
    except Exception:  # the pattern that is compared with
        return 0.0


def process_pool(items: list[Item], timeout: float = VERL_TIMEOUT) -> list[float | None]:
    """The pattern of verl: a pool, ``future.result(timeout)`` for each, 0 where it runs out. None where it did."""
    pool = ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"))
    futures = [pool.submit(math_verify_reward, response, gold) for response, gold, _ in items]
    rewards: list[float | None] = []
    for future in futures:
        try:
            rewards.append(future.result(timeout=timeout))
        except Exception:  # also a broken pool, which loses all that follow
            rewards.append(None)
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    return rewards


# ---- parts -----------------------------------------------------------------------------------------------------------


def bench_math(count: int) -> Iterator[Row]:
    items = math_items(count, seed=1, group=16)
    with service() as (url, process):
        through_service(math_items(64, seed=2), url)
        with Meter(process) as ours:
            results = through_service(items, url)
    rewards = [result.reward for result in results]
    yield math_row("service", items, rewards, ours, ours)
    with Meter(psutil.Process(), including_itself=False) as pool:
        pooled = process_pool(items, timeout=300.0)
    yield math_row("ProcessPoolExecutor (as verl)", items, pooled, pool, ours)
    with Meter(psutil.Process()) as bare:
        alone: list[float | None] = [math_verify_reward(response, gold) for response, gold, _ in items]
    yield math_row("bare Math-Verify, one process", items, alone, bare, ours)


def math_row(who: str, items: list[Item], rewards: list[float | None], meter: Meter, ours: Meter) -> Row:
    agree = sum(reward == float(is_right) for reward, (_, _, is_right) in zip(rewards, items, strict=True))
    return row(
        "math", who, len(items), wall=meter.wall, cpu=meter.cpu, right_verdicts=agree, unknown=rewards.count(None),
        times_ours_wall=meter.wall / ours.wall, times_ours_cpu=meter.cpu / ours.cpu,
        peak_worker_mb=meter.peak_child_bytes >> 20,
    )  # fmt: skip


def cheap_batch(number: int) -> str:
    rng = random.Random(number)
    shown = {"image": {"size": [1000, 800], "shown": [700, 560]}}
    x, y = rng.randint(0, 400), rng.randint(0, 300)
    response = "<think>" + "It is on the left. " * 40 + "</think>" + f'[{{"bbox_2d": [{x}, {y}, {x + 200}, {y + 99}]}}]'
    boxes = [
        {"id": f"b{place}", "task": "box", "response": response, "gold": [[100, 50, 400, 260]], "meta": shown}
        for place in range(6)
    ]
    count = {"id": "c", "task": "count", "response": "\\boxed{7}", "gold": 7}
    point = {"id": "p", "task": "point", "response": f"[{x}, {y}]", "gold": [100, 50, 400, 260], "meta": shown}
    return json.dumps({"batch_id": str(number), "items": [*boxes, count, point]})


async def open_loop(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Latencies in seconds, each from when the request was due, not from when there was time to send it."""
    latencies: list[float] = []
    failed = 0

    async def one(due: float, body: str) -> None:
        nonlocal failed
        answer = await http.post(url + "/v1/score", content=body, headers={"content-type": "application/json"})
        failed += answer.status_code != 200 or b'"unknown"' in answer.content
        latencies.append(time.perf_counter() - due)

    bodies = [cheap_batch(number) for number in range(500)]
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
    async with httpx.AsyncClient(limits=limits, timeout=30, trust_env=False) as http:
        tasks = []
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            due = began + number / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(one(due, bodies[number % len(bodies)])))
        await asyncio.gather(*tasks)
    latencies.sort()
    at = {name: latencies[int(part * (len(latencies) - 1))] * 1000 for name, part in _PARTS.items()}
    return {"requests": len(latencies), "failed": failed, **{name: round(ms, 2) for name, ms in at.items()}}


_PARTS = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}


def bench_cheap(seconds: float, rate: float) -> Iterator[Row]:
    with service() as (url, process):
        generate = [sys.executable, __file__, "generate", "--url", url, "--rate", str(rate), "--seconds"]
        subprocess.run([*generate, "3"], check=True, capture_output=True)
        before = process.memory_info().rss
        with Meter(process) as meter:
            done = subprocess.run([*generate, str(seconds)], check=True, capture_output=True, text=True)
        grown = process.memory_info().rss - before
    told = json.loads(done.stdout)
    yield row(
        "cheap", f"{rate:.0f} requests/s of 8 items", told.pop("requests"), wall=meter.wall, cpu=meter.cpu,
        rss_growth_mb=round(grown / 2**20, 1), **told,
    )  # fmt: skip


def bench_hogs(count: int) -> Iterator[Row]:
    rng = random.Random(3)
    items = math_items(count, seed=3)
    hogs = set(rng.sample(range(count), count // 20))
    for number, place in enumerate(sorted(hogs)):
        items[place] = (f"<think>so</think> \\boxed{{{HOGS[number % len(HOGS)]}+{number}}}", r"\frac{1}{2}", False)
    with service() as (url, process), Meter(process) as ours:
        rewards = [result.reward for result in through_service(items, url)]
    yield hog_row("service", items, hogs, rewards, ours)
    before = {one.pid for one in psutil.Process().children(recursive=True)}  # multiprocessing keeps a tracker
    jobs = [{"response": response, "gold": gold} for response, gold, _ in items]
    settings = PoolSettings(WORKERS, Limits(seconds=VERL_TIMEOUT), target="bare_math:handle", warm="bare_math:warm")
    with Meter(psutil.Process(), including_itself=False) as unguarded, MathPool(settings) as killed:
        outcomes = killed.map(jobs)
    left = {one.pid for one in psutil.Process().children(recursive=True)} - before
    assert not left, f"the pool left {left} behind"
    verdicts = [None if one.value is None else float(one.value["right"]) for one in outcomes]
    yield hog_row(
        "our workers around bare Math-Verify", items, hogs, verdicts, unguarded, kills=dict(killed.pool.events)
    )
    with Meter(psutil.Process(), including_itself=False) as pool:
        pooled = process_pool(items)
    yield hog_row("ProcessPoolExecutor (as verl)", items, hogs, pooled, pool)


def hog_row(who: str, items: list[Item], hogs: set[int], rewards: list[float | None], meter: Meter, **more: Any) -> Row:
    good = [place for place in range(len(items)) if place not in hogs]
    right = sum(rewards[place] == float(items[place][2]) for place in good)
    lost = sum(rewards[place] is None for place in good)
    return row(
        "hogs", who, len(items), wall=meter.wall, cpu=meter.cpu, good_items=len(good), right_verdicts=right,
        good_items_lost=lost, peak_worker_mb=meter.peak_child_bytes >> 20, **more,
    )  # fmt: skip


async def flood(url: str, items: list[Item], senders: int, seconds: float) -> dict[str, int]:
    """Every sender posts batches of 64 one after another and does not wait when it is refused."""
    seen = {"requests": 0, "refused": 0, "failed": 0, "judged": 0, "unknown": 0}
    until = time.perf_counter() + seconds

    async def send(number: int) -> None:
        count = number
        while time.perf_counter() < until:
            count += senders
            left = int(max(until - time.perf_counter(), 1) * 1000)
            body = bodies[count % len(bodies)].replace("ID-", f"{count}-").replace("DEADLINE", str(left))
            answer = await http.post(url + "/v1/score", content=body, headers={"content-type": "application/json"})
            seen["requests"] += 1
            seen["refused"] += answer.status_code == 429
            seen["failed"] += answer.status_code not in (200, 429)
            if answer.status_code == 200:
                unknown = sum(one["status"] == "unknown" for one in answer.json()["results"])
                seen["unknown"] += unknown
                seen["judged"] += 64 - unknown

    bodies = []  # made beforehand: the generator shares the cores
    for start in range(0, len(items) - 63, 64):
        chosen = [
            {"id": f"ID-{place}", "task": "math", "response": response, "gold": gold}
            for place, (response, gold, _) in enumerate(items[start : start + 64])
        ]
        bodies.append(f'{{"batch_id": "b", "deadline_ms": DEADLINE, "items": {json.dumps(chosen)}}}')
    limits = httpx.Limits(max_connections=senders)
    async with httpx.AsyncClient(limits=limits, timeout=seconds + 60, trust_env=False) as http:
        await asyncio.gather(*(send(number) for number in range(senders)))
    return seen


def bench_overload(seconds: float) -> Iterator[Row]:
    items = math_items(500, seed=5)
    with service("--queue", "1024", "--workers", "1") as (url, process):
        before = process.memory_info().rss
        with Meter(process) as meter:
            seen = asyncio.run(flood(url, items, senders=32, seconds=seconds))
        began = time.perf_counter()
        while 'reward_queue_items{lane="math"} 0.0' not in httpx.get(url + "/metrics").text:
            time.sleep(0.02)
        drained = time.perf_counter() - began
    offered = seen["requests"] * 64 / max(seen["judged"], 1)
    yield row(
        "overload", "32 senders that do not wait", seen.pop("requests"), wall=meter.wall, cpu=meter.cpu,
        offered_times_judged=round(offered, 1), **seen, drain_seconds=round(drained, 2),
        rss_growth_mb=round((meter.peak_own_bytes - before) / 2**20, 1),
    )  # fmt: skip


def row(part: str, who: str, count: int, wall: float, cpu: float, **more: Any) -> Row:
    facts = {name: round(fact, 2) if isinstance(fact, float) else fact for name, fact in more.items()}
    print(f"{part:9} {who:32} {count:6} in {wall:7.1f} s, {cpu:7.1f} CPU-s  {facts}", flush=True)
    return dict(
        part=part, what=who, items=count, wall_seconds=f"{wall:.2f}", cpu_seconds=f"{cpu:.2f}", facts=json.dumps(facts)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("all", "math", "cheap", "hogs", "overload", "generate")
    parser.add_argument("part", nargs="?", choices=parts, default="all", help="`generate` is used by `cheap` itself")
    parser.add_argument("--items", type=int, help="default 8192 for math, 1000 for hogs")
    parser.add_argument("--seconds", type=float, help="default 120 for cheap, 60 for overload")
    parser.add_argument("--rate", type=float, default=300.0)
    parser.add_argument("--url")
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()
    if values.part == "generate":
        print(json.dumps(asyncio.run(open_loop(values.url, values.rate, values.seconds))))
        return
    runs: dict[str, Callable[[], Iterator[Row]]] = {
        "math": lambda: bench_math(values.items or 8192),
        "cheap": lambda: bench_cheap(values.seconds or 120.0, values.rate),
        "hogs": lambda: bench_hogs(values.items or 1000),
        "overload": lambda: bench_overload(values.seconds or 60.0),
    }
    rows = [one for name, run in runs.items() if values.part in ("all", name) for one in run()]
    packages = ("math-verify", "sympy", "fastapi", "uvicorn", "httpx")
    print("wrote", write_rows("rewards", rows, measured=("mimo_megatron/reward",), packages=packages, out=values.out))


if __name__ == "__main__":
    main()
