"""One batch of rewarded groups: questions drawn, responses sampled, judged as they come, groups chosen by launch order.

Runs on rank 0. What to launch, abort and take is the scheduler's decision (``scheduler/step.py``); which question is
next is the pool's. Invariants: a response without a reward drops its group, which is asked again, and is never worth 0;
what is returned was sampled, whole, by the policy version that the engine said.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_megatron.config.rl import RolloutConfig
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.log import get_logger
from mimo_megatron.reward.wire import ScoreItem, ScoreResult
from mimo_megatron.rl.engine.protocol import GenerationRequest, ReadPrompt, SamplingEngine
from mimo_megatron.rl.groups import RewardedGroup
from mimo_megatron.rl.judging import Judging
from mimo_megatron.rl.pool import QuestionPool
from mimo_megatron.rl.progress import Progress, Tell, tell_nobody
from mimo_megatron.rl.questions import Question
from mimo_megatron.rl.scheduler.rates import PassRates
from mimo_megatron.rl.scheduler.step import Outcome, SchedulerSettings, StepReport, StepScheduler
from mimo_megatron.types import EncodedSample, Rollout

_POLL_SECONDS = 0.05
_MEMORY_GROUPS = 50


@dataclass(frozen=True)
class Sampler:
    """What asking and judging needs; the same for training and evaluation."""

    engine: SamplingEngine
    judging: Judging
    read: ReadPrompt
    tokenizer: TextTokenizer
    end_tokens: Collection[int]
    max_new_tokens: int

    def ask(
        self,
        name: str,
        question: Question,
        num_responses: int,
        *,
        temperature: float,
        seed: int,
        expected_tokens: float = 0.0,
    ) -> None:
        prompt = self.read(question.id)
        request = GenerationRequest(
            name, prompt, num_responses, self.max_new_tokens, temperature, seed, expected_tokens
        )
        self.engine.submit(request)

    def judge(self, finished: Iterable[tuple[Question, Rollout]]) -> None:
        """Have the responses judged, those of each kind in one request: one apiece would cost more than sampling."""
        by_task: dict[str, list[tuple[Question, Rollout]]] = defaultdict(list)
        for question, rollout in finished:
            by_task[question.reward_task].append((question, rollout))
        for several in by_task.values():
            items = [self.item(question, rollout) for question, rollout in several]
            self.judging.ask(items, {rollout.request_id for _, rollout in several})

    def item(self, question: Question, rollout: Rollout) -> ScoreItem:
        """The response as it is judged."""
        return ScoreItem(
            id=f"{rollout.request_id}/{rollout.index}",
            task=question.reward_task,
            response=self.text(rollout),
            gold=question.gold,
            meta=question.meta.model_copy(update={"finish_reason": rollout.finish_reason}),
        )

    def text(self, rollout: Rollout) -> str:
        """The response without the token that ended it."""
        token_ids = rollout.token_ids_T.tolist()
        return self.tokenizer.decode(token_ids[:-1] if token_ids[-1] in self.end_tokens else token_ids)


@dataclass
class _OpenGroup:
    question: Question
    size: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    results: dict[int, ScoreResult] = field(default_factory=dict)

    @property
    def is_generated(self) -> bool:
        return len(self.rollouts) == self.size

    @property
    def is_judged(self) -> bool:
        return len(self.results) == self.size

    def rewarded(self, prompt: EncodedSample) -> RewardedGroup | None:
        """None where some response has no reward."""
        results = [self.results[index] for index in range(self.size)]
        rewards = [result.reward for result in results if result.reward is not None]
        if len(rewards) < self.size:
            return None
        return RewardedGroup(
            question_id=self.question.id,
            task=self.question.task,
            num_prompt_tokens=prompt.num_tokens,
            num_patches=prompt.num_patches,
            rollouts=tuple(self.rollouts[index] for index in range(self.size)),
            rewards_G=tuple(rewards),
            reasons_G=tuple(str(result.reason) for result in results),
        )


@dataclass(frozen=True)
class Collected:
    """A step's batch, and all groups that were judged for it, for curves: those of equal rewards too."""

    groups: tuple[RewardedGroup, ...]
    judged: tuple[RewardedGroup, ...]
    report: StepReport
    unknown: Mapping[str, int]
    """Responses without a reward, by reason."""


class Collector:
    """``collect`` once a step."""

    def __init__(
        self, sampler: Sampler, pool: QuestionPool, rates: PassRates, rollout: RolloutConfig, quotas: Mapping[str, int]
    ) -> None:
        self._sampler, self._pool, self._rates = sampler, pool, rates
        self._rollout, self._quotas = rollout, quotas
        self._lengths: dict[str, int] = {}
        """By question, the longest response of its last group."""
        self._typical: dict[str, float] = {}
        """By task, a moving mean of these, for questions never asked."""

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "pool": self._pool.state(),
            "pass_rates": self._rates.state(),
            "lengths": dict(self._lengths),
            "typical": dict(self._typical),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._pool.load_state(state["pool"])
        self._rates.load_state(state["pass_rates"])
        self._lengths, self._typical = dict(state["lengths"]), dict(state["typical"])

    def collect(
        self, step: int, seed: int, should_stop: Callable[[], bool] = lambda: False, tell: Tell = tell_nobody
    ) -> Collected | None:
        """The groups of one batch; None where it was asked to stop, with everything given back. ``tell`` hears how far
        it is, some times a second."""
        settings = SchedulerSettings(self._quotas, self._rollout.max_groups_running, self._rollout.refill_budget)
        scheduler = StepScheduler(settings, self._rates)
        questions: dict[int, Question] = {}
        groups: dict[int, _OpenGroup] = {}
        judged: dict[int, RewardedGroup] = {}
        unknown: Counter[str] = Counter()
        num_responses = num_tokens = 0
        while not scheduler.is_done:
            if should_stop():
                self._give_back(step, questions, sorted(questions), list(groups))
                return None
            for launch in scheduler.to_launch():
                question = self._draw(launch.task)
                questions[launch.index] = question
                groups[launch.index] = _OpenGroup(question, self._rollout.group_size)
                self._ask(step, launch.index, question, seed)
            tell(self._progress(scheduler.report(), groups.values(), num_responses, num_tokens))
            finished = self._sampler.engine.poll(_POLL_SECONDS)
            for rollout in finished:
                num_responses, num_tokens = num_responses + 1, num_tokens + len(rollout.token_ids_T)
                index = _index(rollout)
                groups[index].rollouts[rollout.index] = rollout
                if groups[index].is_generated:
                    scheduler.generated(index)
            self._sampler.judge((groups[_index(rollout)].question, rollout) for rollout in finished)
            for index in self._take_results(step, groups):
                outcome = self._settle(groups.pop(index), judged, unknown, index)
                scheduler.settle(index, outcome)
            aborted = scheduler.to_abort()
            self._forget(step, aborted)
            for index in aborted:
                groups.pop(index, None)
        tell(self._progress(scheduler.report(), (), num_responses, num_tokens))
        selected = scheduler.selected()
        returned = scheduler.to_return()
        self._give_back(step, questions, returned, [])
        kept = set(questions) - set(returned)
        for index in sorted(kept & set(judged)):
            self._pool.settle(questions[index], judged[index].mean)
        for index in sorted(kept - set(judged)):  # without a reward
            self._pool.give_back(questions[index], is_lost=True)
        return Collected(
            tuple(judged[index] for index in selected), tuple(judged.values()), scheduler.report(), dict(unknown)
        )

    def _progress(
        self, report: StepReport, groups: Iterable[_OpenGroup], num_responses: int, num_tokens: int
    ) -> Progress:
        tasks = report.tasks.values()
        return Progress(
            num_settled=sum(min(one.valid, one.quota) for one in tasks),
            num_wanted=sum(one.quota for one in tasks),
            num_running=self._sampler.engine.num_running,
            num_judging=sum(len(group.rollouts) - len(group.results) for group in groups),
            num_responses=num_responses,
            num_tokens=num_tokens,
            num_replaced=sum(one.zero_variance + one.dropped for one in tasks),
        )

    def _take_results(self, step: int, groups: Mapping[int, _OpenGroup]) -> list[int]:
        """Groups whose last result has come. Waits a little where nothing is being sampled. Results of groups that were
        aborted, in this step or an earlier one, may still come: they are for nobody."""
        is_idle = self._sampler.engine.num_running == 0
        complete = []
        for result in self._sampler.judging.results(_POLL_SECONDS if is_idle else 0.0):
            name, _, number = result.id.rpartition("/")
            of_step, _, index = name.partition("-")
            group = groups.get(int(index)) if of_step == str(step) else None
            if group is None:
                continue
            group.results[int(number)] = result
            if group.is_judged:
                complete.append(int(index))
        return complete

    def _settle(
        self, group: _OpenGroup, judged: dict[int, RewardedGroup], unknown: Counter[str], index: int
    ) -> Outcome:
        unknown.update(str(result.reason) for result in group.results.values() if result.reward is None)
        rewarded = group.rewarded(self._sampler.read(group.question.id))
        if rewarded is None:
            return Outcome.DROPPED
        judged[index] = rewarded
        longest = max(len(one.token_ids_T) for one in rewarded.rollouts)
        self._lengths[rewarded.question_id] = longest
        before = self._typical.get(rewarded.task, longest)
        self._typical[rewarded.task] = before + (longest - before) / _MEMORY_GROUPS
        return Outcome.VALID if rewarded.std > self._rollout.zero_variance_std else Outcome.ZERO_VARIANCE

    def _forget(self, step: int, indexes: Sequence[int]) -> None:
        names = [_name(step, index) for index in indexes]
        if names:
            self._sampler.engine.abort(names)
            self._sampler.judging.cancel(names)

    def _give_back(
        self, step: int, questions: Mapping[int, Question], indexes: Sequence[int], running: Sequence[int]
    ) -> None:
        self._forget(step, running)
        for index in indexes:
            self._pool.give_back(questions[index])

    def _ask(self, step: int, index: int, question: Question, seed: int) -> None:
        self._sampler.ask(
            _name(step, index),
            question,
            self._rollout.group_size,
            temperature=self._rollout.temperature,
            seed=_seed(seed, step, index),
            expected_tokens=self._lengths.get(question.id, self._typical.get(question.task, 0.0)),
        )

    def _draw(self, task: str) -> Question:
        """The next question whose prompt can be read and fits; the others are left, each for its reason."""
        while True:
            question = self._pool.draw(task)
            try:
                self._sampler.read(question.id)
            except SampleError as fault:
                get_logger().warning("%s is left out: %s", question.id, fault)
                self._pool.leave(question, fault.reason)
            else:
                return question


def evaluate(
    sampler: Sampler, questions: Sequence[Question], temperature: float, seed: int, tell: Tell = tell_nobody
) -> dict[str, float]:
    """Mean reward of one response to each question, by task; all are launched at once. Responses without a reward, and
    with a warning questions that cannot be read or do not fit, are left out; a task that has none left is left out."""
    asked: dict[str, Question] = {}
    for place, question in enumerate(questions):
        name = f"evaluation-{place}"
        try:
            sampler.ask(name, question, 1, temperature=temperature, seed=_seed(seed, 0, place))
        except SampleError as fault:
            get_logger().warning("%s is left out of this evaluation: %s", question.id, fault)
        else:
            asked[name] = question
    rewards: dict[str, list[float]] = defaultdict(list)
    num_open = len(asked)
    num_responses = num_tokens = 0
    while num_open:
        num_settled = len(asked) - num_open
        num_judging = num_responses - num_settled
        tell(Progress(num_settled, len(asked), sampler.engine.num_running, num_judging, num_responses, num_tokens))
        finished = sampler.engine.poll(_POLL_SECONDS)
        num_responses += len(finished)
        num_tokens += sum(len(rollout.token_ids_T) for rollout in finished)
        sampler.judge((asked[rollout.request_id], rollout) for rollout in finished)
        for result in sampler.judging.results(_POLL_SECONDS if sampler.engine.num_running == 0 else 0.0):
            name = result.id.rpartition("/")[0]
            if name not in asked:  # of a group that was aborted before
                continue
            num_open -= 1
            if result.reward is not None:
                rewards[asked[name].task].append(result.reward)
    return {task: sum(found) / len(found) for task, found in rewards.items()}


def _name(step: int, index: int) -> str:
    return f"{step}-{index}"


def _index(rollout: Rollout) -> int:
    """Of its group in the step."""
    return int(rollout.request_id.rpartition("-")[2])


def _seed(*numbers: int) -> int:
    """One number of several, none of which reaches 2^24."""
    seed = 0
    for number in numbers:
        seed = (seed << 24) | number
    return seed
