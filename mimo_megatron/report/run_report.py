"""One HTML file that tells a run: what it was, how it went, what was left out, and how well it did.

The file needs nothing else: styles and charts are inline, there is no script, and its content policy forbids any
request. Whatever a run folder lacks is left out; what could not be read is named at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mimo_megatron.report.charts import Marker, Series, compact, line_chart, percent, smooth
from mimo_megatron.report.run_data import RunData, load_run, mean_of_ends, skipped_by_reason

_MODULES = ("text", "projector", "vision")  # each keeps its colour in every chart
_SMOOTHING = {"light": 50, "strong": 12}  # the running mean reaches over 1/50 and 1/12 of the run
_LOG_LR_RATIO = 10  # peak rates further apart than this share no linear axis
_LOG_NORM_RATIO = 20  # a largest norm this far above the median would flatten all others
_NUM_IDS_SHOWN = 50


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    """(name, css class) of each line, where there are several."""
    smoothing: tuple[tuple[str, str], ...] = ()
    """(level, words) of each smoothing that can be picked, where there is a choice."""
    is_wide: bool = False


def write_report(run_dir: Path) -> Path:
    """``run_dir/report.html``, written anew from what the run folder holds now."""
    run = load_run(run_dir)
    page = _environment().get_template("run.html").render(
        run=run,
        facts=_facts(run),
        status=_status(run),
        figures=_figures(run),
        modules=_modules(run),
        charts=_charts(run),
        data=_data_table(run),
        reasons=_skipped_counts(run),
        skipped=skipped_by_reason(run.skipped),
        num_ids_shown=_NUM_IDS_SHOWN,
        events=_events(run),
        written=_now(),
    )  # fmt: skip
    return _write(run_dir / "report.html", page)


def write_journey(run_dirs: Sequence[Path], out: Path, *, title: str = "Training journey") -> Path:
    """``out``: the given runs, stage after stage in that order, in one page."""
    runs = [load_run(run_dir) for run_dir in run_dirs]
    stages = [
        dict(
            run=run,
            status=_status(run),
            modules=_modules(run),
            figures=dict(_figures(run)),
            charts=[chart for chart in (_loss_chart(run, is_wide=False), _lr_chart(run)) if chart],
            report=_link(run.run_dir / "report.html", out),
        )
        for run in runs
    ]
    page = _environment().get_template("journey.html").render(
        title=title,
        stages=stages,
        figure_names=list(dict.fromkeys(name for stage in stages for name in stage["figures"])),
        chart=_journey_chart(runs),
        written=_now(),
    )
    return _write(out, page)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    return environment


def _write(path: Path, page: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _link(report: Path, page: Path) -> str | None:
    return Path(relpath(report, page.parent)).as_posix() if report.exists() else None


# ---- words and figures ----


def _status(run: RunData) -> tuple[str, bool]:
    """Where the run stands in words, and whether it is complete."""
    done = int(run.steps[-1]) if run.metrics else 0
    planned = run.setting("train.steps")
    if not isinstance(planned, int):
        return f"{done:,} steps", False
    return (f"complete, {done:,} steps", True) if done >= planned else (f"at step {done:,} of {planned:,}", False)


def _facts(run: RunData) -> list[tuple[str, str]]:
    """What the run was, as (term, value): model, layout, precision, origin, versions."""
    start = next((one["detail"] for one in reversed(run.events) if isinstance(one.get("detail"), Mapping)
                  and "versions" in one["detail"]), {})  # fmt: skip
    facts = [
        ("Model", run.setting("model.name")),
        ("Layout", _layout(run, start.get("ranks"))),
        ("Precision", run.setting("train.precision")),
        ("Started from", run.setting("start_from")),
        ("Seed", run.setting("seed")),
        ("Commit", start.get("commit")),
    ]
    if isinstance(versions := start.get("versions"), Mapping):
        facts.append(("Versions", ", ".join(f"{package} {version}" for package, version in versions.items())))
    return [(term, str(value)) for term, value in facts if value is not None]


def _layout(run: RunData, ranks: Any) -> str | None:
    sizes = [run.setting(f"parallel.{axis}") for axis in ("tp", "pp", "cp")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    words = " × ".join(f"{axis} {size}" for axis, size in zip(("TP", "PP", "CP"), sizes, strict=True))
    if isinstance(ranks, int):
        words += f" × DP {ranks // int(np.prod(sizes))} ({ranks} rank{'s' if ranks != 1 else ''})"
    return words


def _modules(run: RunData) -> list[tuple[str, str]]:
    """(module, its peak learning rate or "frozen") of every module the config names."""
    names = ("vision", "projector", "text") if run.setting("model.vision") else ("text",)
    settings = [(module, run.setting(f"train.{module}")) for module in names]
    return [
        (module, compact(one["lr"]) if isinstance(one.get("lr"), int | float) else "frozen")
        for module, one in settings
        if isinstance(one, Mapping)
    ]


def _figures(run: RunData) -> list[tuple[str, tuple[str, str]]]:
    """The few numbers of a run: (name, (value, what it means))."""
    figures: list[tuple[str, tuple[str, str]]] = []
    if ends := mean_of_ends(run.column("loss")):
        figures.append(("Loss", (f"{ends[0]:.3g} → {ends[1]:.3g}", "first and last 5% of steps")))
    seconds, tokens, slots = run.total("seconds"), run.total("num_tokens"), run.total("num_slots")
    if tokens:
        trained = run.total("num_trained_tokens") / tokens
        figures.append(("Useful tokens", (compact(tokens), f"{percent(trained)} of them trained on")))
    if tokens and seconds:
        patches = compact(run.total("num_patches") / seconds)
        figures.append(("Tokens per second", (compact(tokens / seconds), f"useful ones; {patches} patches")))
    if slots:
        figures.append(("Fill", (percent(tokens / slots), "of the packs' slots hold real tokens")))
    if np.isfinite(mfu := run.column("mfu")).any():
        figures.append(("MFU", (percent(float(np.nanmedian(mfu))), "median step, no recompute counted")))
    if seconds:
        median = float(np.nanmedian(run.column("seconds")))
        figures.append(("Time", (str(timedelta(seconds=round(seconds))), f"{median:.3g} s a step (median)")))
    if run.metrics:
        num_skipped = sum(_skipped_counts(run).values())
        figures.append(("Skipped", (f"{num_skipped:,}", f"of {run.total('num_samples') + num_skipped:,.0f} samples")))
    return figures


def _skipped_counts(run: RunData) -> dict[str, int]:
    """Skips by reason, most frequent first: as the trainer counted them, or as listed where it wrote no count."""
    counts = run.metrics[-1].get("skipped") if run.metrics else None
    if not isinstance(counts, Mapping) or not all(isinstance(count, int) for count in counts.values()):
        counts = {reason: len(ids) for reason, ids in skipped_by_reason(run.skipped).items()}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _data_table(run: RunData) -> list[tuple[str, str]]:
    """(name, total) of what the run consumed."""
    names = dict(
        num_samples="Samples", num_images="Images and videos", num_patches="Vision patches", num_slots="Slots in packs",
        num_tokens="Useful tokens", num_trained_tokens="Trained tokens",
    )  # fmt: skip
    present = [(name, run.column(key)) for key, name in names.items()]
    return [(name, f"{np.nansum(values):,.0f}") for name, values in present if np.isfinite(values).any()]


def _events(run: RunData) -> list[tuple[str, str, str, str]]:
    """(time, event, step, detail) of each event; of a mapping only what differs from the last one of its keys."""
    seen: dict[str, str] = {}
    rows = []
    for event in run.events:
        detail = event.get("detail", "")
        if isinstance(detail, Mapping):
            flat = {key: str(value) for key, value in _flat(detail).items() if value is not None}
            changed = {key: value for key, value in flat.items() if seen.get(key) != value}
            seen |= flat
            detail = ", ".join(f"{key} {value}" for key, value in changed.items())
        rows.append((_time(event.get("time")), str(event["event"]), str(event.get("step", "")), str(detail)))
    return rows


def _flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {str(key): value}
    return flat


def _time(value: Any) -> str:
    """A time as written by the trainer (ISO 8601) or as seconds since 1970, readable and in UTC."""
    try:
        at = datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else datetime.fromisoformat(value)
    except (ValueError, TypeError, OverflowError, OSError):
        return "" if value is None else str(value)
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _now() -> str:
    return _time(datetime.now(UTC).timestamp())


# ---- charts ----


def _charts(run: RunData) -> list[Chart]:
    charts = [
        _loss_chart(run, is_wide=True),
        _norm_chart(run),
        _lr_chart(run),
        _plain_chart(run, "Useful tokens per second", "tokens_per_second", (0.0, None)),
        _plain_chart(run, "Vision patches per second", "patches_per_second", (0.0, None)),
        _plain_chart(run, "Fill of the packs", "fill", (0.0, 1.0), is_fraction=True),
        _plain_chart(run, "Model FLOPs utilisation", "mfu", (0.0, None), is_fraction=True),
    ]
    return [chart for chart in charts if chart]


def _loss_chart(run: RunData, *, is_wide: bool) -> Chart | None:
    loss = run.column("loss")
    if not np.isfinite(loss).any():
        return None
    series = [Series("loss", run.steps, loss, "c-loss raw")]
    levels = [("off", "off")]
    for level, share in _SMOOTHING.items():
        num_steps = max(2, len(loss) // share)
        series.append(Series(f"mean of {num_steps}", run.steps, smooth(loss, num_steps), f"c-loss {level}", False))
        levels.append((level, f"{num_steps} steps"))
    size = dict(width=1140, height=280) if is_wide else {}
    svg = line_chart(series, label="Loss by step", markers=_markers(run), **size)
    return Chart("Loss per trained token", svg, smoothing=tuple(levels), is_wide=is_wide)


def _norm_chart(run: RunData) -> Chart | None:
    norm = run.column("grad_norm")
    positive = norm[np.isfinite(norm) & (norm > 0)]
    if not len(positive):
        return None
    is_log = bool(positive.max() > _LOG_NORM_RATIO * np.median(positive))
    series = [Series("gradient norm", run.steps, np.where(norm > 0, norm, np.nan) if is_log else norm, "c1")]
    svg = line_chart(series, label="Gradient norm by step", markers=_markers(run), is_log=is_log)
    return Chart("Gradient norm before clipping" + (" (log)" if is_log else ""), svg)


def _lr_chart(run: RunData) -> Chart | None:
    named = {str(module) for row in run.metrics if isinstance(row.get("lrs"), Mapping) for module in row["lrs"]}
    order = [*_MODULES, *sorted(named - set(_MODULES))]
    rates = {module: run.column("lrs", module) for module in order if module in named}
    rates = {module: rate for module, rate in rates.items() if (np.isfinite(rate) & (rate > 0)).any()}
    if not rates:
        return None
    peaks = [np.nanmax(rate) for rate in rates.values()]
    is_log = max(peaks) >= _LOG_LR_RATIO * min(peaks)
    css = {module: f"c{order.index(module) % 4 + 1}" for module in rates}
    series = [
        Series(module, run.steps, np.where(rate > 0, rate, np.nan) if is_log else rate, css[module])
        for module, rate in rates.items()
    ]
    svg = line_chart(series, label="Learning rate by step", markers=_markers(run), is_log=is_log)
    return Chart("Learning rate" + (" (log)" if is_log else ""), svg, tuple(css.items()))


def _plain_chart(
    run: RunData, title: str, key: str, y_limits: tuple[float | None, float | None], *, is_fraction: bool = False
) -> Chart | None:
    values = run.column(key)
    if not np.isfinite(values).any() or not np.nanmax(values) > 0:
        return None
    series = [Series("" if is_fraction else key.replace("_", " "), run.steps, values, "c1")]
    y_format = percent if is_fraction else None
    svg = line_chart(series, label=f"{title} by step", markers=_markers(run), y_limits=y_limits, y_format=y_format)
    return Chart(title, svg)


def _markers(run: RunData) -> list[Marker]:
    """Resumes and checkpoints that lie on the chart."""
    markers = []
    for event in run.events:
        step, kind = event.get("step"), event["event"]
        if kind in ("resume", "checkpoint") and type(step) is int and run.steps[0] <= step <= run.steps[-1]:
            markers.append(Marker(step, f"{kind} at step {step:,}", kind))
    return markers


def _journey_chart(runs: Sequence[RunData]) -> Chart | None:
    """The loss of all stages on one axis of steps, each stage beginning where the one before it ended."""
    series, markers, offset = [], [], 0.0
    for i, run in enumerate(runs):
        loss = run.column("loss")
        if not np.isfinite(loss).any():
            continue
        css, at = f"c{i % 4 + 1}", run.steps + offset
        series.append(Series(run.name, at, loss, f"{css} faint"))
        series.append(Series(run.name, at, smooth(loss, max(2, len(loss) // _SMOOTHING["light"])), css, False))
        markers.append(Marker(float(at[0]), run.name, "stage"))
        offset = float(at[-1])
    if not series:
        return None
    svg = line_chart(series, label="Loss by step over all stages", markers=markers, width=1140, height=300)
    return Chart("Loss over all stages", svg, is_wide=True)
