"""Strangers' bytes: whatever comes, the service answers by its OpenAPI page or refuses, and goes on."""

import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mimo_megatron.reward.client import SyncRewardClient
from mimo_megatron.reward.wire import ScoreItem
from tests.payloads import WRAPPERS, payloads
from tests.reward_harness import SCRIPTED, Service, running

NUM_FRAMES = 10_000
EXAMPLES = 200


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(pool=SCRIPTED, limits={"seconds": 1.0}, body_seconds=1.0) as one:
        yield one


@pytest.mark.slow
def test_every_answer_is_one_that_the_openapi_page_names(service: Service) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", service.url + "/openapi.json", "--checks", checks]
    command += ["--max-examples", str(EXAMPLES), "--seed", "1", "--generation-database", "none", "--no-color"]
    # A ready service answers 503 to nobody; were it not, 503 on /readyz would be on the page.
    told = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]
    assert "POST /v1/score" not in told.stdout or "FAILURES" not in told.stdout


@pytest.mark.slow
def test_ten_thousand_random_requests_do_not_harm_it(service: Service) -> None:
    rng = random.Random(1)
    port = int(service.url.rpartition(":")[2])
    before = {one.pid for one in service.workers()}
    body = json.dumps({"batch_id": "b", "items": [{"id": "i", "task": "math", "response": "a", "gold": "a"}]}).encode()
    codes: set[int] = set()
    with httpx.Client() as client:
        for number in range(NUM_FRAMES):
            if number % 20 == 0:
                with socket.create_connection(("127.0.0.1", port)) as raw:
                    raw.sendall(rng.randbytes(rng.randint(1, 400)) + b"\r\n\r\n")
                continue
            headers = {"content-type": "application/json"}
            path = rng.choice(["/v1/score", "/v1/cancel"])
            codes.add(client.post(service.url + path, content=_damaged(rng, body), headers=headers).status_code)
    assert codes <= {200, 413, 422} and {200, 422} <= codes
    assert {one.pid for one in service.workers()} == before
    assert httpx.get(service.url + "/readyz").status_code == 200


def _damaged(rng: random.Random, body: bytes) -> bytes:
    if rng.random() < 0.2:
        return rng.randbytes(rng.randint(0, 300))
    damaged = bytearray(body)
    for _ in range(rng.randint(0, 6)):
        place = rng.randrange(len(damaged))
        match rng.randrange(3):
            case 0:
                damaged[place] = rng.randrange(256)
            case 1:
                del damaged[place : place + rng.randint(1, 9)]
            case _:
                damaged[place:place] = rng.choice([b"[", b"{", b'"', b"1e999", b"NaN", b"\\ud800", b"\x00", b"," * 9])
        damaged = damaged or bytearray(b"x")
    return bytes(damaged)


def test_no_payload_is_executed_through_http(tmp_path: Path) -> None:
    """By the real rules in real workers, as answer and as gold; tests/unit/test_math_security.py has the control."""
    marker = tmp_path / "m"
    texts = [wrapper.format(payload) for payload in payloads(marker) for wrapper in WRAPPERS]
    items = [ScoreItem(id=f"a{place}", task="math", response=text, gold="5") for place, text in enumerate(texts)]
    items += [ScoreItem(id=f"g{place}", task="math", response="5", gold=text) for place, text in enumerate(texts)]
    with running() as service, SyncRewardClient(service.url) as client:
        results = client.score_all(items, deadline_seconds=120)
    assert not marker.exists()
    assert {result.reward for result in results} <= {0.0, None} and len(results) == len(items)
