"""The learning rate's course: linear warm-up, then cosine or constant. A pure function of the step."""

import math

from mimo_megatron.config.run import ScheduleConfig


def rate_factor(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """The factor on the peak rate at ``step``, from 0: up to 1 at the end of the warm-up, then down to the floor."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, total_steps - 1 - schedule.warmup_steps)
    floor = schedule.min_lr_fraction
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
