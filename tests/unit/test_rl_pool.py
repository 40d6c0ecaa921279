"""The pool of questions: epochs, easy ones, lost ones, states, quotas. Random orders of events: tests/property."""

import json
from typing import Any

import pytest

from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.reward.wire import Meta
from mimo_megatron.rl.pool import LOST_TOO_OFTEN, QuestionPool, quotas
from mimo_megatron.rl.questions import Question
from mimo_megatron.types import RawSample


def question(task: str, number: int, text: str = "?") -> Question:
    name = f"{task}/{number}"
    raw = RawSample(name, task, ({"role": "user", "content": text},))
    return Question(name, task, raw, "count", number, Meta())


def pool(num_questions: int = 10, **settings: Any) -> QuestionPool:
    tasks = {task: [question(task, number) for number in range(num_questions)] for task in ("a", "b")}
    return QuestionPool(tasks, **{"seed": 1, **settings})


def ask(asked: QuestionPool, mean: float = 0.5, task: str = "a") -> str:
    """Draws and settles one; its id."""
    one = asked.draw(task)
    asked.settle(one, mean)
    return one.id


def test_an_epoch_asks_every_question_once_and_the_next_one_in_another_order() -> None:
    asked = pool()
    first, second = ([ask(asked) for _ in range(10)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(f"a/{number}" for number in range(10))
    assert first != second and asked.counts("a").epoch == 1 and asked.counts("b").epoch == 0


def test_the_order_is_the_seeds_and_each_tasks_own() -> None:
    def order(seed: int, task: str) -> list[str]:
        asked = pool(seed=seed)
        return [ask(asked, task=task).partition("/")[2] for _ in range(10)]

    assert order(1, "a") == order(1, "a")
    assert order(1, "a") != order(2, "a") and order(1, "a") != order(1, "b")


def test_a_question_given_back_is_asked_before_all_others_and_in_the_order_of_giving_back() -> None:
    asked = pool()
    drawn = [asked.draw("a") for _ in range(3)]
    for one in (drawn[1], drawn[0]):
        asked.give_back(one)
    assert asked.counts("a").num_waiting == 2
    assert [asked.draw("a").id for _ in range(2)] == [drawn[1].id, drawn[0].id]
    assert asked.draw("a").id not in {one.id for one in drawn}


def test_a_question_that_is_lost_too_often_in_a_row_is_left_and_an_aborted_one_never() -> None:
    asked = pool(max_attempts=2)
    one = asked.draw("a")
    for _ in range(9):
        asked.give_back(one)
        assert asked.draw("a") is one
    asked.give_back(one, is_lost=True)
    asked.settle(asked.draw("a"), 0.5)  # a group of it was judged: the row begins anew
    while (again := asked.draw("a")) is not one:
        asked.settle(again, 0.5)
    asked.give_back(one, is_lost=True)
    assert asked.left() == {}
    asked.give_back(asked.draw("a"), is_lost=True)
    assert asked.left() == {one.id: LOST_TOO_OFTEN} and asked.counts("a").left == {LOST_TOO_OFTEN: 1}
    assert one.id not in [ask(asked) for _ in range(30)]


def test_a_question_that_cannot_be_asked_is_left_under_its_reason_and_a_task_without_any_says_so() -> None:
    asked = pool(2)
    asked.leave(asked.draw("a"), "over_capacity")
    asked.leave(asked.draw("a"), "media")
    assert asked.counts("a").left == {"over_capacity": 1, "media": 1}
    with pytest.raises(DataError, match="task a: all 2 questions are left"):
        asked.draw("a")
    assert ask(asked, task="b")


def test_an_easy_question_leaves_the_stream_and_comes_back_when_it_fails() -> None:
    asked = pool(easy_share=0.0)
    easy = ask(asked, mean=0.9)
    assert asked.counts("a").num_easy == 1
    assert easy not in [ask(asked) for _ in range(27)]
    asked = pool(easy_share=0.5)
    easy = ask(asked, mean=1.0)
    while ask(asked, mean=0.2) != easy:
        pass
    assert asked.counts("a").num_easy == 0
    assert easy in [ask(asked) for _ in range(20)]


def test_easy_questions_are_drawn_with_their_share() -> None:
    """Of 4,000 draws with share 0.1, 343 to 457 is three standard deviations."""
    asked = pool(200, easy_share=0.1)
    easy = {ask(asked, mean=1.0) for _ in range(20)}
    drawn = []
    for _ in range(4000):
        one = asked.draw("a")
        asked.settle(one, 1.0 if one.id in easy else 0.5)
        drawn.append(one.id in easy)
    assert 343 <= sum(drawn) <= 457


def test_a_task_of_easy_questions_alone_still_gives_them() -> None:
    asked = pool(3, easy_share=0.0)
    drawn = [ask(asked, mean=1.0) for _ in range(40)]
    assert len(set(drawn)) == 3 and asked.counts("a").num_easy == 3


def test_a_loaded_state_goes_on_where_it_was_saved() -> None:
    asked = pool(easy_share=0.3, max_attempts=2)
    for number in range(27):
        one = asked.draw("a")
        if number % 6 >= 4:
            asked.give_back(one, is_lost=True)
        else:
            asked.settle(one, number % 3 / 2)
    state = json.loads(json.dumps(asked.state()))
    other = pool(easy_share=0.3, max_attempts=2)
    other.load_state(state)
    assert other.counts("a") == asked.counts("a") and other.left() == asked.left() and other.left()
    assert [ask(other) for _ in range(40)] == [ask(asked) for _ in range(40)]


def test_what_was_out_when_a_state_was_saved_is_asked_again_first() -> None:
    asked = pool()
    drawn = [asked.draw("a").id for _ in range(3)]
    other = pool()
    other.load_state(asked.state())
    assert [ask(other) for _ in range(3)] == drawn
    assert ask(other) == asked.draw("a").id


def test_a_state_of_other_questions_or_another_seed_is_refused() -> None:
    state = pool().state()
    with pytest.raises(ConfigError, match=r"seed: saved 1, now 2"):
        pool(seed=2).load_state(state)
    changed = {"a": [question("a", number) for number in range(10)], "b": [question("b", 0, "another text")]}
    with pytest.raises(ConfigError, match="questions of b"):
        QuestionPool(changed, seed=1).load_state(state)
    with pytest.raises(ConfigError, match="questions of b"):
        QuestionPool({"a": changed["a"]}, seed=1).load_state(state)


def test_an_answer_to_a_question_that_was_not_asked_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="was not drawn"):
        pool().settle(question("a", 0), 1.0)


@pytest.mark.parametrize(
    ("ratios", "groups", "expected"),
    [
        ({"a": 1, "b": 1}, 4, {"a": 2, "b": 2}),
        ({"a": 1, "b": 1, "c": 1}, 8, {"a": 3, "b": 3, "c": 2}),
        ({"a": 3, "b": 1}, 10, {"a": 8, "b": 2}),
        ({"a": 1, "b": 1.8}, 4, {"a": 1, "b": 3}),
        ({"a": 2.4, "b": 1.3, "c": 1.3}, 5, {"a": 3, "b": 1, "c": 1}),
        ({"a": 0.1, "b": 0.1, "c": 0.1}, 3, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_quotas_follow_the_ratios_by_largest_remainder(
    ratios: dict[str, float], groups: int, expected: dict[str, int]
) -> None:
    assert quotas(ratios, groups) == expected


def test_a_share_below_one_group_is_refused_with_a_number_that_works() -> None:
    ratios = {"a": 7.0, "b": 1.0}
    with pytest.raises(ConfigError, match=r"gives b less than one group of a step: set it to 8 at least"):
        quotas(ratios, 7)
    assert quotas(ratios, 8) == {"a": 7, "b": 1}
