"""Whatever comes of the questions, none is lost, states continue, and quotas add up."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_megatron.rl.pool import QuestionPool, quotas
from mimo_megatron.rl.questions import Question
from tests.unit.test_rl_pool import question

EVENTS = st.lists(
    st.tuples(st.sampled_from(["draw", "settle", "abort", "lose", "leave", "save"]), st.integers(0, 99)), max_size=80
)


class Driven:
    """A pool and what the test knows is out."""

    def __init__(self, num_questions: int, **config: Any) -> None:
        self.num_questions, self.config = num_questions, config
        self.pool = self.fresh()
        self.out: list[Question] = []

    def fresh(self) -> QuestionPool:
        return QuestionPool({"a": [question("a", number) for number in range(self.num_questions)]}, **self.config)

    def apply(self, event: str, number: int) -> None:
        if event == "draw":
            if sum(self.pool.counts("a").left.values()) < self.num_questions:
                self.out.append(self.pool.draw("a"))
        elif event == "save":
            state = json.loads(json.dumps(self.pool.state()))
            self.pool = self.fresh()
            self.pool.load_state(state)
            self.out = []
        elif self.out:
            one = self.out.pop(number % len(self.out))
            match event:
                case "settle":
                    self.pool.settle(one, number % 11 / 10)
                case "leave":
                    self.pool.leave(one, "media")
                case _:
                    self.pool.give_back(one, is_lost=event == "lose")


@settings(deadline=None)
@given(num=st.integers(1, 6), seed=st.integers(0, 9), share=st.sampled_from([0.3, 0.9]), events=EVENTS)
def test_no_question_is_ever_lost(num: int, seed: int, share: float, events: list[tuple[str, int]]) -> None:
    """After any events every question that was not left is asked again: 400 draws miss none with these shares."""
    driven = Driven(num, seed=seed, easy_share=share, max_attempts=2)
    for event in events:
        driven.apply(*event)
    for one in driven.out:
        driven.pool.settle(one, 0.5)
    left = driven.pool.left()
    asked = set()
    for _ in range(400 if len(left) < num else 0):
        one = driven.pool.draw("a")
        driven.pool.settle(one, 0.5)
        asked.add(one.id)
    assert asked == {f"a/{number}" for number in range(num)} - left.keys()
    assert driven.pool.left() == left and driven.pool.counts("a").num_easy == 0


@settings(deadline=None)
@given(num=st.integers(1, 6), seed=st.integers(0, 9), share=st.sampled_from([0.1, 0.9]), events=EVENTS)
def test_a_saved_pool_draws_what_the_pool_itself_would(
    num: int, seed: int, share: float, events: list[tuple[str, int]]
) -> None:
    driven = Driven(num, seed=seed, easy_share=share, max_attempts=2)
    for event in events:
        driven.apply(*event)
    for one in driven.out:
        driven.pool.give_back(one)
    saved, left = driven.fresh(), driven.pool.left()
    saved.load_state(json.loads(json.dumps(driven.pool.state())))
    assert saved.counts("a") == driven.pool.counts("a")
    for number in range(20 if len(left) < num else 0):
        one, other = driven.pool.draw("a"), saved.draw("a")
        assert one.id == other.id and one.id not in left
        for pool in (driven.pool, saved):
            pool.settle(one, number % 3 / 2)


@given(
    ratios=st.dictionaries(st.sampled_from("abcdefg"), st.floats(0.1, 10), min_size=1), extra=st.integers(0, 50)
)  # fmt: skip
def test_quotas_add_up_and_are_within_one_of_their_share(ratios: dict[str, float], extra: int) -> None:
    total = sum(ratios.values())
    groups = int(total / min(ratios.values())) + 1 + extra
    found = quotas(ratios, groups)
    assert sum(found.values()) == groups and min(found.values()) >= 1
    assert all(abs(found[task] - groups * ratio / total) < 1 for task, ratio in ratios.items())
