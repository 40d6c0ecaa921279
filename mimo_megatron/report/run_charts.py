"""Which curves a run's report draws, and how each is read: its scale, its smoothing, its marks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from mimo_megatron.report.charts import Marker, Series, line_chart, percent, scientific, smooth
from mimo_megatron.report.run_data import RunData

_MODULES = ("text", "projector", "vision")  # each keeps its colour in every chart
_SMOOTHING = {"light": (25, 2), "strong": (8, 5)}  # over 1/25 and 1/8 of the run, but at least so many steps
_LOG_LR_RATIO = 10  # peak rates further apart than this share no linear axis
_LOG_NORM_RATIO = 20  # a largest norm this far above the median would flatten all others


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    """(name, css class) of each line, where there are several."""
    smoothing: tuple[tuple[str, str], ...] = ()
    """(level, words) of each smoothing that can be picked, where there is a choice."""
    is_wide: bool = False


def run_charts(run: RunData) -> list[Chart]:
    """Every curve that the run has numbers for."""
    charts = [
        loss_chart(run, is_wide=True),
        plain_chart(run, "Loss of multi-token prediction", "mtp_loss", (None, None)),
        norm_chart(run),
        lr_chart(run),
        plain_chart(run, "Useful tokens per second", "tokens_per_second", (0.0, None)),
        plain_chart(run, "Vision patches per second", "patches_per_second", (0.0, None)),
        plain_chart(run, "Fill of the packs", "fill", (0.0, 1.0), is_fraction=True),
        plain_chart(run, "Model FLOPs utilisation", "mfu", (0.0, None), is_fraction=True),
        plain_chart(run, "Vision encoder: heaviest rank over the mean", "vision_imbalance", (1.0, None)),
    ]
    return [chart for chart in charts if chart]


def loss_chart(run: RunData, *, is_wide: bool) -> Chart | None:
    loss = run.column("loss")
    if not np.isfinite(loss).any():
        return None
    series, levels = with_smoothing([Series("loss", run.steps, loss, "c-loss")])
    width, height = (1140, 280) if is_wide else (560, 210)
    svg = line_chart(series, label="Loss by step", markers=markers_of(run), width=width, height=height)
    return Chart("Loss per trained token", svg, smoothing=levels, is_wide=is_wide)


def with_smoothing(lines: Sequence[Series]) -> tuple[list[Series], tuple[tuple[str, str], ...]]:
    """Each line with its smoothed ones, of which the page shows what is picked, and the choices as (level, words)."""
    series, levels = [], {"off": "off"}
    for line in lines:
        series.append(replace(line, css=f"{line.css} raw"))
        for level in _SMOOTHING:
            num_steps = _reach(len(line.ys), level)
            levels[level] = f"{num_steps} steps"
            smoothed = smooth(line.ys, num_steps)
            series.append(Series(line.name, line.xs, smoothed, f"{line.css} {level}", has_tooltip=False))
    return series, tuple(levels.items())


def _reach(num_steps: int, level: str) -> int:
    share, at_least = _SMOOTHING[level]
    return max(at_least, num_steps // share)


def norm_chart(run: RunData) -> Chart | None:
    norm = run.column("grad_norm")
    positive = norm[np.isfinite(norm) & (norm > 0)]
    if not len(positive):
        return None
    is_log = bool(positive.max() > _LOG_NORM_RATIO * np.median(positive))
    series = [Series("gradient norm", run.steps, np.where(norm > 0, norm, np.nan) if is_log else norm, "c1")]
    svg = line_chart(series, label="Gradient norm by step", markers=markers_of(run), is_log=is_log)
    return Chart("Gradient norm before clipping" + (" (log)" if is_log else ""), svg)


def lr_chart(run: RunData) -> Chart | None:
    named = {str(module) for row in run.metrics if isinstance(row.get("lrs"), Mapping) for module in row["lrs"]}
    order = [*_MODULES, *sorted(named - set(_MODULES))]
    rates = {module: run.column("lrs", module) for module in order if module in named}
    rates = {module: rate for module, rate in rates.items() if (np.isfinite(rate) & (rate > 0)).any()}
    if not rates:
        return None
    peaks = [np.nanmax(rate) for rate in rates.values()]
    is_log = bool(max(peaks) >= _LOG_LR_RATIO * min(peaks))
    together: dict[bytes, list[str]] = {}  # modules with the same rates share a line
    for module, rate in rates.items():
        together.setdefault(rate.tobytes(), []).append(module)
    series = []
    for modules in together.values():
        rate, css = rates[modules[0]], f"c{order.index(modules[0]) % 4 + 1}"
        series.append(Series(", ".join(modules), run.steps, np.where(rate > 0, rate, np.nan) if is_log else rate, css))
    svg = line_chart(series, label="Rates by step", markers=markers_of(run), is_log=is_log, y_format=scientific)
    legend = tuple((one.name, one.css) for one in series)
    return Chart("Learning rate" + (" (log)" if is_log else ""), svg, legend)


def plain_chart(
    run: RunData, title: str, key: str, y_limits: tuple[float | None, float | None], *, is_fraction: bool = False
) -> Chart | None:
    values = run.column(key)
    if not np.isfinite(values).any() or not np.nanmax(values) > 0:
        return None
    series = [Series("" if is_fraction else key.replace("_", " "), run.steps, values, "c1")]
    y_format = percent if is_fraction else None
    svg = line_chart(series, label=f"{title} by step", markers=markers_of(run), y_limits=y_limits, y_format=y_format)
    return Chart(title, svg)


def markers_of(run: RunData) -> list[Marker]:
    """Resumes and checkpoints that lie on the chart."""
    markers = []
    for event in run.events:
        step, kind = event.get("step"), event["event"]
        if kind in ("resume", "checkpoint") and type(step) is int and run.steps[0] <= step <= run.steps[-1]:
            markers.append(Marker(step, f"{kind} at step {step:,}", kind))
    return markers


def journey_chart(runs: Sequence[RunData]) -> Chart | None:
    """The loss of all stages on one axis of steps, each stage beginning where the one before it ended."""
    series, markers, offset = [], [], 0.0
    for i, run in enumerate(runs):
        loss = run.column("loss")
        if run.is_rl or not np.isfinite(loss).any():  # a loss of reinforcement learning is another quantity
            continue
        css, at = f"c{i % 4 + 1}", run.steps + offset
        series.append(Series(run.name, at, loss, f"{css} faint"))
        series.append(Series(run.name, at, smooth(loss, _reach(len(loss), "light")), css, False))
        markers.append(Marker(float(at[0]), run.name, "stage"))
        offset = float(at[-1])
    if not series:
        return None
    svg = line_chart(series, label="Loss by step over all stages", markers=markers, width=1140, height=300)
    return Chart("Loss over all stages", svg, is_wide=True)
