"""The demo's scorers: tables made by hand, tricky answers, and the two floors that never look at a picture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.quickstart.scoring import SCORERS, best_constant_answer, random_answer_score, score


@pytest.mark.parametrize(
    ("task", "answer", "gold", "expected"),
    [
        ("read", "3 7 1", "3 7 1", 1.0),
        ("read", "371", "3 7 1", 1.0),
        ("read", "The digits are 3, 7 and 1.", "3 7 1", 1.0),
        ("read", "3 7", "3 7 1", 2 / 3),
        ("read", "3 7 1 1", "3 7 1", 3 / 4),
        ("read", "7 1", "3 7 1", 0.0),
        ("read", "0123456789", "3 7 1", 0.0),
        ("read", "", "3 7 1", 0.0),
        ("read_pair", "3 7; 1", "3 7; 1", 1.0),
        ("read_pair", "3 7; 2", "3 7; 1", 2 / 3),
        ("count", "3", "3", 1.0),
        ("count", " 3 digits", "3", 1.0),
        ("count", "03", "3", 1.0),
        ("count", "13", "3", 0.0),
        ("count", "3.5", "3", 0.0),
        ("count", "-3", "3", 0.0),
        ("count", "three", "3", 0.0),
        ("count", "2 or 3", "3", 0.0),
        ("add", "11", "11", 1.0),
        ("add", "1 1", "11", 0.0),
        ("subtract", "0", "0", 1.0),
        ("locate", "[0, 0, 10, 10]", "[0, 0, 10, 10]", 1.0),
        ("locate", "[5, 0, 15, 10]", "[0, 0, 10, 10]", 1 / 3),
        ("locate", "[0, 0, 10, 20]", "[0, 0, 10, 10]", 0.5),
        ("locate", "[10, 0, 20, 10]", "[0, 0, 10, 10]", 0.0),
        ("locate", "The 7 is at [0,0,10,10].", "[0, 0, 10, 10]", 1.0),
        ("locate", "[7] [0, 0, 10, 10] [1, 1, 2, 2]", "[0, 0, 10, 10]", 1.0),
        ("locate", "[10, 10, 0, 0]", "[0, 0, 10, 10]", 0.0),
        ("locate", "[0, 0, 0, 10]", "[0, 0, 10, 10]", 0.0),
        ("locate", "[0, 0, 10]", "[0, 0, 10, 10]", 0.0),
        ("locate", "[0, 0, 10, 10, 10]", "[0, 0, 10, 10]", 0.0),
        ("locate", "[0, 0, 10, 10", "[0, 0, 10, 10]", 0.0),
        ("locate", "[0, 0, nan, 10]", "[0, 0, 10, 10]", 0.0),
        ("point", "[5, 5]", "[0, 0, 10, 10]", 1.0),
        ("point", "[10, 0]", "[0, 0, 10, 10]", 1.0),
        ("point", "[11, 5]", "[0, 0, 10, 10]", 0.0),
        ("point", "[0, 0, 10, 10]", "[0, 0, 10, 10]", 0.0),
        ("point", "5, 5", "[0, 0, 10, 10]", 0.0),
        ("when", "[00:01, 00:03]", "[00:01, 00:03]", 1.0),
        ("when", "[00:01,00:03]", "[00:01, 00:03]", 1.0),
        ("when", "[00:00, 00:02]", "[00:01, 00:03]", 1 / 3),
        ("when", "[00:03, 00:01]", "[00:01, 00:03]", 0.0),
        ("when", "[00:02, 00:02]", "[00:01, 00:03]", 0.0),
        ("when", "[01:00, 02:00]", "[01:30, 02:00]", 0.5),
        ("when", "from 1 to 3", "[00:01, 00:03]", 0.0),
        ("describe", "3 [0, 0, 10, 10]; 7 [0, 0, 4, 4]", "3 [0, 0, 10, 10]; 7 [0, 0, 4, 4]", 1.0),
        ("describe", "3 [0, 0, 10, 10]; 1 [0, 0, 4, 4]", "3 [0, 0, 10, 10]; 7 [0, 0, 4, 4]", 0.5),
        ("describe", "3 [0, 0, 10, 10]", "3 [0, 0, 10, 10]; 7 [0, 0, 4, 4]", 0.5),
        ("describe", "3 [0, 0, 10, 20]", "3 [0, 0, 10, 10]", 0.5),
        ("describe", "3 [0, 0, 10, 10]; 3 [0, 0, 10, 10]", "3 [0, 0, 10, 10]", 0.5),
        ("text", " 11 ", "11", 1.0),
        ("text", "11.", "11", 0.0),
    ],
)
def test_answers_get_the_score_worked_out_by_hand(task: str, answer: str, gold: str, expected: float) -> None:
    assert score(task, answer, gold) == pytest.approx(expected)


_GOLDS = {
    "read": "3 7", "read_pair": "3; 7", "count": "2", "count_pair": "4", "locate": "[1, 2, 30, 40]",
    "point": "[1, 2, 30, 40]", "add": "10", "subtract": "4", "when": "[00:01, 00:02]",
    "describe": "3 [1, 2, 30, 40]", "text": "12",
}  # fmt: skip


@given(answer=st.text(alphabet="0123456789[],:;.- ", max_size=40), task=st.sampled_from(sorted(SCORERS)))
def test_every_answer_gets_a_score_between_0_and_1(answer: str, task: str) -> None:
    assert 0.0 <= score(task, answer, _GOLDS[task]) <= 1.0


def test_best_constant_count_is_the_most_frequent_one() -> None:
    assert best_constant_answer("count", ["1", "2", "2", "3"], ["1", "2", "2", "3"]) == "2"


def test_best_constant_box_may_be_one_that_was_never_an_answer() -> None:
    corners = [(0, 5), (5, 0), (10, 5), (5, 10), (1, 1), (9, 1), (1, 9), (9, 9)]
    golds = [f"[{x}, {y}, {x + 20}, {y + 20}]" for x, y in corners]
    assert best_constant_answer("locate", golds, golds) == "[5, 5, 25, 25]"


def test_best_constant_point_is_judged_by_the_golds_and_not_by_the_answers() -> None:
    """The most frequent answer misses most boxes; the median falls into two of them."""
    answers = ["[1, 1]", "[1, 1]", "[50, 50]", "[54, 54]", "[58, 58]"]
    golds = ["[0, 0, 2, 2]", "[90, 90, 99, 99]", "[45, 45, 55, 55]", "[49, 49, 59, 59]", "[53, 53, 63, 63]"]
    found = best_constant_answer("point", answers, golds)
    assert sum(score("point", found, gold) for gold in golds) == 3.0


def test_random_answers_are_right_as_often_as_chance_says() -> None:
    answers = [str(number) for number in range(4)] * 50
    assert random_answer_score("count", answers, answers) == pytest.approx(0.25, abs=0.03)
    assert random_answer_score("count", answers, answers) == random_answer_score("count", answers, answers)
