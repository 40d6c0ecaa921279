"""One step's rollouts, after the seamless rollout engine of the MiMo-7B report (arXiv 2505.07608, section 3.4).

The unit is a group: one prompt with its G responses. A group is launched, generated, scored and settled as valid, of
zero variance, or dropped. The caller runs the engine and the rewards; the scheduler has no clock, no chance and no I/O:

    while not scheduler.is_done:
        for launch in scheduler.to_launch(): ...        # take a prompt of launch.task, generate its group
        ...                                             # whatever happens first:
        scheduler.generated(index)                      #   its responses are complete; the engine has a place again
        scheduler.settle(index, outcome)                #   its rewards are there
        for index in scheduler.to_abort(): ...          # its task is full: stop generating or scoring it
    batch = scheduler.selected()

The rules:

- *Continuous rollout.* More is launched only where the valid groups to be expected of a task's active groups, at its
  pass rate and less ``margin`` standard deviations, do not meet what the task still needs. No waves, no barrier.
- *First launched, first selected.* A task's batch is its first ``quota`` valid groups in the order of launch, and the
  task is full once every group launched before the last of them is settled. So the batch depends on the order of the
  prompts alone, never on what finished early: taking those who finish first would train on short answers. Only when a
  task is full its other groups are aborted.
- *Each task for itself.* Order, quota and pass rate are per task. The lengths of tasks differ a hundredfold: one order
  over all would let a long answer of one task hold back another that is full, and which of two tasks launches first
  depends on timing, so only the order within a task is the order of the data.
- *Fair shares.* Tasks share the ``max_running`` places. The task that has the largest share of its foreseen launches
  still ahead goes first, so all advance in proportion and none starves.
- *It ends.* A task launches at most ``refill_budget`` times its quota, then gives what it has, and the report says so.

The order of launch is the order in which prompts are taken, not that in which the engine begins them. With a
``max_running`` of several times its places, an engine can serve its queue by the length that a prompt had when it was
last met, the longest first: few stragglers are left at the step's end then, and the batch is the same.

Evidence about the pass rate is taken from groups before a task's first unsettled one: early finishers behind it are a
choice of short ones. Dropped groups say nothing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mimo_megatron.errors import ConfigError
from mimo_megatron.rl.scheduler.rates import PassRates


@dataclass(frozen=True)
class SchedulerSettings:
    quotas: Mapping[str, int]
    """Groups that this step's batch wants of each task; their sum is the batch."""
    max_running: int
    """Groups that may be with the engine at once, over all tasks. A group being scored does not count."""
    refill_budget: float = 5.0
    """A task launches at most this many times its quota in a step."""
    margin: float = 1.0
    """Standard deviations of the binomial number of valid groups that are not counted on.

    Measured (docs/rollout-scheduler.md): with 0 a step waits for stragglers that it launches at its end; with 1 it is
    within 3 % of the fastest at 16, 64 and 512 groups a batch; more wastes more.
    """

    def __post_init__(self) -> None:
        if min(self.quotas.values(), default=0) < 0 or not sum(self.quotas.values()):
            raise ConfigError(f"quotas must be counts with a positive sum, not {dict(self.quotas)}")
        if self.max_running < 1:
            raise ConfigError(f"max_running must be at least 1, not {self.max_running}")
        if not 1 <= self.refill_budget < math.inf:
            raise ConfigError(f"refill_budget must be finite and at least 1, not {self.refill_budget}")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"margin must be finite and not negative, not {self.margin}")


class Outcome(StrEnum):
    VALID = "valid"
    ZERO_VARIANCE = "zero_variance"
    DROPPED = "dropped"
    """Its reward is unknown, or its generation failed: no evidence about the pass rate."""


@dataclass(frozen=True)
class Launch:
    index: int
    """Rises by one with every launch of the step."""
    task: str


@dataclass(frozen=True)
class TaskReport:
    """What became of a task's groups: launched = valid + zero_variance + dropped + aborted, once the step is done."""

    quota: int
    launched: int
    valid: int
    extra_valid: int
    """Valid, but not selected: wasted."""
    zero_variance: int
    dropped: int
    aborted: int
    is_out_of_budget: bool
    """The quota was not reached within the refill budget."""
    pass_rate: float


@dataclass(frozen=True)
class StepReport:
    tasks: Mapping[str, TaskReport]

    @property
    def alarms(self) -> list[str]:
        """A sentence for each task that could not fill its share of the batch."""
        return [
            f"task {task!r} gave {one.valid} of {one.quota} groups: {one.launched} launches, its refill budget, gave "
            f"{one.zero_variance} of zero variance and {one.dropped} dropped; look at its data and its rewards"
            for task, one in self.tasks.items()
            if one.is_out_of_budget
        ]


class StepScheduler:
    """Decides what to launch, abort and select in one step. ``rates`` learns a task's pass rate when the task ends."""

    def __init__(self, settings: SchedulerSettings, rates: PassRates) -> None:
        self._max_running = settings.max_running
        self._tasks = {
            task: _Task(task, quota, math.floor(settings.refill_budget * quota), settings.margin, rates)
            for task, quota in sorted(settings.quotas.items())
        }
        self._task_of: list[_Task] = []  # by index
        self._generating: set[int] = set()
        self._to_abort: list[int] = []

    def to_launch(self) -> list[Launch]:
        """What to launch now, each said once."""
        launches = []
        while len(self._generating) < self._max_running:
            task = max(self._tasks.values(), key=lambda one: one.share_ahead)  # ties: the first by name
            if not task.share_ahead:
                break
            index = len(self._task_of)
            self._task_of.append(task)
            task.launch(index)
            self._generating.add(index)
            launches.append(Launch(index, task.name))
        return launches

    def generated(self, index: int) -> None:
        """The group's responses are complete and it is being scored: its place is free. ``settle`` implies it."""
        assert 0 <= index < len(self._task_of), f"{index} was never launched"
        self._generating.discard(index)

    def settle(self, index: int, outcome: Outcome) -> None:
        """What became of a group. Of an aborted one it means nothing: the result crossed the abort on its way."""
        self.generated(index)
        task = self._task_of[index]
        if task.is_done:
            return
        task.settle(index, outcome)
        if task.is_done:
            aborted = sorted(task.active)
            self._generating.difference_update(aborted)
            self._to_abort.extend(aborted)

    def to_abort(self) -> list[int]:
        """Groups being generated or scored whose task is full, each said once. Their places are free already."""
        told, self._to_abort = self._to_abort, []
        return told

    @property
    def is_done(self) -> bool:
        """Every task is full, or out of budget with nothing active."""
        return all(task.is_done for task in self._tasks.values())

    def selected(self) -> list[int]:
        """The batch: of each task the first ``quota`` valid groups that it launched; in the order of launch."""
        return sorted(index for task in self._tasks.values() for index in task.selected())

    def to_return(self) -> list[int]:
        """Groups launched behind the last selected one of their full task, settled or not.

        Their prompts belong at the head of the task's queue, in this order: the next step begins where this batch
        ended. Only those that were aborted would be a choice of long ones.
        """
        return sorted(index for task in self._tasks.values() for index in task.behind())

    def report(self) -> StepReport:
        return StepReport({name: task.report() for name, task in self._tasks.items()})


class _Task:
    """One task's launches, in order, and how many of them, from the first on, are settled: the *head*."""

    def __init__(self, name: str, quota: int, budget: int, margin: float, rates: PassRates) -> None:
        self.name = name
        self.active: set[int] = set()
        self._quota = quota
        self._budget = budget
        self._margin = margin
        self._rates = rates
        self._indexes: list[int] = []
        self._outcomes: dict[int, Outcome] = {}
        self._num_valid = 0
        self._head = 0
        self._head_counts = dict.fromkeys(Outcome, 0)

    def launch(self, index: int) -> None:
        self._indexes.append(index)
        self.active.add(index)

    def settle(self, index: int, outcome: Outcome) -> None:
        assert index in self.active, f"group {index} of task {self.name!r} is settled already"
        self.active.remove(index)
        self._outcomes[index] = outcome
        self._num_valid += outcome is Outcome.VALID
        while not self._is_full and self._head < len(self._indexes):
            settled = self._outcomes.get(self._indexes[self._head])
            if settled is None:
                break
            self._head += 1
            self._head_counts[settled] += 1
        if self.is_done:
            self._rates.learn(self.name, *self._evidence())

    @property
    def _is_full(self) -> bool:
        return self._head_counts[Outcome.VALID] == self._quota

    @property
    def is_done(self) -> bool:
        return self._is_full or (len(self._indexes) >= self._budget and not self.active)

    @property
    def pass_rate(self) -> float:
        return self._rates.estimate(self.name) if self.is_done else self._rates.estimate(self.name, *self._evidence())

    @property
    def share_ahead(self) -> float:
        """Of all launches of this step, as far as can be foreseen, the share that is still to come."""
        missing = self._quota - self._num_valid
        if self.is_done or missing <= 0:
            return 0.0
        launched = len(self._indexes)
        needed = _groups_for(missing, self.pass_rate, self._margin)
        ahead = min(needed - len(self.active), self._budget - launched)
        return ahead / (ahead + launched) if ahead > 0 else 0.0

    def selected(self) -> list[int]:
        head = self._indexes[: self._head]
        return [index for index in head if self._outcomes[index] is Outcome.VALID]

    def behind(self) -> Iterator[int]:
        return iter(self._indexes[self._head :] if self._is_full else ())

    def report(self) -> TaskReport:
        counts = {kind: list(self._outcomes.values()).count(kind) for kind in Outcome}
        return TaskReport(
            quota=self._quota,
            launched=len(self._indexes),
            valid=counts[Outcome.VALID],
            extra_valid=counts[Outcome.VALID] - len(self.selected()) if self.is_done else 0,
            zero_variance=counts[Outcome.ZERO_VARIANCE],
            dropped=counts[Outcome.DROPPED],
            aborted=len(self.active) if self.is_done else 0,
            is_out_of_budget=self.is_done and not self._is_full,
            pass_rate=self.pass_rate,
        )

    def _evidence(self) -> tuple[int, int]:
        valid = self._head_counts[Outcome.VALID]
        return valid, valid + self._head_counts[Outcome.ZERO_VARIANCE]


def _groups_for(num_valid: int, rate: float, margin: float) -> int:
    """The least n for which n rate - margin sqrt(n rate (1 - rate)) >= num_valid: a quadratic in the root of n."""
    deviation = margin * math.sqrt(rate * (1 - rate))
    root = (deviation + math.sqrt(deviation**2 + 4 * rate * num_valid)) / (2 * rate)
    return math.ceil(root**2 - 1e-9)  # 10 / 0.5 is 20, whatever squaring a root adds
