"""Golds are checked when data is built: every one is read as its rule will read it, and the bad ones are listed.

Also measured: what answers that do not look at the picture would earn on this file, since a set of golds that pays a
constant answer well teaches that answer.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ConfigDict, ValidationError

from mimo_megatron.errors import DataError
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.rules import RULES, score
from mimo_megatron.reward.times import clock
from mimo_megatron.reward.wire import Id, Meta, Task, Wire

MathProblem = Callable[[Any, Meta], str]
"""What is wrong with a math gold, found within a time limit (``service/offline.py``); empty for a good one."""

MOST_CONSTANT_REWARD = 0.2
"""Golds that pay an answer that never looks more than this teach that answer."""


class GoldRow(Wire):
    """A row to check: a ``ScoreItem`` that needs no response; other keys are not looked at."""

    model_config = ConfigDict(extra="ignore")

    id: Id
    task: Task
    gold: Any = None
    meta: Meta = Meta()


class Checked(Protocol):
    """What is asked of a row: ``GoldRow`` and ``ScoreItem`` both have it."""

    @property
    def id(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def gold(self) -> Any: ...
    @property
    def meta(self) -> Meta: ...


@dataclass(frozen=True)
class Finding:
    row: int
    """From 1: the line of the file."""
    id: str
    task: str
    kind: Literal["bad", "doubtful"]
    """``bad``: never scored. ``doubtful``: scored, though poor to learn from."""
    problem: str


@dataclass(frozen=True)
class GoldReport:
    num_rows: Counter[str]
    """By task."""
    findings: list[Finding]
    constant_rewards: dict[str, float] = field(default_factory=dict)
    """By policy, such as ``box: the whole image``: its mean reward over the good golds of that task."""

    @property
    def num_bad(self) -> int:
        return len({finding.row for finding in self.findings if finding.kind == "bad"})


def read_rows(path: Path) -> Iterator[tuple[int, GoldRow | Finding]]:
    """The rows of a JSONL file with their line numbers; a finding in place of a line that is no row."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, GoldRow.model_validate_json(line)
        except ValidationError as error:
            yield number, Finding(number, "", "", "bad", problems_of(error))


def problems_of(error: ValidationError) -> str:
    """What is wrong with a row, key by key."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the line'}: {one['msg']}" for one in error.errors())


def check_golds(rows: Iterable[tuple[int, Checked | Finding]], math_problem: MathProblem) -> GoldReport:
    """What is wrong with the golds of numbered rows."""
    num_rows: Counter[str] = Counter()
    findings: list[Finding] = []
    good: list[Checked] = []
    first_row: dict[str, int] = {}
    for number, row in rows:
        if isinstance(row, Finding):
            num_rows["no row"] += 1
            findings.append(row)
            continue
        num_rows[row.task] += 1
        found = row_findings(number, row, math_problem)
        if row.id in first_row:
            found.append(Finding(number, row.id, row.task, "bad", f"row {first_row[row.id]} has the same id"))
        first_row.setdefault(row.id, number)
        findings += found
        if row.task in RULES and not any(finding.kind == "bad" for finding in found):
            good.append(row)
    return GoldReport(num_rows, findings, _constant_rewards(good))


def write_findings(report: GoldReport, out: Path) -> None:
    """One JSON object a line: row, id, task, kind, problem."""
    lines = [json.dumps(vars(finding), ensure_ascii=False) + "\n" for finding in report.findings]
    out.write_text("".join(lines), encoding="utf-8")


def row_findings(number: int, row: Checked, math_problem: MathProblem) -> list[Finding]:
    """What is wrong with the gold of one row."""

    def finding(kind: Literal["bad", "doubtful"], problem: str) -> Finding:
        return Finding(number, row.id, row.task, kind, problem[:500])

    if row.task == "math":
        return [finding("bad", problem)] if (problem := math_problem(row.gold, row.meta)) else []
    if row.task not in RULES:  # a reward model's: nothing to read
        return [] if row.gold is None else [finding("bad", f"a reward model judges {row.task}; leave the gold out")]
    rule = RULES[row.task]
    try:
        gold = rule.read_gold(row.gold, row.meta)
    except GoldError as fault:
        return [finding("bad", str(fault))]
    return [finding("doubtful", doubt) for doubt in rule.doubts(gold, row.meta)]


def _constant_rewards(rows: Sequence[Checked]) -> dict[str, float]:
    of_task: dict[str, list[Checked]] = {}
    for row in rows:
        of_task.setdefault(row.task, []).append(row)
    found = {}
    if counts := of_task.get("count"):
        number, _ = Counter(row.gold for row in counts).most_common(1)[0]
        found[f"count: always {number}"] = _mean_reward(counts, lambda meta: rf"\boxed{{{number}}}")
    if boxes := of_task.get("box"):
        found["box: the whole image"] = _mean_reward(boxes, _whole_image)
        found["box: the middle quarter"] = _mean_reward(boxes, _middle)
    if times := [row for row in of_task.get("time", []) if row.meta.duration_seconds is not None]:
        found["time: the whole video"] = _mean_reward(times, lambda meta: _span(meta, 0.0, 1.0))
        found["time: the middle half"] = _mean_reward(times, lambda meta: _span(meta, 0.25, 0.75))
    if points := of_task.get("point"):
        found["point: the middle"] = _mean_reward(points, _middle_point)
    return found


def _mean_reward(rows: Sequence[Checked], answer: Callable[[Meta], str]) -> float:
    verdicts = (score(row.task, f"</think>{answer(row.meta)}", row.gold, row.meta) for row in rows)
    return statistics.fmean(verdict.reward or 0.0 for verdict in verdicts)


def _shown(meta: Meta) -> tuple[int, int]:
    assert meta.image is not None  # the gold was read
    return meta.image.shown


def _whole_image(meta: Meta) -> str:
    return json.dumps([0, 0, *_shown(meta)])


def _middle(meta: Meta) -> str:
    width, height = _shown(meta)
    return json.dumps([width / 4, height / 4, width * 3 / 4, height * 3 / 4])


def _middle_point(meta: Meta) -> str:
    width, height = _shown(meta)
    return json.dumps([width / 2, height / 2])


def _span(meta: Meta, start: float, end: float) -> str:
    duration = meta.duration_seconds or 0.0
    return f"[{clock(start * duration + 0.5)}, {clock(end * duration + 0.5)}]"
