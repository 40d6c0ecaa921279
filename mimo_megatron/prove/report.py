"""What ``mimo-megatron prove`` says: the table as it grows, JSON, and the support matrix in Markdown."""

import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mimo_megatron.prove.cases import FEATURES, LAYOUTS, NOT_YET, Refusal, refusal
from mimo_megatron.prove.measure import Errors
from mimo_megatron.prove.run import TOLERANCES, Verdict

EQUAL, DIFFERS, NOT_RUN, REFUSED = "✓", "✗", "·", "–"
PACKAGES = ("torch", "megatron-core")
_PRECISIONS = {"fp32": "fp64, step in fp32", "bf16": "bf16", "fp8": "FP8 products in fp64, step in fp32"}


def follow(verdicts: Iterable[Verdict], num_cases: int, console: Console) -> list[Verdict]:
    """All verdicts; each is printed as it comes, on a terminal with a bar below them."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    bar = progress.add_task("cases", total=num_cases)
    done = []
    with Live(progress, console=console, refresh_per_second=2, transient=not console.is_terminal):
        for verdict in verdicts:
            done.append(verdict)
            style = "red" if verdict.problem else None
            console.print(_line(verdict), highlight=False, markup=False, soft_wrap=True, style=style)
            progress.advance(bar)
    return done


def _line(verdict: Verdict) -> str:
    mark = DIFFERS if verdict.problem else EQUAL
    head = f"{mark} {verdict.case.name:<38} {verdict.case.layout.ranks} ranks "
    errors = verdict.errors
    if errors is None or verdict.problem:
        return f"{head} {verdict.problem}"
    return (
        f"{head}{errors.loss:6.0e} {errors.worst_gradient[0]:6.0e} {errors.worst_step[0]:6.0e}{verdict.seconds:5.1f} s"
    )


def summary(verdicts: Sequence[Verdict], refusals: Sequence[tuple[Refusal, str]], seconds: float) -> Table:
    """The worst of every precision, and the counts."""
    table = Table("", "cases", "equal", "loss", "gradient", "step", box=SIMPLE, title="Worst errors / tolerances")
    for precision, tolerance in TOLERANCES.items():
        some = [one for one in verdicts if one.case.feature.precision == precision]
        measured = [one for one in some if one.errors is not None]
        if not measured:
            continue
        errors = [one.errors for one in measured if one.errors is not None]
        worsts = [max(kinds) for kinds in zip(*map(_three, errors), strict=True)]
        limits = tolerance.loss, tolerance.gradient, tolerance.step
        table.add_row(
            _PRECISIONS[precision],
            str(len(some)),
            str(sum(not one.problem for one in some)),
            *(f"{worst:.0e} / {limit:.0e}" for worst, limit in zip(worsts, limits, strict=True)),
        )
    table.add_row("refused by name", str(len(refusals)), str(sum(bool(said) for _, said in refusals)))
    table.caption = f"{seconds / 60:.1f} minutes"
    return table


def _three(errors: Errors) -> tuple[float, float, float]:
    return errors.loss, errors.worst_gradient[0], errors.worst_step[0]


def as_json(verdicts: Sequence[Verdict], refusals: Sequence[tuple[Refusal, str]], seconds: float) -> str:
    """Everything that was measured, case by case."""
    cases = [
        {
            "layout": one.case.layout.name,
            "parallel": dict(one.case.layout.fields),
            "ranks": one.case.layout.ranks,
            "feature": one.case.feature.name,
            "equal": not one.problem,
            "problem": one.problem,
            "seconds": round(one.seconds, 2),
            **_measured(one),
        }
        for one in verdicts
    ]
    return json.dumps(
        {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "seconds": round(seconds, 1),
            "tolerances": {name: asdict(tolerance) for name, tolerance in TOLERANCES.items()},
            "cases": cases,
            "refused": [{"layout": one.layout.name, "feature": one.feature, "error": said} for one, said in refusals],
            "refused_together": [
                [layout.name, feature.name] for layout in LAYOUTS for feature in FEATURES if refusal(layout, feature)
            ],
        },
        indent=1,
    )


def _measured(verdict: Verdict) -> dict[str, Any]:
    errors = verdict.errors
    if errors is None:
        return {}
    (gradient, name), (step, moved) = errors.worst_gradient, errors.worst_step
    return {
        "loss_error": errors.loss,
        "gradient_error": gradient,
        "gradient_of": name,
        "grad_norm_error": errors.grad_norm,
        "step_error": step,
        "step_of": moved,
    }


def support_matrix(results: Mapping[str, Any]) -> str:
    """The page ``docs/support-matrix.md`` from what ``as_json`` wrote."""
    found = {(one["layout"], one["feature"]): one for one in results["cases"]}
    numbers, refused = {one.name: number for number, one in enumerate(FEATURES, 1)}, results["refused_together"]
    lines = [
        "# Which layouts compose with what",
        "",
        "Written by `mimo-megatron prove --matrix docs/support-matrix.md`; do not edit.",
        f"{results['date']}, Python {results['python']}, "
        + ", ".join(f"{name} {results[name]}" for name in PACKAGES)
        + f", {len(found)} cases in {results['seconds'] / 60:.0f} minutes.",
        "",
        f"{EQUAL} composes: the loss, every parameter's gradient and the parameters after one SGD step equal those of "
        f"one process. {DIFFERS} does not. {REFUSED} refused by name. {NOT_RUN} not run.",
        "",
        "| layout | ranks | " + " | ".join(str(number) for number in numbers.values()) + " |",
        "|---|---|" + "---|" * len(numbers),
    ]
    for layout in LAYOUTS:
        marks = [_mark(found.get((layout.name, name)), [layout.name, name] in refused) for name in numbers]
        lines.append(f"| {layout.name} | {layout.ranks} | " + " | ".join(marks) + " |")
    lines += ["", "| | feature | what |", "|---|---|---|"]
    lines += [f"| {number} | {feature.name} | {feature.what} |" for number, feature in enumerate(FEATURES, 1)]
    lines += ["", "## Errors", ""]
    lines += ["The worst over all layouts: of a gradient relative to its norm, of a step to that of the update.", ""]
    lines += ["| feature | loss | gradient | step |", "|---|---|---|---|"]
    for feature in FEATURES:
        some = [one for (_, name), one in found.items() if name == feature.name and "loss_error" in one]
        if some:
            worst = [max(one[f"{kind}_error"] for one in some) for kind in ("loss", "gradient", "step")]
            lines.append(f"| {feature.name} | " + " | ".join(f"{error:.0e}" for error in worst) + " |")
    limits = [
        f"{_PRECISIONS[name]}: loss {one['loss']:.0e}, gradient {one['gradient']:.0e}, step {one['step']:.0e}"
        for name, one in results["tolerances"].items()
    ]
    lines += ["", "Tolerances. " + "; ".join(limits) + "."]
    lines += ["", "## Refused by name", "", "| layout | what the user sees |", "|---|---|"]
    lines += [f"| {_together(one)} | {_second_line(one['error'])} |" for one in results["refused"]]
    lines += ["", "## Not yet", "", "| | |", "|---|---|"]
    lines += [f"| {what} | {instead} |" for what, instead in NOT_YET]
    return "\n".join(lines) + "\n"


def _mark(case: Mapping[str, Any] | None, is_refused: bool) -> str:
    if case is None:
        return REFUSED if is_refused else NOT_RUN
    return EQUAL if case["equal"] else DIFFERS


def _together(one: Mapping[str, Any]) -> str:
    return str(one["layout"]) if one["feature"] == FEATURES[0].name else f"{one['layout']} with {one['feature']}"


def _second_line(error: str) -> str:
    """The first mistake of a refusal, without its number."""
    line = [*error.splitlines(), "", ""][1].strip()
    return line.removeprefix("1. ").replace("|", "\\|")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
