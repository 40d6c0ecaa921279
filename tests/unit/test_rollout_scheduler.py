"""The rollout scheduler: what it launches, when it ends a step, and which groups it selects."""

import json
from collections import Counter

import pytest

from mimo_megatron.errors import CheckpointError, ConfigError
from mimo_megatron.rl.scheduler.rates import LEAST_RATE, PassRates
from mimo_megatron.rl.scheduler.step import Launch, Outcome, SchedulerSettings, StepScheduler

VALID, FLAT, DROPPED = Outcome.VALID, Outcome.ZERO_VARIANCE, Outcome.DROPPED


def scheduler(quotas: dict[str, int], rates: PassRates | None = None, **settings: float) -> StepScheduler:
    """Of plain expected values unless ``margin`` is given."""
    values = SchedulerSettings(quotas, **({"max_running": 1000, "margin": 0.0} | settings))  # type: ignore[arg-type]
    return StepScheduler(values, rates or PassRates(initial=0.5))


def indexes(launches: list[Launch]) -> list[int]:
    return [launch.index for launch in launches]


def test_as_much_is_launched_as_the_pass_rate_asks_for() -> None:
    one = scheduler({"math": 4})
    assert one.to_launch() == [Launch(index, "math") for index in range(8)]
    assert one.to_launch() == []


def test_a_margin_launches_more() -> None:
    # 12 at rate 0.5: 6 expected, deviation 1.73; so one deviation less is 4.27, and 11 give 3.84
    assert len(scheduler({"math": 4}, margin=1.0).to_launch()) == 12


def test_a_group_that_did_not_give_what_was_expected_is_replaced() -> None:
    one = scheduler({"math": 4})
    one.to_launch()
    one.settle(0, VALID)
    one.settle(1, FLAT)
    assert one.to_launch() == []  # one of two, as expected: six are active for three that are missing
    one.settle(2, DROPPED)
    assert indexes(one.to_launch()) == [8]


def test_the_first_launched_are_selected_however_late_they_finish() -> None:
    one = scheduler({"math": 2})
    one.to_launch()
    for index in (3, 2):
        one.settle(index, VALID)
    assert not one.is_done  # two are valid, but two that were launched before them are not settled
    assert one.to_launch() == [] and one.to_abort() == []
    one.settle(1, VALID)
    assert not one.is_done
    one.settle(0, FLAT)
    assert one.is_done
    assert one.selected() == [1, 2]
    assert one.report().tasks["math"].extra_valid == 1


def test_groups_are_aborted_only_once_all_earlier_ones_are_settled() -> None:
    one = scheduler({"math": 2})
    one.to_launch()
    one.settle(1, VALID)
    one.settle(2, VALID)
    assert one.to_abort() == []
    one.settle(0, FLAT)
    assert one.to_abort() == [3]
    assert one.to_abort() == []


def test_a_result_that_crosses_its_abort_changes_nothing() -> None:
    one = scheduler({"math": 1})
    one.to_launch()
    one.settle(0, VALID)
    before = one.report()
    one.settle(1, VALID)
    assert one.report() == before and one.selected() == [0]


def test_what_was_launched_behind_the_batch_is_returned_settled_or_not() -> None:
    one = scheduler({"math": 2})
    one.to_launch()
    for index, outcome in ((0, VALID), (3, VALID), (1, VALID)):
        one.settle(index, outcome)
    assert one.selected() == [0, 1]
    assert one.to_return() == [2, 3]


def test_each_task_fills_its_own_quota() -> None:
    one = scheduler({"box": 1, "math": 3})
    tasks = {launch.index: launch.task for launch in one.to_launch()}
    for index in tasks:
        one.settle(index, VALID)
    assert one.is_done
    assert Counter(tasks[index] for index in one.selected()) == {"box": 1, "math": 3}


def test_a_full_task_does_not_wait_for_another() -> None:
    one = scheduler({"box": 1, "math": 1})
    tasks = {launch.index: launch.task for launch in one.to_launch()}
    boxes = [index for index, task in tasks.items() if task == "box"]
    one.settle(boxes[0], VALID)
    assert one.to_abort() == boxes[1:]
    assert not one.is_done


def test_no_more_than_max_running_are_with_the_engine() -> None:
    one = scheduler({"math": 100}, max_running=10)
    assert len(one.to_launch()) == 10
    assert one.to_launch() == []
    one.generated(4)
    assert indexes(one.to_launch()) == [10]
    one.settle(4, FLAT)  # its place was free already
    assert one.to_launch() == []
    one.settle(5, FLAT)
    assert indexes(one.to_launch()) == [11]


def test_tasks_share_places_by_their_quotas() -> None:
    one = scheduler({"box": 10, "math": 30}, max_running=40)
    assert Counter(launch.task for launch in one.to_launch()) == {"box": 10, "math": 30}


def test_a_task_that_never_passes_starves_no_other() -> None:
    one = scheduler({"hopeless": 8, "math": 8}, max_running=4)
    launched = []
    while one.report().tasks["math"].valid < 8:
        for launch in one.to_launch():
            launched.append(launch.task)
            num_math = launched.count("math")
            one.settle(launch.index, VALID if launch.task == "math" and num_math % 2 else FLAT)
    between = "".join("m" if task == "math" else "." for task in launched).split("m")
    assert max(len(hopeless) for hopeless in between) <= 2 * 4  # two fillings of the places
    middle = len(launched) // 2
    assert abs(launched[:middle].count("math") - launched[middle:].count("math")) <= 4  # all along, not at the end


def test_data_that_never_varies_end_the_step_within_the_refill_budget_with_an_alarm() -> None:
    rates = PassRates(initial=0.5)
    one = scheduler({"math": 8}, rates, max_running=4, refill_budget=3.0)
    while not one.is_done:
        for launch in one.to_launch():
            one.settle(launch.index, FLAT)
    report = one.report()
    assert one.selected() == [] and one.to_return() == []
    assert report.tasks["math"].launched == 24
    assert report.tasks["math"].is_out_of_budget
    assert "'math' gave 0 of 8 groups" in report.alarms[0]


def test_a_step_out_of_budget_gives_what_is_valid() -> None:
    one = scheduler({"math": 8}, refill_budget=2.0)
    while not one.is_done:
        for launch in one.to_launch():
            one.settle(launch.index, VALID if launch.index % 4 == 0 else FLAT)
    assert one.selected() == [0, 4, 8, 12]


def test_a_full_step_rings_no_alarm() -> None:
    one = scheduler({"math": 1})
    one.to_launch()
    one.settle(0, VALID)
    assert one.report().alarms == []


def test_a_quota_of_zero_launches_nothing() -> None:
    one = scheduler({"box": 0, "math": 1})
    assert {launch.task for launch in one.to_launch()} == {"math"}


def test_unknown_rewards_are_no_evidence_about_the_pass_rate() -> None:
    rates = PassRates(initial=0.5, prior_groups=10)
    one = scheduler({"math": 4}, rates)
    one.to_launch()
    for index in range(4):
        one.settle(index, DROPPED)
    assert one.report().tasks["math"].pass_rate == 0.5
    for index in range(4, 8):
        one.settle(index, VALID)
    assert one.is_done
    assert rates.estimate("math") == pytest.approx((0.5 * 10 + 4) / 14)


def test_early_finishers_behind_an_unsettled_group_are_no_evidence_yet() -> None:
    one = scheduler({"math": 4})
    one.to_launch()
    for index in range(1, 6):
        one.settle(index, FLAT)
    assert one.report().tasks["math"].pass_rate == 0.5
    one.settle(0, FLAT)
    assert one.report().tasks["math"].pass_rate < 0.5


def test_a_few_groups_move_the_pass_rate_little_and_many_move_it_far() -> None:
    rates = PassRates(initial=0.5, prior_groups=128)
    rates.learn("few", 0, 8)
    rates.learn("many", 0, 1280)
    assert rates.estimate("few") == pytest.approx(0.47, abs=0.01)
    assert rates.estimate("many") == pytest.approx(0.045, abs=0.001)
    rates.learn("many", 0, 1_000_000)
    assert rates.estimate("many") == LEAST_RATE


def test_pass_rates_survive_a_checkpoint() -> None:
    rates = PassRates()
    rates.learn("math", 3, 40)
    loaded = PassRates()
    loaded.load_state(json.loads(json.dumps(rates.state())))
    assert loaded.estimate("math", 1, 2) == rates.estimate("math", 1, 2)


@pytest.mark.parametrize("rate", [0.0, 1.5, float("nan"), "0.5", True])
def test_a_damaged_state_is_refused(rate: object) -> None:
    with pytest.raises(CheckpointError, match="math"):
        PassRates().load_state({"math": rate})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "values",
    [
        dict(quotas={}, max_running=1),
        dict(quotas={"math": -1, "box": 2}, max_running=1),
        dict(quotas={"math": 1}, max_running=0),
        dict(quotas={"math": 1}, max_running=1, refill_budget=0.5),
        dict(quotas={"math": 1}, max_running=1, margin=-1.0),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        SchedulerSettings(**values)


def test_settling_a_group_twice_is_a_mistake() -> None:
    one = scheduler({"math": 4})
    one.to_launch()
    one.settle(0, FLAT)
    with pytest.raises(AssertionError, match="settled already"):
        one.settle(0, FLAT)
