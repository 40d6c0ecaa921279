"""The simulator of rollouts: what it counts on traces small enough to follow, and the table's shape at reduced size."""

import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from mimo_megatron.rl.scheduler.policies import (
    FIRST_FINISHED,
    IN_ORDER,
    NAIVE,
    OURS,
    TASK,
    Figures,
    Policy,
    population_mean_tokens,
    run,
)
from mimo_megatron.rl.scheduler.rates import PassRates
from mimo_megatron.rl.scheduler.simulator import Cluster, Prompts, stream, waves
from mimo_megatron.rl.scheduler.step import SchedulerSettings, StepScheduler
from mimo_megatron.rl.scheduler.workload import Rollouts, Trace, Workload

WORKLOAD = Workload()
SEEDS = range(4)


class WrittenTrace(Trace):
    """Groups as they are written down, the same at every attempt."""

    def __init__(self, generation: Sequence[float], reward: Sequence[float], is_valid: Sequence[bool]) -> None:
        seconds = np.array(generation, dtype=float)
        self._written = Rollouts(seconds, np.array(reward, dtype=float), 50 * seconds, np.array(is_valid))

    def attempt(self, number: int) -> Rollouts:
        return self._written


def rule(quota: int, num_workers: int) -> StepScheduler:
    chosen = SchedulerSettings({TASK: quota}, max_running=num_workers, margin=0.0)
    return StepScheduler(chosen, PassRates(initial=0.5))


def test_waves_wait_for_the_longest_and_then_for_the_rewards() -> None:
    trace = WrittenTrace([1, 5, 2, 2], [1, 1, 1, 1], [True, False, False, True])
    step = waves(Prompts(trace), 2, Cluster(num_workers=2, num_judges=1), is_sampled_dynamically=True)
    assert step.rollout_seconds == (5 + 2) + (2 + 2)
    assert step.busy_seconds == 10
    assert (step.num_launched, step.num_valid, len(step.trained)) == (4, 2, 2)


def test_an_asynchronous_reward_frees_the_worker_and_a_synchronous_one_holds_it() -> None:
    trace = WrittenTrace([1, 1, 1, 1, 1, 1], [3] * 6, [True] * 6)
    cluster = Cluster(num_workers=1, num_judges=9)
    assert stream(rule(2, 1), Prompts(trace), cluster, is_reward_async=True, is_ended_early=True).rollout_seconds == 5
    assert stream(rule(2, 1), Prompts(trace), cluster, is_reward_async=False, is_ended_early=True).rollout_seconds == 8


def test_what_is_aborted_counts_as_idle_and_its_prompt_comes_first_in_the_next_step() -> None:
    trace = WrittenTrace([1, 9, 9, 9, 9, 9], [0] * 6, [True] * 6)
    prompts = Prompts(trace)
    step = stream(rule(1, 2), prompts, Cluster(2, 2), is_reward_async=True, is_ended_early=True)
    assert (step.rollout_seconds, step.busy_seconds, step.num_launched, step.num_completed) == (1, 1, 2, 1)
    assert [prompts.take().prompt for _ in range(2)] == [1, 2]


def test_the_longest_expected_begin_first_and_the_first_launched_are_selected() -> None:
    trace = WrittenTrace([1, 2, 8, 4, 1, 1], [0] * 6, [True] * 6)
    step = stream(rule(2, 4), Prompts(trace), Cluster(1, 1), True, True, is_longest_first=True)
    assert step.rollout_seconds == 8 + 4 + 2 + 1
    assert [group.prompt for group in step.trained] == [0, 1]


def test_the_workload_has_the_pass_rate_of_the_report() -> None:
    rollouts = Trace(WORKLOAD, 50_000, seed=3).attempt(0)
    assert rollouts.is_valid.mean() == pytest.approx(0.41, abs=0.012)
    assert rollouts.mean_tokens.max() <= WORKLOAD.max_tokens


def test_every_policy_meets_the_same_prompts_with_other_responses_each_time() -> None:
    one, other = Trace(WORKLOAD, 500, seed=1), Trace(WORKLOAD, 500, seed=1)
    assert (one.attempt(1).mean_tokens == other.attempt(1).mean_tokens).all()
    first, second = one.attempt(0).mean_tokens, one.attempt(1).mean_tokens
    assert (first != second).all()
    assert np.corrcoef(first, second)[0, 1] > 0.5  # a prompt's length is known from the last time


def test_a_simulated_step_is_deterministic() -> None:
    cluster = Cluster(16, 4)
    assert run(OURS, 5, WORKLOAD, cluster, 32, 2) == run(OURS, 5, WORKLOAD, cluster, 32, 2)


@pytest.fixture(scope="module")
def runs() -> dict[Policy, list[Figures]]:
    """Five steps at the report's size, four seeds: about 2 seconds."""
    policies = (NAIVE, IN_ORDER, OURS, FIRST_FINISHED)
    return {policy: [run(policy, seed, WORKLOAD, Cluster()) for seed in SEEDS] for policy in policies}


def bias(figures: Sequence[Figures]) -> float:
    return statistics.mean(one.mean_tokens for one in figures) / population_mean_tokens(WORKLOAD) - 1


def test_first_finished_trains_on_short_responses_and_ours_does_not(runs: dict[Policy, list[Figures]]) -> None:
    assert bias(runs[FIRST_FINISHED]) < -0.05
    assert abs(bias(runs[OURS])) < 0.02
    assert abs(bias(runs[IN_ORDER])) < 0.02


def test_ours_beats_the_table_of_the_report(runs: dict[Policy, list[Figures]]) -> None:
    ours = runs[OURS]
    speedups = [one.overall_speedup(naive) for one, naive in zip(ours, runs[NAIVE], strict=True)]
    assert statistics.mean(speedups) >= 2.3
    assert statistics.mean(one.idle_ratio for one in ours) <= 0.277
    assert statistics.mean(one.waste for one in ours) <= 0.129


def test_naive_dynamic_sampling_is_that_of_the_report(runs: dict[Policy, list[Figures]]) -> None:
    naive = runs[NAIVE]
    assert statistics.mean(one.idle_ratio for one in naive) == pytest.approx(0.693, abs=0.03)
    assert statistics.mean(one.waste for one in naive) == pytest.approx(0.221, abs=0.04)
