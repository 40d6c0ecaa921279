"""Held-out rewards of several runs side by side, for the documentation: a panel for each task and one for their mean.

Runs that share a label are repetitions, such as seeds: the line is their mean, the band reaches from the lowest to the
highest of them. A line ends where the first of its runs does, so that no point is a mean of fewer runs than another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mimo_megatron.errors import DataError
from mimo_megatron.log import get_logger
from mimo_megatron.report.rl_summary import MEAN, HeldOut, held_out
from mimo_megatron.report.run_data import load_evaluations

_COLOURS = ("#2b6cb0", "#c05f14", "#2a8a6e", "#8553a8", "#b83b6b", "#7d7411", "#0f8aa5", "#8a6a55")
_DASHES = ("-", "--", ":")  # once the colours are used up, and for readers who do not see them
_PANELS_IN_A_ROW = 3


@dataclass(frozen=True)
class Band:
    """Repetitions of a run on one task, at the steps that all of them were evaluated at."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]
    num_runs: int


def write_comparison(runs: Mapping[str, Sequence[Path]], out: Path, *, title: str = "") -> Path:
    """``out``, as SVG or PNG by its name. ``runs``: label -> run folders.

    A run counts on the tasks that it was evaluated on, and in the mean if these are all the tasks of the page: so runs
    of single tasks may share a label and be compared with a mix. ``DataError`` where a run has no evaluations.
    """
    found = {label: [_load(run_dir) for run_dir in run_dirs] for label, run_dirs in runs.items()}
    tasks = list(dict.fromkeys(task for several in found.values() for one in several for task in one.of_task))
    panels = {**{task: _bands(found, [task]) for task in tasks}, **({MEAN: _bands(found, tasks)} if tasks[1:] else {})}
    num_rows = -(-len(panels) // _PANELS_IN_A_ROW)
    num_columns = min(len(panels), _PANELS_IN_A_ROW)
    figure = Figure(figsize=(4.2 * num_columns, 0.4 + 3.1 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for one, (task, bands) in zip(axes, panels.items(), strict=False):
        _draw(one, task, bands, list(runs))
    for one in axes[len(panels) :]:
        one.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    out.parent.mkdir(parents=True, exist_ok=True)
    # The same runs give the same file: no date, and ids that are not drawn by chance.
    with rc_context({"svg.hashsalt": "mimo-megatron"}):
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
    return out


def band(curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Band | None:
    """Of (steps, values) of each repetition; None where no step is common to all."""
    by_step = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    common = sorted(set.intersection(*({step for step, y in one.items() if np.isfinite(y)} for one in by_step)))
    if not common:
        return None
    values = np.array([[one[step] for step in common] for one in by_step])  # [run, step]
    return Band(np.array(common), values.mean(0), values.min(0), values.max(0), len(by_step))


def _load(run_dir: Path) -> HeldOut:
    faults: list[str] = []
    found = held_out(load_evaluations(run_dir, faults))
    for fault in faults:
        get_logger().warning("%s: %s", run_dir, fault)
    if found is None:
        raise DataError(f"{run_dir} has no evaluations; run it with rl.evaluation.every_steps above 0, or leave it out")
    return found


def _bands(found: Mapping[str, Sequence[HeldOut]], tasks: Sequence[str]) -> dict[str, Band]:
    """By label, of the mean over ``tasks``, of the runs that were evaluated on all of them."""
    bands = {}
    for label, several in found.items():
        able = [one for one in several if all(task in one.of_task for task in tasks)]
        curves = [(one.steps, np.mean([one.of_task[task] for task in tasks], axis=0)) for one in able]
        if curves and (drawn := band(curves)):
            bands[label] = drawn
    return bands


def _draw(axes: Axes, task: str, bands: Mapping[str, Band], labels: Sequence[str]) -> None:
    """``labels``: all of the page, so that a label has its colour in every panel."""
    for label, one in bands.items():
        place = labels.index(label)
        colour = _COLOURS[place % len(_COLOURS)]
        words = f"{label} ({one.num_runs} run{'s' if one.num_runs != 1 else ''})"
        if one.num_runs > 1:
            axes.fill_between(one.steps, one.lowest, one.highest, color=colour, alpha=0.16, linewidth=0)
        axes.plot(one.steps, one.mean, _DASHES[place % len(_DASHES)], color=colour, linewidth=1.8, label=words)
        if len(one.steps) == 1:
            axes.plot(one.steps, one.mean, "o", color=colour)
    axes.set_title(task, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("held-out reward", fontsize=9)
    axes.tick_params(labelsize=8)
    if bands:
        axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
