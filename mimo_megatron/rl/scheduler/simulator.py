"""A discrete-event simulation of rollouts on many workers, to compare policies on the same prompts.

A worker generates one group at a time, all its responses at once: sixteen responses of 32,768 tokens of MiMo-7B fill
77 GB of key-value cache (36 layers x 8 heads x 128 x 2 x 2 bytes a token), which with 15 GB of weights is an H20. Where
a worker is free, the group launched first takes it; there is no prefill, and weights are synchronised elsewhere.

Groups are scored by a pool of judges, in order of arrival. Times and idleness as the report has them: a worker is busy
while it generates a group that is completed. It is idle while it waits, while it is held by a reward that is scored
synchronously, and while it generates what will be aborted. The time of everything but the rollout (training,
synchronisation) is the same constant for all policies.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from mimo_megatron.rl.scheduler.step import Launch, Outcome
from mimo_megatron.rl.scheduler.workload import Trace


@dataclass(frozen=True)
class Group:
    prompt: int
    generation_seconds: float
    reward_seconds: float
    mean_tokens: float
    is_valid: bool
    expected_seconds: float
    """What its generation took when this prompt was last met: other responses, an earlier policy."""

    @property
    def outcome(self) -> Outcome:
        return Outcome.VALID if self.is_valid else Outcome.ZERO_VARIANCE


@dataclass(frozen=True)
class Cluster:
    num_workers: int = 256
    num_judges: int = 32
    """Groups that can be scored at once. Guessed, see ``Workload.reward_seconds``."""


class Prompts:
    """The queue of prompts of one run: in order, those given back first."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._returned: deque[int] = deque()
        self._next = 0
        self._num_attempts: dict[int, int] = {}

    def take(self) -> Group:
        if self._returned:
            prompt = self._returned.popleft()
        else:
            prompt, self._next = self._next, self._next + 1
        attempt = self._num_attempts.get(prompt, 0) + 1  # attempt 0 was in an earlier epoch
        self._num_attempts[prompt] = attempt
        rollouts = self._trace.attempt(attempt)
        before = self._trace.attempt(attempt - 1)
        return Group(
            prompt,
            float(rollouts.generation_seconds[prompt]),
            float(rollouts.reward_seconds[prompt]),
            float(rollouts.mean_tokens[prompt]),
            bool(rollouts.is_valid[prompt]),
            float(before.generation_seconds[prompt]),
        )

    def give_back(self, prompts: Iterable[int]) -> None:
        self._returned.extendleft(reversed(list(prompts)))


@dataclass(frozen=True)
class Step:
    """What one rollout step took and gave."""

    rollout_seconds: float
    busy_seconds: float
    """Over all workers, generating groups that were completed."""
    num_launched: int
    num_completed: int
    num_valid: int
    """Of those completed."""
    trained: list[Group]


class Rule(Protocol):
    """What the event loop asks of ``StepScheduler`` and of the controls."""

    @property
    def is_done(self) -> bool: ...
    def to_launch(self) -> list[Launch]: ...
    def generated(self, index: int) -> None: ...
    def settle(self, index: int, outcome: Outcome) -> None: ...
    def selected(self) -> list[int]: ...
    def to_return(self) -> list[int]: ...


def stream(
    rule: Rule,
    prompts: Prompts,
    cluster: Cluster,
    is_reward_async: bool,
    is_ended_early: bool,
    is_longest_first: bool = False,
) -> Step:
    """Runs one step by ``rule``; without ``is_ended_early`` whatever was launched is waited for.

    A synchronous reward holds its worker until the group is scored. With ``is_longest_first`` the engine serves its
    queue by ``expected_seconds``, not in order of launch; what the rule selects goes by order of launch all the same.
    """
    groups: list[Group] = []
    waiting: list[tuple[float, int]] = []  # priority, group: a heap
    events: list[tuple[float, int, bool]] = []  # time, group, whether it is its reward
    num_free, now = cluster.num_workers, 0.0
    judges = [0.0] * cluster.num_judges  # when each is free again
    settled: list[Group] = []
    busy_seconds = 0.0
    while True:
        for launch in rule.to_launch():
            assert launch.index == len(groups)
            groups.append(prompts.take())
            priority = -groups[-1].expected_seconds if is_longest_first else 0.0
            heapq.heappush(waiting, (priority, launch.index))
        while waiting and num_free:
            _, index = heapq.heappop(waiting)
            num_free -= 1
            heapq.heappush(events, (now + groups[index].generation_seconds, index, False))
        if not events or (is_ended_early and rule.is_done):
            break
        now, index, is_scored = heapq.heappop(events)
        group = groups[index]
        if is_scored:
            num_free += not is_reward_async
            settled.append(group)
            rule.settle(index, group.outcome)
        else:
            busy_seconds += group.generation_seconds
            is_scored_at = max(now, judges[0]) + group.reward_seconds
            heapq.heapreplace(judges, is_scored_at)
            heapq.heappush(events, (is_scored_at, index, True))
            if is_reward_async:
                num_free += 1
                rule.generated(index)
    prompts.give_back(groups[index].prompt for index in rule.to_return())
    return Step(
        rollout_seconds=now,
        busy_seconds=busy_seconds,
        num_launched=len(groups),
        num_completed=len(settled),
        num_valid=sum(group.is_valid for group in settled),
        trained=[groups[index] for index in rule.selected()],
    )


def waves(prompts: Prompts, batch: int, cluster: Cluster, is_sampled_dynamically: bool) -> Step:
    """Generates a whole batch, waits for all, scores all, and again until ``batch`` groups are valid.

    Without dynamic sampling there is one wave, and all of it is trained on.
    """
    groups: list[Group] = []
    seconds = 0.0
    while True:
        wave = [prompts.take() for _ in range(batch)]
        groups += wave
        seconds += _makespan((group.generation_seconds for group in wave), cluster.num_workers)
        seconds += _makespan((group.reward_seconds for group in wave), cluster.num_judges)
        valid = [group for group in groups if group.is_valid]
        if not is_sampled_dynamically or len(valid) >= batch:
            break
    return Step(
        rollout_seconds=seconds,
        busy_seconds=sum(group.generation_seconds for group in groups),
        num_launched=len(groups),
        num_completed=len(groups),
        num_valid=len(valid),
        trained=valid[:batch] if is_sampled_dynamically else groups,
    )


def _makespan(durations: Iterable[float], num_places: int) -> float:
    """Until all are done, each taken in order by the first free place."""
    ends = [0.0] * num_places
    for duration in durations:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)
