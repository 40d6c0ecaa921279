"""The curves of a run of reinforcement learning: a line for each task, in the same colour in every chart."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.report.charts import Series, line_chart, percent
from mimo_megatron.report.rl_summary import MEAN, HeldOut, tags, task_order
from mimo_megatron.report.run_charts import Chart, lr_chart, markers_of, norm_chart, plain_chart, with_smoothing
from mimo_megatron.report.run_data import RunData

_NUM_COLOURS = 8
_STEPS_TO_SMOOTH = 30  # a shorter run is read point by point
Lines = Mapping[str, NDArray[np.float64]]


def rl_charts(run: RunData, found: HeldOut | None) -> list[Chart]:
    """Every curve that the run has numbers for; those of the optimizer last."""
    mean_reward = {MEAN: run.column("numbers", "reward/mean")}
    largest_gap = {"largest at a token": run.column("numbers", "policy/largest_gap")}
    charts = [
        held_out_chart(run, found),
        _chart(run, "Reward in training", of_tasks(run, "reward"), mean_reward),
        _chart(run, "Pass rate: rewards of at least 1/2", of_tasks(run, "pass_rate"), is_fraction=True),
        _chart(run, "Response length, tokens", of_tasks(run, "length")),
        _chart(run, "Responses cut at the longest length", of_tasks(run, "cut"), is_fraction=True),
        _chart(run, "Entropy, nats a token", of_tasks(run, "entropy")),
        _chart(run, "Groups of equal rewards, dropped", of_tasks(run, "zero_variance"), is_fraction=True),
        _chart(run, "Log-prob gap, engine to trainer (log)", of_tasks(run, "gap"), largest_gap, is_log=True),
        _chart(
            run, "Canary: mean gap after each sync (log)", _tagged(run, "canary/mean_gap_", "prompt {}"), is_log=True
        ),
        _chart(run, "Seconds a step", _tagged(run, "seconds/"), {"whole step": run.column("seconds")}),
        _chart(run, "Tokens with a clipped ratio", _tagged(run, "policy/clipped", "clipped"), is_fraction=True),
        norm_chart(run),
        lr_chart(run),
        plain_chart(run, "Tokens per second of the whole step", "tokens_per_second", (0.0, None)),
    ]
    return [chart for chart in charts if chart]


def held_out_chart(run: RunData, found: HeldOut | None) -> Chart | None:
    """All tasks and, emphasised, their mean; as wide as the page."""
    if found is None:
        return None
    order = task_order(run)
    lines = [
        Series(task, found.steps, rewards, _colour(order.index(task) if task in order else i))
        for i, (task, rewards) in enumerate(found.of_task.items())
    ]
    if len(lines) > 1 and np.isfinite(found.mean).any():
        lines.append(Series(MEAN, found.steps, found.mean, "c-mean"))
    svg = line_chart(lines, label="Held-out reward by step", width=1140, height=300)
    return Chart("Held-out reward", svg, tuple((one.name, one.css) for one in lines), is_wide=True)


def training_chart(run: RunData) -> Chart | None:
    return _chart(run, "Reward in training", of_tasks(run, "reward"), {MEAN: run.column("numbers", "reward/mean")})


def of_tasks(run: RunData, name: str) -> dict[str, NDArray[np.float64]]:
    return {task: run.column("numbers", f"{name}/{task}") for task in task_order(run)}


def _tagged(run: RunData, prefix: str, name: str = "{}") -> dict[str, NDArray[np.float64]]:
    """The numbers whose tag begins so, by ``name`` filled with the rest of the tag."""
    found = [tag for tag in tags(run) if tag.startswith(prefix)]
    return {name.format(tag.removeprefix(prefix)): run.column("numbers", tag) for tag in found}


def _chart(
    run: RunData,
    title: str,
    lines: Lines,
    emphasised: Lines | None = None,
    *,
    is_fraction: bool = False,
    is_log: bool = False,
) -> Chart | None:
    """None where there is no number above 0. A line keeps its colour whether or not those before it are there."""
    named = [(name, ys, _colour(i)) for i, (name, ys) in enumerate(lines.items())]
    named += [(name, ys, "c-mean") for name, ys in (emphasised or {}).items()]
    positive = [(name, np.where(ys > 0, ys, np.nan) if is_log else ys, css) for name, ys, css in named]
    drawn = [Series(name, run.steps, ys, css) for name, ys, css in positive if np.isfinite(ys).any()]
    if not drawn or not any(np.nanmax(one.ys) > 0 for one in drawn):
        return None
    series, levels = with_smoothing(drawn) if len(run.steps) >= _STEPS_TO_SMOOTH else (drawn, ())
    svg = line_chart(
        series,
        label=f"{title} by step",
        markers=markers_of(run),
        y_limits=(None, None) if is_log else (0.0, None),
        y_format=percent if is_fraction else None,
        is_log=is_log,
    )
    return Chart(title, svg, tuple((one.name, one.css) for one in drawn), smoothing=levels)


def _colour(place: int) -> str:
    return f"c{place % _NUM_COLOURS + 1}"
