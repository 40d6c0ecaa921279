"""Scored responses from a JSONL file, and what they add up to by task."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mimo_megatron.errors import DataError
from mimo_megatron.reward.gold_check import problems_of
from mimo_megatron.reward.verdict import Verdict
from mimo_megatron.reward.wire import Meta, ScoreItem, ScoreResult

Scorer = Callable[[str, str, Any, Meta], Verdict]
_THINK_CLOSE = "</think>"


class Row(ScoreItem):
    """A line of the file: an item of ``/v1/score`` and, where it was stored, the result."""

    result: ScoreResult | None = None


@dataclass(frozen=True)
class Scored:
    line: int
    item: ScoreItem
    verdict: Verdict
    is_stored: bool
    """The verdict came with the file; otherwise it was made now."""

    @property
    def thought(self) -> str:
        """Everything up to the last ``</think>``; all of a response that opens the tag and never closes it."""
        before, closed, _ = self.item.response.rpartition(_THINK_CLOSE)
        return before + closed if closed else self.item.response if "<think>" in self.item.response else ""

    @property
    def answer(self) -> str:
        return self.item.response[len(self.thought) :].strip()


@dataclass(frozen=True)
class TaskSummary:
    task: str
    count: int
    mean_reward: float | None
    """Over what counts in training: all but ``unknown``. None where nothing does."""
    invalid_fraction: float
    unknown_fraction: float
    reasons: list[tuple[str, int]]
    """Most frequent first."""


def read_scored(path: Path, scorer: Scorer) -> list[Scored]:
    """The rows of the file in order; those without a stored result are scored now."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = Row.model_validate_json(line)
            stored = None if row.result is None else _verdict(row.result)
        except (ValidationError, AssertionError) as error:
            why = problems_of(error) if isinstance(error, ValidationError) else str(error)
            if b'"responses": [' in line:
                why = f"it is a group of a run's rollouts, which `mimo-megatron report {path.parent}` draws"
            raise DataError(
                f"{path.name} line {number} is not an item of /v1/score with or without its result: {why}"
            ) from error
        verdict = stored or scorer(row.task, row.response, row.gold, row.meta)
        found.append(Scored(number, row, verdict, stored is not None))
    return found


def summarise(rows: Sequence[Scored]) -> list[TaskSummary]:
    """One line a task, in the order in which tasks first appear."""
    found = []
    for task in dict.fromkeys(row.item.task for row in rows):
        verdicts = [row.verdict for row in rows if row.item.task == task]
        statuses = Counter(verdict.status for verdict in verdicts)
        rewards = [verdict.reward for verdict in verdicts if verdict.reward is not None]
        found.append(
            TaskSummary(
                task,
                len(verdicts),
                statistics.fmean(rewards) if rewards else None,
                statuses["invalid"] / len(verdicts),
                statuses["unknown"] / len(verdicts),
                Counter(verdict.reason.value for verdict in verdicts).most_common(),
            )
        )
    return found


def only(rows: Sequence[Scored], word: str | None) -> list[Scored]:
    """The rows whose task, status or reason is ``word``; all where it is None."""
    return [row for row in rows if word in (None, row.item.task, row.verdict.status, row.verdict.reason.value)]


def _verdict(result: ScoreResult) -> Verdict:
    return Verdict(result.status, result.reward, result.reason, result.parts, result.answer)
