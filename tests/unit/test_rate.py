"""The learning rate's course."""

import pytest

from mimo_megatron.config.run import ScheduleConfig
from mimo_megatron.train.rate import rate_factor


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor():
    schedule = ScheduleConfig(warmup_steps=4, min_lr_fraction=0.1)
    course = [rate_factor(step, 20, schedule) for step in range(20)]
    assert course[:4] == [0.25, 0.5, 0.75, 1.0]
    assert course[4] == 1.0
    assert course[4:] == sorted(course[4:], reverse=True)
    assert course[-1] == pytest.approx(0.1)


def test_halfway_down_the_cosine_is_the_middle_of_peak_and_floor():
    assert rate_factor(10, 21, ScheduleConfig(min_lr_fraction=0.2)) == pytest.approx(0.6)


def test_a_constant_rate_stays_at_its_peak():
    schedule = ScheduleConfig(warmup_steps=2, decay="constant")
    assert [rate_factor(step, 5, schedule) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_run_of_one_step_has_a_rate():
    assert rate_factor(0, 1, ScheduleConfig()) == 1.0
