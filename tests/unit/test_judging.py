"""Responses of several groups that are judged together, by a real service: what comes when groups are let go."""

import time
from collections.abc import Iterator

import pytest

from mimo_megatron.reward.wire import ScoreItem
from mimo_megatron.rl.judging import Judging
from tests.reward_harness import SCRIPTED, Service, running

SECONDS = 0.6


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(pool={**SCRIPTED, "num_workers": 2}, limits={"seconds": 5.0}) as one:
        yield one


def slow(group: str) -> ScoreItem:
    return ScoreItem(id=f"{group}/0", task="math", response="right", gold={"do": "sleep", "seconds": SECONDS})


def ids_until(judging: Judging, seconds: float) -> set[str]:
    until, found = time.monotonic() + seconds, set()
    while time.monotonic() < until:
        found |= {result.id for result in judging.results(0.05)}
    return found


def test_a_request_is_cancelled_once_all_its_groups_are_and_not_before(service: Service) -> None:
    with Judging(service.url, None, 30.0) as judging:
        judging.ask([slow("1-0"), slow("1-1")], {"1-0", "1-1"})
        judging.ask([slow("1-2")], {"1-2"})
        time.sleep(SECONDS / 4)  # under way
        judging.cancel(["1-0", "1-2"])
        assert ids_until(judging, 4 * SECONDS) == {"1-0/0", "1-1/0"}  # of the forgotten group, for nobody
        judging.ask([slow("2-0"), slow("2-1")], {"2-0", "2-1"})
        judging.cancel(["2-1"])
        judging.cancel(["2-0"])
        assert ids_until(judging, 4 * SECONDS) == set()


def test_leaving_ends_what_is_under_way_at_once(service: Service) -> None:
    began = time.monotonic()
    with Judging(service.url, None, 30.0) as judging:
        judging.ask([slow(f"3-{place}") for place in range(60)], {"3"})
    assert time.monotonic() - began < 60 * SECONDS / 2 / 3
