"""The service over HTTP: who is answered what. A real server in a process of its own, with scripted workers."""

import argparse
import asyncio
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.math_items import math_items
from mimo_megatron.cli import serve
from mimo_megatron.reward.client import RewardClient, SyncRewardClient
from mimo_megatron.reward.wire import MAX_BODY_BYTES, MAX_ITEM_BYTES, ScoreItem
from tests.repository import ROOT
from tests.reward_harness import SCRIPTED, Service, running, wait_until

PAGE = (ROOT / "docs/rewards.md").read_text()
TOKEN = "a-token-for-tests-only"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(token=TOKEN, pool={**SCRIPTED, "num_workers": 2}, limits={"seconds": 1.0}, body_seconds=1.0) as one:
        yield one


def items(count: int, prefix: str, gold: Any = "a", response: str = "a") -> list[ScoreItem]:
    return [ScoreItem(id=f"{prefix}{place}", task="math", response=response, gold=gold) for place in range(count)]


def post(service: Service, tree: Any, **changes: Any) -> httpx.Response:
    headers = {**service.headers, **changes.pop("headers", {})}
    return httpx.post(service.url + changes.pop("path", "/v1/score"), json=tree, headers=headers, timeout=30, **changes)


def batch(some: list[ScoreItem], name: str = "b", **more: Any) -> dict[str, Any]:
    return {"batch_id": name, "items": [json.loads(item.model_dump_json()) for item in some], **more}


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_items_of_all_lanes_are_answered_in_their_order(service: Service) -> None:
    box = {"image": {"size": [100, 100], "shown": [100, 100]}}
    tree = batch(items(2, "m") + items(1, "w", gold="b"))
    tree["items"].insert(1, {"id": "c", "task": "count", "response": "\\boxed{5}", "gold": 5})
    tree["items"].append(
        {"id": "x", "task": "box", "response": '[{"bbox_2d": [0, 0, 50, 50]}]', "gold": [[0, 0, 50, 50]], "meta": box}
    )
    tree["items"].append({"id": "g", "task": "box", "response": "", "gold": "none", "meta": box})
    answer = post(service, tree).json()
    got = [(one["id"], one["status"], one["reward"]) for one in answer["results"]]
    assert got == [
        ("m0", "ok", 1),
        ("c", "ok", 1),
        ("m1", "ok", 1),
        ("w0", "ok", 0),
        ("x", "ok", 1),
        ("g", "unknown", None),
    ]
    assert answer["batch_id"] == "b" and len(answer["reward_version"]) == 16


def test_without_the_token_nothing_is_told(service: Service) -> None:
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"}):
        for path in ("/v1/score", "/v1/cancel", "/metrics", "/openapi.json", "/docs"):
            answer = httpx.request("POST" if "v1" in path else "GET", service.url + path, headers=given)
            assert code(answer) == (401, "unauthorized") and answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(service.url + "/healthz").json() == {"ok": True}
    ready = httpx.get(service.url + "/readyz")
    assert ready.status_code == 200 and ready.json()["ready"] and isinstance(ready.json()["degraded"], list)


def test_a_body_beyond_the_limit_is_413_however_it_comes(service: Service) -> None:
    too_much = b" " * (MAX_BODY_BYTES + 1)
    headers = {**service.headers, "content-type": "application/json"}
    plain = httpx.post(service.url + "/v1/score", content=too_much, headers=headers)
    assert code(plain) == (413, "body_too_large")
    chunks = (too_much[place : place + 65536] for place in range(0, len(too_much), 65536))
    chunked = httpx.post(service.url + "/v1/score", content=chunks, headers=headers)
    assert "content-length" not in chunked.request.headers and code(chunked) == (413, "body_too_large")
    lying = connection(service)
    lying.putrequest("POST", "/v1/score")
    for name, value in {**headers, "content-length": str(1 << 60)}.items():
        lying.putheader(name, value)
    lying.endheaders(b"{}")
    assert lying.getresponse().status == 413


def test_a_body_that_never_ends_is_408_and_one_that_is_longer_than_said_is_cut(service: Service) -> None:
    headers = {**service.headers, "content-type": "application/json", "content-length": "100"}
    slow = connection(service)
    slow.putrequest("POST", "/v1/score")
    for name, value in headers.items():
        slow.putheader(name, value)
    slow.endheaders(b"{}")
    assert slow.getresponse().status == 408
    long = connection(service)
    long.putrequest("POST", "/v1/score")
    for name, value in {**headers, "content-length": "2"}.items():
        long.putheader(name, value)
    long.endheaders(b"{}" + b"x" * 1000)
    assert long.getresponse().status == 422
    assert httpx.get(service.url + "/healthz").status_code == 200


def connection(service: Service) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", int(service.url.rpartition(":")[2]), timeout=20)


def test_what_breaks_the_wire_format_is_refused_by_name(service: Service) -> None:
    good = batch(items(1, "i"))
    item = good["items"][0]
    for tree in (
        {**good, "items": []},
        {**good, "extra": 1},
        {**good, "items": [{**item, "task": "poetry"}]},
        {**good, "items": [item] * 1025},
        {**good, "deadline_ms": 0},
        [],
    ):
        assert code(post(service, tree)) == (422, "invalid")
    assert code(post(service, {**good, "items": [item, item]})) == (422, "repeated_id")
    assert code(post(service, {**good, "items": [{**item, "task": "rm_text"}]})) == (422, "no_model")
    large = {**item, "response": "x" * MAX_ITEM_BYTES}
    assert code(post(service, {**good, "items": [large]})) == (413, "item_too_large")
    assert code(post(service, good, headers={"content-type": "text/plain"})) == (415, "not_json")
    for text in (b"{", b"\xff", b'{"batch_id": "\\ud800"}', b"[" * 100_000):
        headers = {**service.headers, "content-type": "application/json"}
        answer = httpx.post(service.url + "/v1/score", content=text, headers=headers)
        assert code(answer) == (422, "invalid")


def test_a_gold_that_json_cannot_carry_is_unknown(service: Service) -> None:
    body = '{"batch_id": "b", "items": [{"id": "i", "task": "math", "response": "a", "gold": [1e999]}]}'
    answer = httpx.post(
        service.url + "/v1/score", content=body, headers={**service.headers, "content-type": "application/json"}
    )
    assert answer.json()["results"][0]["reason"] == "bad_gold"


def test_the_same_item_is_worked_out_once(service: Service) -> None:
    slow = batch(items(1, "once", gold={"do": "sleep", "seconds": 0.3}, response="right"))
    before = service.metric("reward_cache_hits_total")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: post(service, slow).json()["results"][0], range(4)))
    answers.append(post(service, slow).json()["results"][0])
    assert {(one["reward"], one["reason"]) for one in answers} == {(1.0, "right")}
    assert service.metric("reward_cache_hits_total") == before + 4
    assert answers[-1]["ms"] < 100


def test_at_its_deadline_an_item_is_unknown_and_asked_again_it_is_judged(service: Service) -> None:
    slow = batch(items(1, "late", gold={"do": "sleep", "seconds": 0.5}, response="right"), deadline_ms=100)
    (late,) = post(service, slow).json()["results"]
    assert (late["status"], late["reason"], late["reward"]) == ("unknown", "deadline", None)
    (judged,) = post(service, {**slow, "deadline_ms": 5000}).json()["results"]
    assert judged["reward"] == 1.0


def test_cancelled_items_are_unknown_and_their_queue_is_free(service: Service) -> None:
    some = items(40, "cancel", gold={"do": "sleep", "seconds": 0.5}, response="right")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(post, service, batch(some, "to-cancel"))
        wait_until(lambda: service.metric("reward_queue_items", lane="math") >= 30)
        told = post(service, {"batch_id": "to-cancel"}, path="/v1/cancel").json()
        results = waiting.result().json()["results"]
    reasons = [one["reason"] for one in results]
    assert told["cancelled"] == reasons.count("cancelled") >= 30
    assert set(reasons) <= {"cancelled", "right"}
    wait_until(lambda: service.metric("reward_queue_items", lane="math") == 0, 3)


def test_metrics_tell_verdicts_latencies_kills_and_workers(service: Service) -> None:
    (killed,) = post(service, batch(items(1, "hog", gold={"do": "spin"}))).json()["results"]
    assert (killed["status"], killed["reward"], killed["reason"]) == ("invalid", 0.0, "killed_twice")
    assert service.metric("reward_verdicts_total", reason="killed_twice", status="invalid", task="math") == 1
    assert service.metric("reward_worker_events_total", event="deadline") >= 2
    assert service.metric("reward_seconds_count", task="math") >= 1
    assert service.metric("reward_value_count", task="math") >= 1
    assert service.metric("reward_quarantined_items") >= 1
    post(service, batch(items(20, "warm")))
    assert service.metric("reward_worker_rss_bytes", worker="0") > 1 << 20


def test_64_threads_and_asyncio_get_the_same_verdicts_to_the_bit(service: Service) -> None:
    shown = {"image": {"size": [1000, 800], "shown": [700, 560]}}
    some = [
        ScoreItem.model_validate(
            {"id": f"p{place}", "task": "box", "response": f'[{{"bbox_2d": [{place}, 3, {place + 200}, 177]}}]',
             "gold": [[100, 50, 400, 260]], "meta": shown}
        )
        for place in range(200)
    ]  # fmt: skip
    some += items(100, "eq") + items(100, "ne", gold="b")
    bits = [
        (one.status, one.reward, one.reason, tuple(one.parts.items())) for one in asyncio.run(by_asyncio(service, some))
    ]
    with SyncRewardClient(service.url, TOKEN, batch_items=16) as client, ThreadPoolExecutor(64) as threads:
        for got in threads.map(lambda number: client.score_all(some[number % 4 :: 4]), range(64)):
            wanted = {one.id: bit for one, bit in zip(some, bits, strict=True)}
            assert all((r.status, r.reward, r.reason, tuple(r.parts.items())) == wanted[r.id] for r in got)
    assert len({bit[1] for bit in bits}) > 50


async def by_asyncio(service: Service, some: list[ScoreItem]) -> list[Any]:
    async with RewardClient(service.url, TOKEN, batch_items=33) as client:
        streamed = {result.id: result async for result in client.score(some)}
        again = await client.score_all(some)
        assert [streamed[item.id].reward for item in some] == [result.reward for result in again]
        return again


def test_leaving_the_stream_early_cancels_the_rest(service: Service) -> None:
    some = items(60, "left", gold={"do": "sleep", "seconds": 0.9}, response="right")
    with SyncRewardClient(service.url, TOKEN, batch_items=1) as client:
        for _ in client.score(some):
            break
    assert wait_until(lambda: service.metric("reward_queue_items", lane="math") == 0, 4) < 4


def test_the_command_serves_the_real_rules() -> None:
    items_ = math_items(200, seed=11)
    command = [sys.executable, "-m", "mimo_megatron.cli", "serve-rewards", "--port", "0", "--workers", "2"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        asked = [
            ScoreItem(id=str(place), task="math", response=response, gold=gold)
            for place, (response, gold, _) in enumerate(items_)
        ]
        with SyncRewardClient(url) as client:
            results = client.score_all(asked)
        assert [result.reward for result in results] == [float(is_right) for _, _, is_right in items_]
        example = re.search(r"```python\n(from mimo_megatron.reward.client.*?)```", PAGE, re.DOTALL)
        assert example is not None
        code = example[1].replace("http://127.0.0.1:8100", url)
        told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert told.stdout.splitlines() == ["a ok 1.0 right", "b ok 0.0 wrong", "c unknown None bad_gold"]
        loaded = {Path(one.path).name for one in psutil.Process(server.pid).memory_maps()}
        assert not any(name.startswith("libtorch") for name in loaded)
    finally:
        server.terminate()
        assert server.wait(30) == 0
        server.stdout.close()


def test_the_page_names_every_option_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    serve.VERBS[0].add_arguments(parser)
    options = {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}
    assert len(options) > 8 and not {name for name in options if f"`{name}`" not in PAGE}


def test_public_bind_without_a_token_does_not_start() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "mimo_megatron.cli", "serve-rewards", "--host", "0.0.0.0", "--port", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.returncode == 2 and "--token-file" in told.stderr and told.stdout == ""


def test_a_failed_self_test_does_not_start(tmp_path: Path) -> None:
    settings = json.dumps({"pool": {**SCRIPTED, "warm": "tests.reward_jobs:warm_badly"}})
    told = subprocess.run(
        [sys.executable, "-m", "tests.reward_harness", settings], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert told.returncode != 0 and "antlr4-python3-runtime is 4.9.3; install 4.13.2" in told.stderr
    assert told.stdout == ""


def test_asked_to_stop_it_gives_the_last_answers_and_leaves_nobody_behind() -> None:
    with running(pool=SCRIPTED, limits={"seconds": 5}) as service:
        family = service.descendants()
        answers: list[httpx.Response] = []
        some = batch(items(1, "last", gold={"do": "sleep", "seconds": 1}, response="right"))
        asking = threading.Thread(target=lambda: answers.append(post(service, some)))
        asking.start()
        wait_until(lambda: service.metric("reward_queue_items", lane="math") == 1)
        assert service.stop(signal.SIGTERM) == 0
        asking.join()
        assert answers[0].json()["results"][0]["reward"] == 1.0
        assert len(family) == 3 and wait_until(lambda: not any(one.is_running() for one in family), 5) < 5
