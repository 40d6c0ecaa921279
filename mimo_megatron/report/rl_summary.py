"""What a run of reinforcement learning came to: held-out rewards before and after, what it warned of, what was lost."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.report.charts import compact, percent, scientific
from mimo_megatron.report.run_data import Evaluation, Row, RunData, mean_of_ends, number

MEAN = "mean of tasks"
_REPEATING = ("alarm", "nothing_learnt")  # events that a step may bring, so that the log does not list them all


@dataclass(frozen=True)
class HeldOut:
    """Mean rewards on held-out questions: ``of_task[task]`` has one number for each of ``steps``, NaN where the task
    was not asked."""

    steps: NDArray[np.float64]
    of_task: Mapping[str, NDArray[np.float64]]

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Over tasks; NaN at steps where one of them was not asked."""
        return np.mean(list(self.of_task.values()), axis=0)


@dataclass(frozen=True)
class Progress:
    """A task's held-out reward at the first, the best and the last evaluation, as (step, reward)."""

    task: str
    start: tuple[int, float]
    best: tuple[int, float]
    last: tuple[int, float]

    @property
    def change(self) -> float:
        return self.last[1] - self.start[1]


@dataclass(frozen=True)
class Repeated:
    """Events whose texts differ in nothing but numbers; ``text`` is the last one's."""

    event: str
    count: int
    first: str
    last: str
    text: str


def held_out(evaluations: Sequence[Row], order: Sequence[str] = ()) -> HeldOut | None:
    """None where nothing was evaluated. Tasks named in ``order`` come first."""
    rewards = [{str(task): number(value) for task, value in row["rewards"].items()} for row in evaluations]
    seen = {task for row in rewards for task, value in row.items() if np.isfinite(value)}
    if not seen:
        return None
    tasks = [*(task for task in order if task in seen), *sorted(seen - set(order))]
    steps = np.array([row["step"] for row in evaluations], dtype=np.float64)
    return HeldOut(steps, {task: np.array([row.get(task, np.nan) for row in rewards]) for task in tasks})


def progress(found: HeldOut) -> list[Progress]:
    """Of each task, and of their mean where there are several and all were asked together."""
    curves = dict(found.of_task)
    if len(curves) > 1 and np.isfinite(found.mean).any():
        curves[MEAN] = found.mean
    rows = []
    for task, rewards in curves.items():
        asked = np.flatnonzero(np.isfinite(rewards))
        ends = (asked[0], asked[np.argmax(rewards[asked])], asked[-1])
        start, best, last = ((int(found.steps[at]), float(rewards[at])) for at in ends)
        rows.append(Progress(task, start, best, last))
    return rows


def progress_table(rows: Sequence[Progress]) -> Evaluation:
    """The same as a plain table, for a page of several runs."""
    cells = tuple(
        (one.task, *(f"{at[1]:.3f}" for at in (one.start, one.best, one.last)), f"{one.change:+.3f}") for one in rows
    )
    return Evaluation("Mean held-out reward", ("Task", "before", "best", "last", "change"), cells)


def evaluation_noise(run: RunData) -> float:
    """The largest standard error that a task's mean held-out reward can have; 0 where the recipe does not tell."""
    questions = number(run.setting("rl.evaluation.questions"))
    return 0.5 / questions**0.5 if questions >= 1 else 0.0  # of rewards in [0, 1] the deviation is at most 1/2


def how_evaluated(run: RunData) -> str:
    """What a held-out reward is a mean of, and how far chance alone may move it."""
    if not (noise := evaluation_noise(run)):
        return ""
    questions, temperature = (run.setting(f"rl.evaluation.{key}") for key in ("questions", "temperature"))
    return (
        f"Means over {questions:,} held-out questions of each task, or all there are, sampled at temperature "
        f"{temperature}; the standard error of a mean of {questions:,} is at most {noise:.2g}, and a smaller change "
        "has no colour."
    )


def task_order(run: RunData) -> list[str]:
    """The tasks as the recipe lists them, then others that the run has numbers of: the order of colours everywhere."""
    prompts = run.setting("rl.prompts")
    listed = [str(one.get("task")) for one in prompts if isinstance(one, Mapping)] if isinstance(prompts, list) else []
    told = {tag.removeprefix("reward/") for tag in tags(run) if tag.startswith("reward/")} - {"mean"}
    asked = {str(task) for row in run.evaluations for task in row["rewards"]}
    return list(dict.fromkeys([*listed, *sorted(told | asked)]))


def tags(run: RunData) -> list[str]:
    """Names of the further numbers of the steps, as they first appear."""
    numbers = [row.get("numbers") for row in run.metrics]
    return list(dict.fromkeys(str(tag) for one in numbers if isinstance(one, Mapping) for tag in one))


def totals(run: RunData, prefix: str) -> dict[str, float]:
    """Sums over the steps of the numbers whose tag begins with ``prefix``, where they are above 0."""
    sums = {tag.removeprefix(prefix): run.total("numbers", tag) for tag in tags(run) if tag.startswith(prefix)}
    return {name: total for name, total in sums.items() if total > 0}


def repeated_events(run: RunData) -> list[Repeated]:
    """What the run warned of, most frequent first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for event in run.events:
        if is_repeating(event):
            key = str(event["event"]), re.sub(r"\d[\d.,]*", "#", str(event.get("detail", "")))
            groups.setdefault(key, []).append(event)
    found = [
        Repeated(
            name,
            len(all_of),
            str(all_of[0].get("step", "")),
            str(all_of[-1].get("step", "")),
            str(all_of[-1].get("detail", "")),
        )
        for (name, _), all_of in groups.items()
    ]
    return sorted(found, key=lambda one: -one.count)


def is_repeating(event: Row) -> bool:
    return event["event"] in _REPEATING


def losses(run: RunData) -> list[tuple[str, str, str]]:
    """(what, of which task or why, how many) of what was sampled and not learnt from."""
    kinds = {"stale/": "Groups refused: a token of an older policy", "unknown/": "Responses without a verdict"}
    return [(what, of, f"{total:,.0f}") for prefix, what in kinds.items() for of, total in totals(run, prefix).items()]


def rl_figures(run: RunData, rows: Sequence[Progress]) -> list[tuple[str, tuple[str, str]]]:
    """The few numbers of a run: (name, (value, what it means))."""
    figures = []
    if rows:
        whole = rows[-1]
        figures.append(
            ("Held-out reward", (f"{whole.start[1]:.3f} → {whole.last[1]:.3f}", f"{whole.task}, before and last"))
        )
    if ends := mean_of_ends(run.column("numbers", "reward/mean")):
        figures.append(("Training reward", (f"{ends[0]:.3f} → {ends[1]:.3f}", "first and last 5% of steps")))
    if num_rollouts := run.total("num_samples"):
        trained = compact(run.total("num_trained_tokens"))
        figures.append(("Rollouts", (f"{num_rollouts:,.0f}", f"learnt from, {trained} tokens of responses")))
    gaps = run.column("numbers", "policy/largest_gap")
    if np.isfinite(gaps).any():
        figures.append(("Largest gap", (scientific(float(np.nanmax(gaps))), "of a log-prob, engine to trainer")))
    parts, seconds = totals(run, "seconds/"), run.total("seconds")
    if seconds:
        shares = ", ".join(f"{part} {percent(round(spent / seconds, 2))}" for part, spent in parts.items())
        figures.append(("Time", (duration(seconds), shares or "in steps")))
    if run.metrics:
        stale, unknown = (sum(totals(run, prefix).values()) for prefix in ("stale/", "unknown/"))
        figures.append(
            ("Lost", (f"{stale + unknown:,.0f}", f"{stale:,.0f} stale groups, {unknown:,.0f} without verdict"))
        )
    return figures


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{seconds:02}"
