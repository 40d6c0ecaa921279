"""What share of a task's groups is valid, kept over steps: the scheduler launches by it.

One rule serves within a step and between steps: the estimate of before counts as much as ``prior_groups`` groups. So a
step of many groups moves it fast and a step of eight hardly, and the first to finish, who are short and often easy,
do not make a step launch too much.
"""

import math
from collections.abc import Mapping

from mimo_megatron.errors import CheckpointError, ConfigError

LEAST_RATE = 0.01
"""No estimate falls below it: one valid group is worth at most a hundred launches, and a task can recover."""


class PassRates:
    """The estimate of each task, from ``initial`` on. ``state`` is plain JSON, for checkpoints."""

    def __init__(self, initial: float = 0.5, prior_groups: float = 128) -> None:
        if not LEAST_RATE <= initial <= 1:
            raise ConfigError(f"the first pass rate must lie in [{LEAST_RATE}, 1], not {initial}")
        if not 0 < prior_groups < math.inf:
            raise ConfigError(f"prior_groups must be positive, not {prior_groups}; 128 is a good start")
        self._initial = initial
        self._prior_groups = prior_groups
        self._rates: dict[str, float] = {}

    def estimate(self, task: str, num_valid: int = 0, num_settled: int = 0) -> float:
        """The pass rate of ``task``, of whose groups ``num_valid`` of ``num_settled`` were valid since ``learn``."""
        before = self._rates.get(task, self._initial)
        rate = (before * self._prior_groups + num_valid) / (self._prior_groups + num_settled)
        return max(rate, LEAST_RATE)

    def learn(self, task: str, num_valid: int, num_settled: int) -> None:
        """Takes a step's evidence into the estimate."""
        assert 0 <= num_valid <= num_settled, (num_valid, num_settled)
        self._rates[task] = self.estimate(task, num_valid, num_settled)

    def state(self) -> dict[str, float]:
        return dict(self._rates)

    def load_state(self, state: Mapping[str, float]) -> None:
        bad = {
            task: rate
            for task, rate in state.items()
            if type(rate) not in (int, float) or not LEAST_RATE <= rate <= 1  # not isinstance: True is no rate
        }
        if bad:
            raise CheckpointError(
                f"pass rates must be numbers in [{LEAST_RATE}, 1], but the state has {bad}; start anew"
            )
        self._rates = {task: float(rate) for task, rate in state.items()}
