"""A step's batch: which groups are in it, what becomes of the others, and that no token of another policy is."""

import random
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import pytest

from mimo_megatron.config.rl import RolloutConfig
from mimo_megatron.data.records import SampleError
from mimo_megatron.reward.verdict import Reason, judged, unknown
from mimo_megatron.reward.wire import Meta, ScoreItem, ScoreResult
from mimo_megatron.rl.collect import Collector, Sampler, evaluate
from mimo_megatron.rl.engine.protocol import GenerationRequest, RolloutEngine
from mimo_megatron.rl.groups import without_stale
from mimo_megatron.rl.pool import QuestionPool
from mimo_megatron.rl.progress import Progress
from mimo_megatron.rl.questions import Question
from mimo_megatron.rl.scheduler.rates import PassRates
from mimo_megatron.types import RawSample, Rollout
from tests.rl_fixtures import MODEL, engine_with, no_other, prompts, random_weights, several_of, update
from tests.samples import tiny_model

TASKS = ("letters", "lengths")
WEIGHTS = random_weights(scale=0.12)


class Spelled:
    """A tokenizer of no language: token ids in words."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


class Judge:
    """In place of the service: rewards are facts of the text, come late and in another order, and some never."""

    def __init__(self, seed: int, unknown_share: float = 0.0, constant: float | None = None) -> None:
        self._draw, self._unknown_share, self._constant = random.Random(seed), unknown_share, constant
        self._waiting: list[ScoreItem] = []
        self.num_unknown = self.num_asked = 0

    def ask(self, items: Sequence[ScoreItem], groups: Collection[str]) -> None:
        assert {_group(item) for item in items} == set(groups)
        assert len({item.task for item in items}) == 1  # a request is answered when its slowest item is
        self._waiting += items
        self.num_asked += 1

    def results(self, seconds: float) -> list[ScoreResult]:
        self._draw.shuffle(self._waiting)
        ready = self._waiting[: self._draw.randint(0, 8)]
        del self._waiting[: len(ready)]
        return [self._result(item) for item in ready]

    def cancel(self, groups: Collection[str]) -> None:
        self._waiting = [item for item in self._waiting if _group(item) not in set(groups)]

    def _result(self, item: ScoreItem) -> ScoreResult:
        if self._draw.random() < self._unknown_share:
            self.num_unknown += 1
            verdict = unknown(Reason.DEADLINE)
        else:
            numbers = [int(word) for word in item.response.split()]
            share = sum(number % 2 for number in numbers) / max(len(numbers), 1)
            verdict = judged(share if self._constant is None else self._constant)
        return ScoreResult(id=item.id, status=verdict.status, reward=verdict.reward, reason=verdict.reason, ms=0.0)


def _group(item: ScoreItem) -> str:
    return item.id.rpartition("/")[0]


class Late:
    """An engine that hands finished responses over some polls late, in another order."""

    def __init__(self, inner: RolloutEngine, seed: int, lateness: int) -> None:
        self._inner, self._draw, self._lateness = inner, random.Random(seed), lateness
        self._held: list[Rollout] = []

    @property
    def num_running(self) -> int:
        return self._inner.num_running + len(self._held)

    def submit(self, request: GenerationRequest) -> None:
        self._inner.submit(request)

    def abort(self, request_ids: Collection[str]) -> None:
        self._inner.abort(request_ids)
        self._held = [one for one in self._held if one.request_id not in set(request_ids)]

    def poll(self, seconds: float) -> list[Rollout]:
        if self._draw.randrange(self._lateness + 1):
            return []
        self._held += self._inner.poll(0.001)
        self._draw.shuffle(self._held)
        ready = self._held[: self._draw.randint(0, 6)]
        del self._held[: len(ready)]
        return ready


def questions(num: int = 24) -> dict[str, list[Question]]:
    message = {"role": "user", "content": "?"}
    return {
        task: [
            Question(f"{task}/{number}", task, RawSample(f"{task}/{number}", task, (message,)), "count", 1, Meta())
            for number in range(num)
        ]
        for task in TASKS
    }


def read(question_id: str):
    return prompts()[int(question_id.rpartition("/")[2]) % 4]


def collector(engine, judge: Judge, pool: QuestionPool | None = None, read=read, **rollout) -> Collector:
    settings = dict(group_size=4, groups_per_step=6, max_new_tokens=6, max_sequences=16, max_groups_running=5)
    sampler = Sampler(engine, judge, read, Spelled(), MODEL.tokens.ends, 6)  # type: ignore[arg-type]
    pool = pool or QuestionPool(questions(), seed=1)
    return Collector(
        sampler, pool, PassRates(), RolloutConfig(**(settings | rollout)), {"letters": 4, "lengths": 2}
    )  # fmt: skip


def test_in_a_hundred_steps_of_late_engines_and_aborts_no_token_of_another_policy_is_returned():
    small = tiny_model(num_layers=1, width=64, ffn_width=64, num_heads=2, num_kv_heads=2)
    weights = random_weights(small, scale=0.12)
    replicas = [engine_with(weights, small), engine_with(weights, small)]
    several = several_of([Late(replicas[0], 1, 1), Late(replicas[1], 2, 6)], no_other)
    judge = Judge(3, unknown_share=0.02)
    one = collector(several, judge)
    num_tokens = num_aborted = 0
    for step in range(1, 101):
        version = step + 1
        for replica in replicas:
            update(replica, weights, version)
        batch = one.collect(step, seed=7)
        assert batch is not None
        groups, stale = without_stale(batch.groups, version)
        assert not stale and len(groups) == len(batch.groups) == 6
        assert several.num_running == 0
        num_tokens += sum(group.num_tokens for group in groups)
        num_aborted += sum(task.aborted for task in batch.report.tasks.values())
    assert num_tokens > 5_000 and num_aborted > 20 and judge.num_unknown > 20  # the test has met what it is about


def test_a_result_that_crossed_its_groups_abort_is_taken_for_no_other_group():
    class Stubborn(Judge):
        """Its results come, late, though nobody wants them any more."""

        def cancel(self, groups: Sequence[str]) -> None:
            self.num_cancelled = getattr(self, "num_cancelled", 0) + len(groups)

    engine, judge = engine_with(WEIGHTS), Stubborn(3)
    one = collector(engine, judge)
    for step in range(1, 9):
        batch = one.collect(step, seed=7)
        assert batch is not None
        for group in batch.judged:
            assert group.rewards_G == tuple(share(rollout) for rollout in group.rollouts)
    assert judge.num_cancelled > 5
    asked = [question for some in questions(8).values() for question in some]
    assert set(evaluate(one._sampler, asked, 1.0, 3)) == set(TASKS)


def test_who_watches_hears_how_far_the_batch_is_until_it_is_whole():
    heard: list[Progress] = []
    batch = collector(engine_with(WEIGHTS), Judge(1, unknown_share=0.05)).collect(1, 7, tell=heard.append)
    assert batch is not None
    for name in ("num_settled", "num_responses", "num_tokens", "num_replaced"):
        counts = [getattr(one, name) for one in heard]
        assert counts == sorted(counts) and counts[0] == 0 < counts[-1]
    first, last = heard[0], heard[-1]
    assert first.num_running == 5 * 4 and any(one.num_judging for one in heard)  # five groups of four at once
    assert (last.num_settled, last.num_wanted, last.num_running, last.num_judging) == (6, 6, 0, 0)
    tasks = batch.report.tasks.values()
    assert last.num_replaced == sum(one.zero_variance + one.dropped for one in tasks)
    num_judged = sum(len(group.rollouts) for group in batch.judged)
    assert last.num_responses >= num_judged and last.num_tokens >= last.num_responses


def test_who_watches_hears_how_far_an_evaluation_is():
    heard: list[Progress] = []
    sampler = Sampler(engine_with(WEIGHTS), Judge(5), read, Spelled(), MODEL.tokens.ends, 6)  # type: ignore[arg-type]
    evaluate(sampler, [one for some in questions(8).values() for one in some], 1.0, 3, heard.append)
    assert {one.num_wanted for one in heard} == {16}
    assert all(one.num_running + one.num_judging + one.num_settled == 16 for one in heard)
    settled = [one.num_settled for one in heard]
    assert settled == sorted(settled) and len(set(settled)) > 2


def test_a_planted_token_of_another_policy_is_refused_and_counted():
    engine = engine_with(WEIGHTS)
    batch = collector(engine, Judge(1)).collect(1, seed=7)
    assert batch is not None
    batch.groups[2].rollouts[1].versions_T[-1] = 0
    groups, stale = without_stale(batch.groups, 1)
    assert len(groups) == len(batch.groups) - 1
    assert stale == {batch.groups[2].task: 1}


def test_the_batch_has_each_tasks_share_and_only_groups_of_unequal_rewards():
    batch = collector(engine_with(WEIGHTS), Judge(1)).collect(1, seed=7)
    assert batch is not None
    assert Counter(group.task for group in batch.groups) == {"letters": 4, "lengths": 2}
    assert all(group.std > 0.02 and len(group.rollouts) == 4 for group in batch.groups)
    assert len(batch.judged) >= len(batch.groups)


def test_equal_rewards_end_in_an_alarm_and_an_empty_batch_within_the_budget():
    batch = collector(engine_with(WEIGHTS), Judge(1, constant=0.5), refill_budget=2.0).collect(1, seed=7)
    assert batch is not None
    assert batch.groups == () and len(batch.report.alarms) == 2
    assert {task: one.launched for task, one in batch.report.tasks.items()} == {"letters": 8, "lengths": 4}


def test_a_response_without_a_reward_is_never_worth_nothing_but_drops_its_group():
    judge = Judge(1, unknown_share=0.2)
    batch = collector(engine_with(WEIGHTS), judge, refill_budget=20.0).collect(1, seed=7)
    assert batch is not None
    assert set(batch.unknown) == {"deadline"} and 0 < batch.unknown["deadline"] <= judge.num_unknown
    assert all(reward == share(rollout) for group in batch.judged for reward, rollout in zip(
        group.rewards_G, group.rollouts, strict=True))  # fmt: skip


def share(rollout: Rollout) -> float:
    """The reward by ``Judge`` of what the tokens say."""
    token_ids = rollout.token_ids_T[~np.isin(rollout.token_ids_T, MODEL.tokens.ends)]
    return float(np.mean(token_ids % 2)) if len(token_ids) else 0.0


def test_a_stop_gives_every_question_back_and_leaves_nothing_running():
    engine, pool = engine_with(WEIGHTS), QuestionPool(questions(), seed=1)
    calls = iter(range(100))
    assert collector(engine, Judge(1), pool).collect(1, 7, lambda: next(calls) > 2) is None
    assert engine.num_running == 0
    waiting = sum(pool.counts(task).num_waiting for task in TASKS)
    assert waiting > 0
    first = pool.draw("letters").id
    assert first == QuestionPool(questions(), seed=1).draw("letters").id  # the first question is asked first again


def test_a_resumed_collector_asks_what_an_uninterrupted_one_asks_next():
    one = collector(engine_with(WEIGHTS), Judge(1))
    assert one.collect(1, seed=7) is not None
    state = one.state()
    other = collector(engine_with(WEIGHTS), Judge(2))
    other.load_state(state)
    expected, found = one.collect(2, seed=7), other.collect(2, seed=7)
    assert expected is not None and found is not None
    assert [group.question_id for group in found.groups] == [group.question_id for group in expected.groups]


def test_a_prompt_that_does_not_fit_is_left_and_the_next_one_asked():
    def strict(question_id: str):
        if question_id.endswith(("/3", "/5")):
            raise SampleError(question_id, "over_capacity", "too long")
        return read(question_id)

    pool = QuestionPool(questions(8), seed=1)
    one = collector(engine_with(WEIGHTS), Judge(1), pool, read=strict)
    for step in (1, 2, 3):
        assert one.collect(step, seed=7) is not None
    assert set(pool.left()) == {f"{task}/{number}" for task in TASKS for number in (3, 5)}


def test_evaluation_asks_every_question_once_and_leaves_unknown_rewards_out():
    sampler = Sampler(engine_with(WEIGHTS), Judge(5, 0.3), read, Spelled(), MODEL.tokens.ends, 6)  # type: ignore[arg-type]
    asked = [one for some in questions(8).values() for one in some]
    found = evaluate(sampler, asked, temperature=1.0, seed=3)
    assert set(found) == set(TASKS) and all(0 < reward < 1 for reward in found.values())
    constant = Sampler(engine_with(WEIGHTS), Judge(5, 0.3, 0.25), read, Spelled(), MODEL.tokens.ends, 6)  # type: ignore[arg-type]
    assert evaluate(constant, asked, 1.0, 3) == pytest.approx(dict.fromkeys(TASKS, 0.25))


def test_a_held_out_question_that_cannot_be_read_is_left_out_of_the_evaluation_and_ends_no_run(log_lines):
    def strict(question_id: str):
        if question_id.startswith("lengths/") or question_id == "letters/3":
            raise SampleError(question_id, "missing", "its picture is gone")
        return read(question_id)

    sampler = Sampler(engine_with(WEIGHTS), Judge(5, 0.0, 0.25), strict, Spelled(), MODEL.tokens.ends, 6)  # type: ignore[arg-type]
    asked = [one for some in questions(8).values() for one in some]
    heard: list[Progress] = []
    assert evaluate(sampler, asked, 1.0, 3, heard.append) == {"letters": pytest.approx(0.25)}
    assert heard[-1].num_wanted == 7
    assert sum("is left out of this evaluation" in line for line in log_lines) == 9


def test_responses_that_finish_together_are_judged_in_one_request_for_each_kind():
    asked = [question for some in questions(12).values() for question in some]
    judge = Judge(5)
    sampler = Sampler(engine_with(WEIGHTS), judge, read, Spelled(), MODEL.tokens.ends, 6)  # type: ignore[arg-type]
    heard: list[Progress] = []
    evaluate(sampler, asked, 1.0, 3, heard.append)
    num_polls = len({one.num_responses for one in heard})
    assert judge.num_asked <= num_polls < len(asked)  # `count` judges both tasks
