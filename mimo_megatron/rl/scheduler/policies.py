"""The policies that the simulator compares: the rows of the MiMo-7B report's table, ours, and first-finished.

Each ``run`` gives the figures of a trace of several steps. Speed-ups are against naive dynamic sampling on the same
prompts. What the report's words mean was found by checking that its numbers then agree with one another:

- *pass rate*, 41 %, is the share of valid groups: naive dynamic sampling generates (1 + waste) / 0.41 = 2.98 times what
  static sampling does, and by the table's busy times 2.96;
- *normalised idle* is idle ratio x rollout time over the same of naive dynamic sampling: all rows agree to 0.01;
- overall and rollout speed-ups agree in every row if all else of a step takes 9.05 % to 9.8 % of naive's rollout.
"""

from dataclasses import dataclass

import numpy as np

from mimo_megatron.rl.scheduler.rates import PassRates
from mimo_megatron.rl.scheduler.simulator import Cluster, Prompts, Rule, Step, stream, waves
from mimo_megatron.rl.scheduler.step import Launch, Outcome, SchedulerSettings, StepScheduler
from mimo_megatron.rl.scheduler.workload import Trace, Workload

OTHER_FRACTION = 0.095
"""Training and synchronisation of a step, over the rollout time of naive dynamic sampling; from the report's table."""
TASK = "math"


@dataclass(frozen=True)
class Policy:
    name: str
    is_streamed: bool = True
    """Otherwise in waves of a whole batch."""
    is_sampled_dynamically: bool = True
    is_reward_async: bool = True
    is_ended_early: bool = True
    is_first_finished: bool = False
    margin: float = SchedulerSettings.margin
    is_longest_first: bool = False
    """Groups wait with the engine, which begins with those whose prompts took longest when they were last met."""


REPORT_MARGIN = 8.0
"""``SchedulerSettings.margin`` that gives about the report's sample waste."""
QUEUE_FACTOR = 4
"""Groups that ours has with the engine, over its workers: about four fifths of a step's launches."""
NAIVE = Policy("naive dynamic sampling", is_streamed=False)
LIKE_REPORT = Policy("+ early termination", margin=REPORT_MARGIN)
IN_ORDER = Policy("ours: the same, margin 1")
OURS = Policy("ours: + longest expected first", is_longest_first=True)
FIRST_FINISHED = Policy("control: first finished", is_first_finished=True)
POLICIES = (
    Policy("no dynamic sampling", is_streamed=False, is_sampled_dynamically=False),
    NAIVE,
    Policy("+ continuous rollout", is_reward_async=False, is_ended_early=False, margin=REPORT_MARGIN),
    Policy("+ asynchronous reward", is_ended_early=False, margin=REPORT_MARGIN),
    LIKE_REPORT,
    IN_ORDER,
    OURS,
    FIRST_FINISHED,
)


@dataclass(frozen=True)
class Figures:
    """Of a whole trace."""

    rollout_seconds: float
    idle_seconds: float
    """Over all workers."""
    idle_ratio: float
    waste: float
    """Valid groups that are not trained on, over those that are."""
    valid_share: float
    """Of completed groups."""
    mean_tokens: float
    """Of the responses that are trained on."""

    def rollout_speedup(self, naive: "Figures") -> float:
        return naive.rollout_seconds / self.rollout_seconds

    def overall_speedup(self, naive: "Figures") -> float:
        return (1 + OTHER_FRACTION) / (self.rollout_seconds / naive.rollout_seconds + OTHER_FRACTION)


class FirstFinished:
    """Keeps the first ``batch`` valid groups to finish, as slime does without partial rollouts.

    Launches a whole batch more whenever those valid and those active are fewer than a batch; in the end aborts the
    rest and forgets their prompts.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._num_launched = 0
        self._active: set[int] = set()
        self._valid: list[int] = []

    @property
    def is_done(self) -> bool:
        return len(self._valid) >= self._batch

    def to_launch(self) -> list[Launch]:
        if len(self._active) + len(self._valid) >= self._batch:
            return []
        launches = [Launch(self._num_launched + one, TASK) for one in range(self._batch)]
        self._num_launched += self._batch
        self._active.update(launch.index for launch in launches)
        return launches

    def generated(self, index: int) -> None:
        """The engine queues by itself."""

    def settle(self, index: int, outcome: Outcome) -> None:
        self._active.remove(index)
        if outcome is Outcome.VALID:
            self._valid.append(index)

    def selected(self) -> list[int]:
        return self._valid[: self._batch]

    def to_return(self) -> list[int]:
        return []


def run(
    policy: Policy,
    seed: int,
    workload: Workload,
    cluster: Cluster,
    batch: int = 512,
    num_steps: int = 5,
    num_steps_before: int = 1,
) -> Figures:
    """The figures of ``num_steps`` steps. Pass rates and prompts given back carry over from step to step, also from
    ``num_steps_before``, which are not counted: the trace begins within training."""
    num_all_steps = num_steps_before + num_steps
    prompts = Prompts(Trace(workload, 6 * batch * num_all_steps, seed))
    rates = PassRates()
    most = QUEUE_FACTOR * cluster.num_workers if policy.is_longest_first else cluster.num_workers
    settings = SchedulerSettings({TASK: batch}, max_running=most, margin=policy.margin)

    def one_step() -> Step:
        if not policy.is_streamed:
            return waves(prompts, batch, cluster, policy.is_sampled_dynamically)
        rule: Rule = FirstFinished(batch) if policy.is_first_finished else StepScheduler(settings, rates)
        return stream(rule, prompts, cluster, policy.is_reward_async, policy.is_ended_early, policy.is_longest_first)

    steps = [one_step() for _ in range(num_all_steps)][num_steps_before:]
    seconds = sum(step.rollout_seconds for step in steps)
    idle = seconds * cluster.num_workers - sum(step.busy_seconds for step in steps)
    trained = [group for step in steps for group in step.trained]
    num_valid = sum(step.num_valid for step in steps)
    num_trained_valid = sum(group.is_valid for group in trained)
    return Figures(
        rollout_seconds=seconds,
        idle_seconds=idle,
        idle_ratio=idle / (seconds * cluster.num_workers),
        waste=(num_valid - num_trained_valid) / len(trained),
        valid_share=num_valid / sum(step.num_completed for step in steps),
        mean_tokens=float(np.mean([group.mean_tokens for group in trained])),
    )


def population_mean_tokens(workload: Workload, num_prompts: int = 200_000) -> float:
    """Over the responses of all valid groups, of prompts of their own: what batches without bias have on average."""
    rollouts = Trace(workload, num_prompts, seed=1_000_000).attempt(0)
    return float(np.mean(rollouts.mean_tokens[rollouts.is_valid]))
