"""One HTML file that tells a run: what it was, how it went, what was left out, and how well it did.

The file needs nothing else: styles and charts are inline, there is no script, and its content policy forbids any
request. Whatever a run folder lacks is left out; what is there and could not be read is named.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mimo_megatron.report.charts import compact, percent, scientific
from mimo_megatron.report.rl_charts import held_out_chart, rl_charts, training_chart
from mimo_megatron.report.rl_samples import Group, sample_groups
from mimo_megatron.report.rl_summary import (
    Progress,
    Repeated,
    duration,
    evaluation_noise,
    held_out,
    how_evaluated,
    is_repeating,
    losses,
    progress,
    progress_table,
    repeated_events,
    rl_figures,
    task_order,
)
from mimo_megatron.report.run_charts import Chart, journey_chart, loss_chart, lr_chart, run_charts
from mimo_megatron.report.run_data import (
    Evaluation,
    RunData,
    joint_evaluation,
    load_run,
    mean_of_ends,
    number,
    skipped_by_reason,
)

_NUM_IDS_SHOWN = 50


def write_report(run_dir: Path) -> Path:
    """``run_dir/report.html``, written anew from what the run folder holds now."""
    run = load_run(run_dir)
    rl = _rl_part(run) if run.is_rl else None
    return _write(
        run_dir / "report.html",
        "run.html",
        run=run,
        rl=rl,
        facts=_facts(run),
        status=_status(run),
        figures=rl_figures(run, rl.progress) if rl else _figures(run),
        modules=_modules(run),
        charts=rl.charts if rl else run_charts(run),
        data=() if rl else _data_table(run),
        reasons=_skipped_counts(run),
        skipped=skipped_by_reason(run.skipped),
        num_ids_shown=_NUM_IDS_SHOWN,
        events=_events(run),
    )


def write_journey(run_dirs: Sequence[Path], out: Path, *, title: str = "Training journey") -> Path:
    """``out``: the given runs, stage after stage in that order, in one page."""
    runs = [load_run(run_dir) for run_dir in run_dirs]
    joint = joint_evaluation(runs)
    stages = [_stage(run, out, None if joint else run.evaluation) for run in runs]
    return _write(
        out,
        "journey.html",
        title=title,
        stages=stages,
        module_names=_names_in_order(stage.modules for stage in stages),
        figure_names=_names_in_order(stage.figures for stage in stages),
        evaluation=joint,
        chart=journey_chart(runs),
    )


@dataclass(frozen=True)
class _Stage:
    """What the page of a journey shows of one run."""

    name: str
    status: str
    modules: Mapping[str, str]
    figures: Mapping[str, tuple[str, str]]
    charts: Sequence[Chart]
    evaluations: Sequence[Evaluation]
    faults: Sequence[str]
    report: str | None


def _stage(run: RunData, page: Path, evaluation: Evaluation | None) -> _Stage:
    evaluations = [evaluation] if evaluation else []
    modules, figures = dict(_modules(run)), _figures(run)
    if run.is_rl:
        found = held_out(run.evaluations, task_order(run))
        rows = progress(found) if found else []
        drawn = [held_out_chart(run, found), training_chart(run), lr_chart(run)]
        figures = [one for one in rl_figures(run, rows) if one[0] in ("Held-out reward", "Time")]
        evaluations += [progress_table(rows)] if rows else []
    else:
        drawn = [loss_chart(run, is_wide=False), lr_chart(run)]
    charts = [chart for chart in drawn if chart]
    report = _link(run.run_dir / "report.html", page)
    return _Stage(run.name, _status(run)[0], modules, dict(figures), charts, evaluations, run.faults, report)


@dataclass(frozen=True)
class _RLPart:
    """What the page shows of reinforcement learning alone."""

    progress: Sequence[Progress]
    noise: float
    how_evaluated: str
    charts: Sequence[Chart]
    groups: Mapping[str, Sequence[Group]]
    num_tasks_left_out: int
    repeated: Sequence[Repeated]
    losses: Sequence[tuple[str, str, str]]


def _rl_part(run: RunData) -> _RLPart:
    order = task_order(run)
    found = held_out(run.evaluations, order)
    groups = sample_groups(run.rollouts, order)
    return _RLPart(
        progress=progress(found) if found else (),
        noise=evaluation_noise(run),
        how_evaluated=how_evaluated(run),
        charts=rl_charts(run, found),
        groups=groups,
        num_tasks_left_out=len({row["task"] for row in run.rollouts}) - len(groups),
        repeated=repeated_events(run),
        losses=losses(run),
    )


@functools.cache
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


def _write(path: Path, template: str, **content: Any) -> Path:
    page = _environment().get_template(template).render(written=_time(datetime.now(UTC).timestamp()), **content)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A JSON string may hold half a surrogate pair (a text cut in two), for which UTF-8 has no bytes.
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _names_in_order(groups: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _link(report: Path, page: Path) -> str | None:
    return Path(relpath(report, page.parent)).as_posix() if report.exists() else None


def _status(run: RunData) -> tuple[str, bool]:
    """Where the run stands in words, and whether it is complete."""
    done = int(run.steps[-1]) if run.metrics else 0
    planned = run.setting("train.steps")
    if not isinstance(planned, int):
        return f"{done:,} steps", False
    return (f"complete, {done:,} steps", True) if done >= planned else (f"at step {done:,} of {planned:,}", False)


def _facts(run: RunData) -> list[tuple[str, str]]:
    """What the run was, as (term, value): model, layout, precision, origin, versions."""
    details = [one["detail"] for one in run.events if isinstance(one.get("detail"), Mapping)]
    start: Mapping[str, Any] = next((one for one in reversed(details) if "versions" in one), {})
    facts = [
        ("Model", run.setting("model.name")),
        ("Layout", _layout(run, start.get("ranks"))),
        ("Precision", run.setting("train.precision")),
        ("FP8", run.setting("train.fp8.scaling")),
        ("Started from", run.setting("start_from")),
        ("Algorithm", _algorithm(run)),
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
    model_ranks = math.prod(sizes)
    if isinstance(ranks, int) and ranks % model_ranks == 0:
        words += f" × DP {ranks // model_ranks} ({ranks} rank{'s' if ranks != 1 else ''})"
    return words


def _algorithm(run: RunData) -> str | None:
    keys = ("algorithm.name", "algorithm.normaliser", "rollout.groups_per_step", "rollout.group_size", "rollout.engine")
    values = [run.setting(f"rl.{key}") for key in keys]
    if not all(isinstance(value, str | int) for value in values):
        return None
    name, normaliser, num_groups, size, engine = values
    return f"{name}, {normaliser}; {num_groups} groups of {size} rollouts a step, engine {engine}"


def _modules(run: RunData) -> list[tuple[str, str]]:
    """(module, its peak learning rate or "frozen") of every module the config names."""
    names = ("vision", "projector", "text") if run.setting("model.vision") else ("text",)
    settings = [(module, run.setting(f"train.{module}")) for module in names]
    return [
        (module, scientific(lr) if math.isfinite(lr := number(one.get("lr"))) else "frozen")
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
        figures.append(("Time", (duration(seconds), f"{median:.3g} s a step (median)")))
    if seconds and np.isfinite(waited := run.column("data_seconds")).any():
        share = float(np.nansum(waited)) / seconds
        figures.append(("Waiting for data", (percent(share), "of the time, the slowest rank of each step")))
    if run.metrics:
        num_skipped = sum(_skipped_counts(run).values())
        figures.append(("Skipped", (f"{num_skipped:,}", f"of {run.total('num_samples') + num_skipped:,.0f} samples")))
    return figures


def _skipped_counts(run: RunData) -> dict[str, int]:
    """Skips by reason, most frequent first: as the trainer counted them, or as listed where it wrote no count."""
    counts = run.metrics[-1].get("skipped") if run.metrics else None
    if not isinstance(counts, Mapping) or not all(type(count) is int for count in counts.values()):
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
        if run.is_rl and is_repeating(event):  # these have a table of their own
            continue
        detail = event.get("detail", "")
        if isinstance(detail, Mapping):
            flat = {key: str(value) for key, value in _flat(detail).items() if value is not None}
            changed = {key: value for key, value in flat.items() if seen.get(key) != value}
            seen |= flat
            detail = ", ".join(f"{key} {value}" for key, value in changed.items()) or "as before"
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
