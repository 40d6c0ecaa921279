"""Which question is asked next, task by task.

Each task has an ordinary stream, its questions in a new seeded order every epoch; a queue of questions whose groups
came to nothing, which goes before the stream; and an easy pool. A question whose group reaches ``easy_mean`` leaves
the stream for the easy pool, from which a draw takes with probability ``easy_share`` (10 % in MiMo-7B's report,
https://arxiv.org/abs/2505.07608); one that fails later comes back. Where every question of a task is easy, all draws
take easy ones: a task never runs dry, and its curve says why it teaches little.

Invariants: draws are a function of (seed, questions, what was drawn, settled and given back); no question is lost: each
is in the stream, easy, waiting, out, or left with a reason; a pool that loads a state goes on as the one that saved it,
after asking again what was out.
"""

import math
import zlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.rl.questions import Question, fingerprint

_ROUNDING = 1e-9  # 0.1 * 3 / 0.3 is below 1
LOST_TOO_OFTEN = "lost"


@dataclass(frozen=True)
class PoolCounts:
    """One task's questions, for curves."""

    num_questions: int
    num_easy: int
    num_waiting: int
    """Given back, to be asked before all others."""
    left: Mapping[str, int]
    """Never asked again, by reason."""
    epoch: int


class QuestionPool:
    """The questions of all tasks. One process owns it; the others are told what was drawn."""

    def __init__(
        self,
        questions: Mapping[str, Sequence[Question]],
        *,
        seed: int,
        easy_mean: float = 0.9,
        easy_share: float = 0.1,
        max_attempts: int = 3,
    ) -> None:
        self._seed = seed
        self._easy_mean = easy_mean
        self._max_attempts = max_attempts
        self._tasks = {task: _TaskPool(task, own, seed, easy_share) for task, own in questions.items()}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._tasks)

    def draw(self, task: str) -> Question:
        """The question to ask next; ``settle``, ``give_back`` or ``leave`` must follow. A small task may be asked a
        question anew while it is still out. ``DataError`` where every question of the task is left."""
        return self._tasks[task].draw()

    def settle(self, question: Question, mean_reward: float) -> None:
        """Its group was judged."""
        own, number = self._find(question)
        own.return_(number)
        own.num_lost.pop(number, None)
        if mean_reward >= self._easy_mean and number not in own.left:
            own.easy.add(number)
        else:
            own.easy.discard(number)

    def give_back(self, question: Question, *, is_lost: bool = False) -> None:
        """Its group came to nothing: it is asked again, before all that were never asked.

        ``is_lost``: by a fault, and after ``max_attempts`` of these in a row it is left. An abort, because the batch
        was full, says nothing against a question; to leave those would drop the questions with long answers.
        """
        own, number = self._find(question)
        own.return_(number)
        own.num_lost[number] += is_lost
        if own.num_lost[number] >= self._max_attempts:
            own.leave(number, LOST_TOO_OFTEN)
        elif number not in own.waiting:
            own.waiting.append(number)

    def leave(self, question: Question, reason: str) -> None:
        """It cannot be asked, for a reason of one word under which it is counted."""
        own, number = self._find(question)
        own.return_(number)
        own.leave(number, reason)

    def counts(self, task: str) -> PoolCounts:
        own = self._tasks[task]
        waiting = sum(number not in own.left for number in own.waiting)
        return PoolCounts(len(own.questions), len(own.easy), waiting, Counter(own.left.values()), own.epoch)

    def left(self) -> dict[str, str]:
        """Why each question that is left was left, by id."""
        return {own.questions[number].id: reason for own in self._tasks.values() for number, reason in own.left.items()}

    def state(self) -> dict[str, Any]:
        """Plain JSON: numbers of questions, no texts."""
        return {"seed": self._seed, "tasks": {task: own.state() for task, own in self._tasks.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. ``ConfigError`` if it is of other questions."""
        now = {task: own.fingerprint for task, own in self._tasks.items()}
        saved = {task: one["fingerprint"] for task, one in state["tasks"].items()}
        changed = sorted(task for task in now.keys() | saved.keys() if now.get(task) != saved.get(task))
        problems = [f"questions of {', '.join(changed)}"] if changed else []
        if state["seed"] != self._seed:
            problems.append(f"seed: saved {state['seed']}, now {self._seed}")
        if problems:
            raise ConfigError(
                f"the questions cannot be resumed, since they changed ({'; '.join(problems)}): restore rl.prompts and "
                "the seed, or start a new run from this one's checkpoint"
            )
        for task, own in self._tasks.items():
            own.load_state(state["tasks"][task])

    def _find(self, question: Question) -> tuple["_TaskPool", int]:
        own = self._tasks[question.task]
        return own, own.number_of[question.id]


class _TaskPool:
    """One task: questions by number."""

    def __init__(self, task: str, questions: Sequence[Question], seed: int, easy_share: float) -> None:
        assert questions and all(one.task == task for one in questions), task
        self.questions = questions
        self.number_of = {one.id: number for number, one in enumerate(questions)}
        assert len(self.number_of) == len(questions), f"two questions of {task} have one id"
        self.fingerprint = fingerprint(questions)
        self.epoch = 0
        self.easy: set[int] = set()
        self.left: dict[int, str] = {}
        """Never easy too."""
        self.waiting: deque[int] = deque()
        self.out: list[int] = []
        """Drawn, and not heard of since; in order of drawing."""
        self.num_lost: Counter[int] = Counter()
        self._task = task
        self._easy_share = easy_share
        self._seed = (seed, zlib.crc32(task.encode()))
        self._consumed = 0
        """Places of this epoch's order that were passed."""
        self._num_fresh = 0
        """Draws that were not of waiting questions: the number of the next one's dice."""
        self._order_N = self._order()

    def draw(self) -> Question:
        number = self._next()
        self.out.append(number)
        return self.questions[number]

    def return_(self, number: int) -> None:
        assert number in self.out, f"{self.questions[number].id} was not drawn"
        self.out.remove(number)

    def leave(self, number: int, reason: str) -> None:
        self.left[number] = reason
        self.easy.discard(number)

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "consumed": self._consumed,
            "num_fresh": self._num_fresh,
            "easy": sorted(self.easy),
            "left": {str(number): reason for number, reason in self.left.items()},
            "waiting": list(dict.fromkeys([*self.out, *self.waiting])),
            "num_lost": {str(number): count for number, count in self.num_lost.items() if count},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.epoch, self._consumed, self._num_fresh = state["epoch"], state["consumed"], state["num_fresh"]
        self._order_N = self._order()
        self.easy = set(state["easy"])
        self.left = {int(number): reason for number, reason in state["left"].items()}
        self.waiting, self.out = deque(state["waiting"]), []
        self.num_lost = Counter({int(number): count for number, count in state["num_lost"].items()})

    def _next(self) -> int:
        if len(self.left) == len(self.questions):
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.left.values()).items())
            raise DataError(f"task {self._task}: all {len(self.questions)} questions are left ({reasons}); none to ask")
        while self.waiting:
            if (number := self.waiting.popleft()) not in self.left:
                return number
        rng = np.random.default_rng((*self._seed, 1, self._num_fresh))
        self._num_fresh += 1
        is_all_easy = len(self.easy) + len(self.left) == len(self.questions)
        if self.easy and (rng.random() < self._easy_share or is_all_easy):
            return sorted(self.easy)[rng.integers(len(self.easy))]
        return self._next_of_stream()

    def _next_of_stream(self) -> int:
        """At least one question is neither easy nor left."""
        while True:
            if self._consumed == len(self._order_N):
                self.epoch, self._consumed = self.epoch + 1, 0
                self._order_N = self._order()
            number = int(self._order_N[self._consumed])
            self._consumed += 1
            if number not in self.easy and number not in self.left:
                return number

    def _order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng((*self._seed, 0, self.epoch)).permutation(len(self.questions))


def quotas(ratios: Mapping[str, float], groups_per_step: int) -> dict[str, int]:
    """Groups of a step by task, in proportion to ``ratios``; what rounding leaves goes to the largest remainders.

    ``ConfigError`` where a task's share is less than one group: it would be in no batch, or in some by chance.
    """
    total = sum(ratios.values())
    shares = {task: groups_per_step * ratio / total + _ROUNDING for task, ratio in ratios.items()}
    if small := [task for task, share in shares.items() if share < 1]:
        least = math.ceil(total / min(ratios.values()) - _ROUNDING)
        raise ConfigError(
            f"rl.rollout.groups_per_step ({groups_per_step}) gives {', '.join(small)} less than one group of a step: "
            f"set it to {least} at least, or raise the ratio of their prompts"
        )
    found = {task: math.floor(share) for task, share in shares.items()}
    by_remainder = sorted(shares, key=lambda task: found[task] - shares[task])
    for task in by_remainder[: groups_per_step - sum(found.values())]:
        found[task] += 1
    return found
