"""The rollout scheduler under any order of events: it ends, and its batch depends on the order of prompts alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_megatron.rl.scheduler.rates import PassRates
from mimo_megatron.rl.scheduler.step import Outcome, SchedulerSettings, StepScheduler

TASKS = ("box", "count", "math")
# The outcome of a task's n-th group, whichever launch index it gets; repeated from the start when it runs out.
OUTCOMES = st.lists(st.sampled_from(Outcome), min_size=1, max_size=12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[SchedulerSettings, dict[str, list[Outcome]]]:
    some = st.dictionaries(st.sampled_from(TASKS), st.integers(0, 6), min_size=1)
    quotas = draw(some.filter(lambda counts: sum(counts.values()) > 0))
    chosen = SchedulerSettings(
        quotas,
        max_running=draw(st.integers(1, 20)),
        refill_budget=draw(st.floats(1, 4)),
        margin=draw(st.floats(0, 3)),
    )
    return chosen, {task: draw(OUTCOMES) for task in quotas}


class Run:
    """A step whose events come in the order that ``pick`` chooses."""

    def __init__(self, chosen: SchedulerSettings, outcomes: dict[str, list[Outcome]], pick: st.DataObject) -> None:
        self.scheduler = StepScheduler(chosen, PassRates())
        self.groups: list[tuple[str, int]] = []  # by index: the task, and the place among its groups
        self.aborted: list[int] = []
        generating: set[int] = set()
        scoring: set[int] = set()
        while not self.scheduler.is_done:
            for launch in self.scheduler.to_launch():
                assert launch.index == len(self.groups)
                self.groups.append((launch.task, sum(task == launch.task for task, _ in self.groups)))
                generating.add(launch.index)
            assert len(generating) <= chosen.max_running
            index = pick.draw(st.sampled_from(sorted(generating | scoring)))
            if index in generating:
                generating.remove(index)
                scoring.add(index)
                self.scheduler.generated(index)
            else:
                scoring.remove(index)
                task, place = self.groups[index]
                self.scheduler.settle(index, outcomes[task][place % len(outcomes[task])])
            told = self.scheduler.to_abort()
            self.aborted += told
            generating -= set(told)
            scoring -= set(told)
        assert not generating and not scoring  # whatever still ran was named

    def batch(self) -> list[tuple[str, int]]:
        return sorted(self.groups[index] for index in self.scheduler.selected())


@settings(deadline=None)
@given(cases(), st.data())
def test_any_order_of_events_ends_with_the_first_valid_groups(
    case: tuple[SchedulerSettings, dict[str, list[Outcome]]], data: st.DataObject
) -> None:
    chosen, outcomes = case
    run = Run(chosen, outcomes, data)
    assert run.scheduler.to_launch() == []
    assert len(set(run.scheduler.selected())) == len(run.scheduler.selected())
    assert not set(run.scheduler.selected()) & {*run.aborted, *run.scheduler.to_return()}
    assert set(run.aborted) <= set(run.scheduler.to_return())

    for task, quota in chosen.quotas.items():
        budget = int(chosen.refill_budget * quota)
        valid = [n for n in range(budget) if outcomes[task][n % len(outcomes[task])] is Outcome.VALID]
        assert [place for name, place in run.batch() if name == task] == valid[:quota]
        report = run.scheduler.report().tasks[task]
        assert report.launched <= budget
        assert report.launched == report.valid + report.zero_variance + report.dropped + report.aborted
        assert report.is_out_of_budget == (len(valid) < quota)


@settings(deadline=None, max_examples=50)
@given(cases(), st.data(), st.data())
def test_two_orders_of_events_give_the_same_batch(
    case: tuple[SchedulerSettings, dict[str, list[Outcome]]], one: st.DataObject, other: st.DataObject
) -> None:
    assert Run(*case, one).batch() == Run(*case, other).batch()
