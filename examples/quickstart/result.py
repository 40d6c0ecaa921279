"""How well each stage answers the held-out questions, beside what needs no model: chance and the best constant answer.

Both floors are made from answers to training questions alone, and scored, like the model, on the held-out ones.
"""

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from examples.quickstart.build_data import QuestionSet, training_answers
from examples.quickstart.scoring import best_constant_answer, random_answer_score, score
from examples.quickstart.sources import num_cores

CAPTION = "Held-out questions answered by plain transformers"
_ONE_SCENE = {
    "read": "digits read",
    "count": "count",
    "locate": "boxes, IoU",
    "point": "points inside",
    "add": "sum",
    "subtract": "difference",
}
_OTHERS = {
    "read_pair": "two images: digits read",
    "count_pair": "two images: count",
    "when": "clips: seconds, IoU",
    "text": "no image: answer",
}


@dataclass(frozen=True)
class Result:
    """The scores of one task at one level, means over its questions."""

    task: str
    level: str
    num_questions: int
    chance: float
    """Of answers drawn from those of the training share."""
    constant: float
    """Of the answer that is best on the training share when it is always given."""
    scores: Mapping[str, float]
    """By model, in the order of training; the first is where it started."""

    @property
    def label(self) -> str:
        return f"{self.level}: {_ONE_SCENE[self.task]}" if self.task in _ONE_SCENE else _OTHERS[self.task]

    @property
    def start(self) -> float:
        return next(iter(self.scores.values()))

    @property
    def last(self) -> float:
        return list(self.scores.values())[-1]

    @property
    def is_learnt(self) -> bool:
        """Better than where it started, than chance and than the best constant answer."""
        return self.last > max(self.start, self.chance, self.constant)


Floors = Mapping[tuple[str, str], tuple[list[str], list[str]]]
"""Answers and golds of training questions by (level, task)."""


def training_floors(question_sets: Sequence[QuestionSet], num_samples: int, *, seed: int) -> Floors:
    """What the floors are made from: ``num_samples`` training samples of the kind of every question set."""
    with multiprocessing.get_context("fork").Pool(num_cores()) as pool:
        tasks = [(one, num_samples, seed) for one in question_sets]
        found = pool.starmap(_training_answers, tasks, chunksize=1)
    return {
        (one.level, task): answers
        for one, by_task in zip(question_sets, found, strict=True)
        for task, answers in by_task.items()
    }


def _training_answers(one: QuestionSet, num_samples: int, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    return training_answers(one, seed=seed, num_samples=num_samples)


def results(
    questions: Sequence[Mapping[str, Any]], answers: Mapping[str, Mapping[str, str]], floors: Floors
) -> list[Result]:
    """One for each (level, task) of the floors. ``answers`` are those of each model, by question id."""
    found = []
    for (level, task), (said, true) in floors.items():
        asked = [one for one in questions if (one["level"], one["task"]) == (level, task)]
        golds = [question["gold"] for question in asked]
        constant = best_constant_answer(task, said, true)
        scores = {
            model: fmean(score(task, by_id[question["id"]], question["gold"]) for question in asked)
            for model, by_id in answers.items()
        }
        constant_score = fmean(score(task, constant, gold) for gold in golds)
        found.append(Result(task, level, len(asked), random_answer_score(task, said, golds), constant_score, scores))
    return found


def result_table(found: Sequence[Result]) -> Table:
    """The scores in per cent: floors, start, and after each stage; 80 columns wide."""
    drawn = Table(title=f"{CAPTION}, per cent", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("")
    for name in ("chance", "best constant", *found[0].scores):
        drawn.add_column(name.replace(" ", "\n"), justify="right")
    for before, one in zip((None, *found), found, strict=False):
        if before is not None and before.label.split(":")[0] != one.label.split(":")[0]:
            drawn.add_section()
        *earlier, last = (f"{100 * value:.0f}" for value in one.scores.values())
        style = "bold green" if one.is_learnt else "bold red"
        drawn.add_row(one.label, f"{100 * one.chance:.0f}", f"{100 * one.constant:.0f}", *earlier, Text(last, style))
    return drawn


def write_evaluations(found: Sequence[Result], run_dirs: Mapping[str, Path]) -> None:
    """``evaluation.json`` in each run's folder, from which reports make their tables; keys are names of ``scores``."""
    columns = ["task", "asked", "chance", "best constant", "start", "score"]
    for model, run_dir in run_dirs.items():
        rows = [
            [
                one.label,
                one.num_questions,
                *(round(x, 3) for x in (one.chance, one.constant, one.start, one.scores[model])),
            ]
            for one in found
        ]
        text = json.dumps({"caption": CAPTION, "columns": columns, "rows": rows}, indent=1)
        (run_dir / "evaluation.json").write_text(text + "\n")
