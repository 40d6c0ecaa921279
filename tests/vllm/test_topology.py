"""Trainer, engines and rewards as processes that find each other by files, as on a cluster, and lose each other."""

import os
import signal

import pytest

from benchmarks.soak_rl import soak
from tests.vllm.topology import Topology, write_run

pytestmark = pytest.mark.vllm
STEPS = 4


def test_two_ranks_two_engines_and_a_reward_service_run_and_an_engine_that_is_killed_is_replaced(tmp_path):
    with Topology(write_run(tmp_path, os.environ["VLLM_PYTHON"], STEPS)) as topology:
        topology.wait(lambda: bool(topology.metrics), 300)
        (engine,) = topology.engines[0].processes()[1:]
        engine.send_signal(signal.SIGKILL)
        topology.wait(lambda: topology.is_done, 300)
        assert topology.problems(STEPS) == []
        assert all(part.num_starts == 1 for part in topology.parts)  # the keeper lives, and so does the trainer
        assert "the engine ended with code -9 and is started again" in topology.engines[0].log.read_text()
        services = tmp_path / "services"
        topology.wait(lambda: len(list(services.glob("engine-*.json"))) == 2, 300)  # the run may end before it is back
    assert list((tmp_path / "services").iterdir()) == []


def test_a_run_whose_parts_are_killed_ten_times_ends_whole(tmp_path):
    result = soak(tmp_path, os.environ["VLLM_PYTHON"], kills=10, seed=1)
    print(result)
    assert result.kills == 10 and result.problems == ()
