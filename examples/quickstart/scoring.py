"""How right an answer is: one pure function per kind of task, from (answer, gold) to a score in [0, 1].

An answer is judged by what it says, not by its form: the first numbers, box or interval found in it count. Beside the
scores stand two floors that need no model: the best constant answer and a random training answer.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np

Scorer = Callable[[str, str], float]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
_INTERVAL = re.compile(r"\[(\d{1,2}):(\d{1,2}),\s*(\d{1,2}):(\d{1,2})\]")
_PAIR = re.compile(r"(\d)\s*(\[[^\[\]]*\])")


def digits_right(answer: str, gold: str) -> float:
    """Fraction of places where the same digit stands; places that only one of the two has are wrong."""
    said, true = re.findall(r"\d", answer), re.findall(r"\d", gold)
    right = sum(one == other for one, other in zip(said, true, strict=False))
    return right / max(len(said), len(true), 1)


def number_right(answer: str, gold: str) -> float:
    """1 where the first number of the answer is the gold number. Serves counting and arithmetic."""
    said = _NUMBER.search(answer)
    return float(said is not None and float(said[0]) == float(gold))


def box_iou(answer: str, gold: str) -> float:
    """Intersection over union of the first box ``[x1, y1, x2, y2]`` with the gold box; 0 for no proper box."""
    said, true = _coordinates(answer, 4), _coordinates(gold, 4)
    assert true is not None, f"gold {gold!r} is no box"
    if said is None or said[2] <= said[0] or said[3] <= said[1]:
        return 0.0
    wide = min(said[2], true[2]) - max(said[0], true[0])
    high = min(said[3], true[3]) - max(said[1], true[1])
    shared = max(0.0, wide) * max(0.0, high)
    return shared / (_area(said) + _area(true) - shared)


def point_in_box(answer: str, gold: str) -> float:
    """1 where the first bracketed point ``[x, y]`` lies in the gold box, its border included."""
    said, true = _coordinates(answer, 2), _coordinates(gold, 4)
    assert true is not None, f"gold {gold!r} is no box"
    return float(said is not None and true[0] <= said[0] <= true[2] and true[1] <= said[1] <= true[3])


def interval_iou(answer: str, gold: str) -> float:
    """Intersection over union in seconds of the first ``[mm:ss, mm:ss]`` with the gold; 0 for no proper interval."""
    said, true = _seconds(answer), _seconds(gold)
    assert true is not None, f"gold {gold!r} is no interval"
    if said is None or said[1] <= said[0]:
        return 0.0
    shared = max(0, min(said[1], true[1]) - max(said[0], true[0]))
    return shared / (said[1] - said[0] + true[1] - true[0] - shared)


def description_right(answer: str, gold: str) -> float:
    """Mean IoU over the gold's digits, place by place, of boxes that carry the right digit; extra ones are wrong."""
    said, true = _PAIR.findall(answer), _PAIR.findall(gold)
    scores = (box_iou(a[1], g[1]) if a[0] == g[0] else 0.0 for a, g in zip(said, true, strict=False))
    return sum(scores) / max(len(said), len(true), 1)


def text_right(answer: str, gold: str) -> float:
    """1 where both say the same, white space at the ends aside."""
    return float(answer.strip() == gold.strip())


SCORERS: dict[str, Scorer] = {
    "read": digits_right,
    "read_pair": digits_right,
    "count": number_right,
    "count_pair": number_right,
    "locate": box_iou,
    "point": point_in_box,
    "add": number_right,
    "subtract": number_right,
    "when": interval_iou,
    "describe": description_right,
    "text": text_right,
}


def score(task: str, answer: str, gold: str) -> float:
    """The score of one answer to a question of that task."""
    return SCORERS[task](answer, gold)


def best_constant_answer(task: str, answers: Sequence[str], golds: Sequence[str], max_candidates: int = 200) -> str:
    """The one answer that scores best on all the golds: the strongest a model can do that never looks.

    Candidates are the most frequent answers and, for lists of coordinates, their median by coordinate, which is a
    better constant box than any real one.
    """
    candidates = [answer for answer, _ in Counter(answers).most_common(max_candidates)]
    candidates += _median_lists(answers)
    scorer = SCORERS[task]
    return max(candidates, key=lambda candidate: fmean(scorer(candidate, gold) for gold in golds))


def random_answer_score(task: str, answers: Sequence[str], golds: Sequence[str], seed: int = 0) -> float:
    """Mean score of answers drawn at random from ``answers``: what chance gives."""
    picks = np.random.default_rng(seed).integers(len(answers), size=(20, len(golds)))
    scorer = SCORERS[task]
    return fmean(scorer(answers[pick], gold) for row in picks.tolist() for pick, gold in zip(row, golds, strict=True))


def _median_lists(answers: Sequence[str]) -> list[str]:
    """For 2 and for 4 coordinates, the median of all answers that are such a list."""
    medians = []
    for size in (2, 4):
        found = [values for answer in answers if (values := _coordinates(answer, size)) is not None]
        if found:
            medians.append(str([round(value) for value in np.median(found, axis=0).tolist()]))
    return medians


def _coordinates(text: str, size: int) -> tuple[float, ...] | None:
    """The numbers of the first bracket that holds exactly ``size`` of them and nothing else but separators."""
    for inside in _BRACKETED.findall(text):
        fields = [field.strip() for field in inside.split(",")]
        if len(fields) == size and all(_NUMBER.fullmatch(field) for field in fields):
            return tuple(float(field) for field in fields)
    return None


def _seconds(text: str) -> tuple[int, int] | None:
    found = _INTERVAL.search(text)
    if found is None:
        return None
    minutes_1, seconds_1, minutes_2, seconds_2 = (int(field) for field in found.groups())
    return 60 * minutes_1 + seconds_1, 60 * minutes_2 + seconds_2


def _area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
