"""Ranks killed with SIGKILL and started again, a few times; ``benchmarks/soak_kill.py`` does it fifty times."""

import pytest

from benchmarks.soak_kill import left_alone, soak
from mimo_megatron.config.run import RunConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return left_alone(tmp_path_factory.mktemp("whole"), steps=40)


@pytest.mark.parametrize(("launcher", "kills"), [("torchrun", 2), ("fork", 3)])
def test_a_run_whose_ranks_are_killed_loses_nothing(launcher, kills, whole, tmp_path):
    result = soak(tmp_path, whole, kills, launcher, seed=1, longest_life_seconds=1.0, quiet=True)
    assert result.kills == kills and result.problems == ()
