"""Ranks killed with SIGKILL and started again, a few times; ``benchmarks/soak_kill.py`` does it fifty times."""

import pytest

from benchmarks.soak_kill import soak


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "kills"), [("torchrun", 2), ("fork", 3)])
def test_a_run_whose_ranks_are_killed_loses_nothing(launcher, kills, tmp_path):
    result = soak(tmp_path, kills, launcher, seed=1, longest_life_seconds=2.0, quiet=True)
    assert result.kills == kills and result.problems == ()
