"""What a run folder holds, read so that a report can always be written: a missing file is an empty part, and a line or
file that cannot be read is counted in ``faults`` and shown, never fatal and never silent."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mimo_megatron.errors import DataError

Row = dict[str, Any]
_LARGEST = 1e30  # nothing we count comes near; what does is broken, and charts and sums of it would overflow


@dataclass(frozen=True)
class Evaluation:
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class RunData:
    """A run folder in memory. ``metrics`` has one row a step, in rising order."""

    run_dir: Path
    config: Mapping[str, Any]
    config_text: str
    metrics: tuple[Row, ...]
    events: tuple[Row, ...]
    skipped: tuple[Row, ...]
    evaluation: Evaluation | None
    faults: tuple[str, ...] = field(default=())
    evaluations: tuple[Row, ...] = ()
    """Of reinforcement learning: mean held-out ``rewards`` by task, one row an evaluated step, in rising order."""
    rollouts: tuple[Row, ...] = ()
    """Of reinforcement learning: of each task the group at its first, its middle and its last step."""

    @property
    def is_rl(self) -> bool:
        return isinstance(self.setting("rl"), Mapping)

    @property
    def name(self) -> str:
        return str(self.setting("name") or self.run_dir.resolve().name)

    def setting(self, path: str) -> Any:
        """The value at a dotted path of the config; None where it is not set."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @cached_property
    def steps(self) -> NDArray[np.float64]:
        return np.array([row["step"] for row in self.metrics], dtype=np.float64)

    def column(self, key: str, inner: str | None = None) -> NDArray[np.float64]:
        """One number a step, NaN where the row has none; ``inner`` picks from a mapping such as ``lrs``."""
        values = [row.get(key) for row in self.metrics]
        if inner is not None:
            values = [value.get(inner) if isinstance(value, Mapping) else None for value in values]
        return np.array([number(value) for value in values], dtype=np.float64)

    def total(self, key: str, inner: str | None = None) -> float:
        return float(np.nansum(self.column(key, inner)))


def load_run(run_dir: Path) -> RunData:
    """Everything readable in ``run_dir``. ``DataError`` where there is no such folder."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder; name the `dir` of a run that has begun")
    faults: list[str] = []
    config, config_text = _config(run_dir / "config.yaml", faults)
    return RunData(
        run_dir=run_dir,
        config=config,
        config_text=config_text,
        metrics=_by_step(_rows(run_dir / "metrics.jsonl", faults, _has_step)),
        events=tuple(_rows(run_dir / "events.jsonl", faults, lambda row: "event" in row)),
        skipped=tuple(_rows(run_dir / "skipped.jsonl", faults, lambda row: "reason" in row)),
        evaluation=_evaluation(run_dir / "evaluation.json", faults),
        evaluations=load_evaluations(run_dir, faults),
        rollouts=_rollouts(run_dir / "rollouts.jsonl", faults),
        faults=tuple(faults),  # last: the others add to it
    )


def load_evaluations(run_dir: Path, faults: list[str]) -> tuple[Row, ...]:
    """The rows of ``evaluations.jsonl``, one a step: a repeated step counts as it was last."""
    return _by_step(_rows(run_dir / "evaluations.jsonl", faults, _is_evaluation))


def _rollouts(path: Path, faults: list[str]) -> tuple[Row, ...]:
    """Read twice, so that of a long run only what is shown is held in memory."""
    steps_of: dict[str, set[int]] = {}
    for row in _rows(path, faults, _is_rollout):
        steps_of.setdefault(row["task"], set()).add(row["step"])
    picked = {(task, step) for task, steps in steps_of.items() for step in _ends_and_middle(sorted(steps))}
    shown: dict[tuple[str, int], Row] = {}
    for row in _rows(path, [], _is_rollout):
        if (key := (row["task"], row["step"])) in picked:
            shown[key] = row
    return tuple(shown[key] for key in sorted(shown))


def _ends_and_middle(values: Sequence[int]) -> tuple[int, int, int]:
    return values[0], values[len(values) // 2], values[-1]


def _by_step(rows: Iterable[Row]) -> tuple[Row, ...]:
    by_step = {row["step"]: row for row in rows}
    return tuple(by_step[step] for step in sorted(by_step))


def _rows(path: Path, faults: list[str], is_valid: Callable[[Row], bool]) -> Iterator[Row]:
    """The valid rows of a JSONL file; one remark in ``faults`` for all the others, with the first one's place."""
    bad_lines: list[int] = []
    for number, line in enumerate(_text(path, faults).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and is_valid(row):
            yield row
        else:
            bad_lines.append(number)
    if bad_lines:
        faults.append(f"{path.name}: {len(bad_lines)} unreadable line(s) left out, the first at line {bad_lines[0]}")


def _config(path: Path, faults: list[str]) -> tuple[Mapping[str, Any], str]:
    text = _text(path, faults)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        faults.append(f"{path.name}: not YAML ({str(error).splitlines()[0]})")
        config = None
    return (config if isinstance(config, dict) else {}), text


def _evaluation(path: Path, faults: list[str]) -> Evaluation | None:
    text = _text(path, faults)
    if not text:
        return None
    try:
        table = json.loads(text)
        columns, rows = tuple(map(str, table["columns"])), tuple(map(tuple, table["rows"]))
    except (ValueError, KeyError, TypeError) as error:
        faults.append(f"{path.name}: not a table of columns and rows ({type(error).__name__}: {error})")
        return None
    if wrong := [row for row in rows if len(row) != len(columns)]:
        faults.append(f"{path.name}: {len(wrong)} row(s) without exactly {len(columns)} cells left out")
    return Evaluation(str(table.get("caption", "")), columns, tuple(row for row in rows if len(row) == len(columns)))


def _text(path: Path, faults: list[str]) -> str:
    if not path.exists():
        return ""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        faults.append(f"{path.name}: {error.reason} at byte {error.start}; shown with replacement characters")
        return content.decode(errors="replace")


def _has_step(row: Row) -> bool:
    return type(row.get("step")) is int and abs(row["step"]) < _LARGEST


def _is_evaluation(row: Row) -> bool:
    return _has_step(row) and isinstance(row.get("rewards"), dict)


def _is_rollout(row: Row) -> bool:
    return _has_step(row) and isinstance(row.get("task"), str) and isinstance(row.get("responses"), list)


def number(value: Any) -> float:
    """The value if it is a number that a run can have, else NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < _LARGEST else math.nan


def mean_of_ends(values: NDArray[np.float64], fraction: float = 0.05) -> tuple[float, float] | None:
    """Means of the first and the last ``fraction`` of the finite values, at least one each; None if there are none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    count = max(1, round(fraction * len(finite)))
    return float(finite[:count].mean()), float(finite[-count:].mean())


def skipped_by_reason(rows: Sequence[Row]) -> dict[str, list[tuple[str, str]]]:
    """``{reason: [(id, detail), ...]}``, most frequent first; an id skipped again (another epoch) is listed once."""
    groups: dict[str, dict[str, str]] = {}
    for row in rows:
        groups.setdefault(str(row["reason"]), {}).setdefault(str(row.get("id", "?")), str(row.get("detail") or ""))
    return {reason: list(ids.items()) for reason, ids in sorted(groups.items(), key=lambda item: -len(item[1]))}


def joint_evaluation(runs: Sequence[RunData]) -> Evaluation | None:
    """One table of several runs' evaluations: what is the same in all of them once, the rest a column for each run.

    None unless at least two runs have one, of the same columns and the same names in the first of them.
    """
    evaluated = [(run.name, run.evaluation) for run in runs if run.evaluation]
    shapes = [(one.caption, one.columns, [row[:1] for row in one.rows]) for _, one in evaluated]
    if len(evaluated) < 2 or any(shape != shapes[0] for shape in shapes):
        return None
    first = evaluated[0][1]
    of_column = [[[row[i] for row in one.rows] for _, one in evaluated] for i in range(len(first.columns))]
    varies = [any(cells != per_run[0] for cells in per_run) for per_run in of_column]
    columns: list[tuple[str, list[Any]]] = []
    for name, per_run, is_varying in zip(first.columns, of_column, varies, strict=True):
        if not is_varying:
            columns.append((name, per_run[0]))
            continue
        prefix = f"{name}, " if sum(varies) > 1 else ""
        columns += [(prefix + run, cells) for (run, _), cells in zip(evaluated, per_run, strict=True)]
    rows = tuple(zip(*(cells for _, cells in columns), strict=True))
    return Evaluation(first.caption, tuple(name for name, _ in columns), rows)
