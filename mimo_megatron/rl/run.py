"""A run of reinforcement learning, set up or resumed: what the cycle's steps are made of.

Questions, pool, rewards and curves live on rank 0. Every rank has the trainer and the publisher, and with the embedded
engine its own engine; prompts are read from disk by each rank that needs them.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist

from mimo_megatron.config.rl import RLConfig
from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.rl.collect import Collected, Collector, Sampler, evaluate
from mimo_megatron.rl.curves import Curves
from mimo_megatron.rl.engine.protocol import ReadPrompt
from mimo_megatron.rl.engine.rounds import Rounds, RoundsEngine
from mimo_megatron.rl.engine.several import SeveralEngines
from mimo_megatron.rl.progress import Progress
from mimo_megatron.rl.questions import Question, encode_question
from mimo_megatron.rl.sync.canary import Gap
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.rl.update import UpdateResult
from mimo_megatron.train.metrics import MetricsWriter
from mimo_megatron.train.saving import Saver
from mimo_megatron.train.signals import StopWish
from mimo_megatron.train.step import Trainer
from mimo_megatron.train.watchdog import Phase, Watchdog
from mimo_megatron.types import EncodedSample

_KEPT_BYTES = 1 << 30


class StepTimes:
    """Seconds of a step's parts, in the order in which they end."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def ends(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._last = now - self._last, now

    @property
    def total(self) -> float:
        return time.perf_counter() - self._began


class Reader:
    """Prompts by question id. The last ones are kept, as far as a gibibyte of pixels reaches: a group's responses are
    packed from one reading."""

    def __init__(
        self, questions: Mapping[str, Question], tokenizer: TextTokenizer, config: RunConfig, rl: RLConfig
    ) -> None:
        self.questions = questions
        self._tokenizer, self._config, self._rl = tokenizer, config, rl
        self._kept: OrderedDict[str, EncodedSample] = OrderedDict()
        self._num_bytes = 0

    def read(self, question_id: str) -> EncodedSample:
        """``SampleError`` where it cannot be read, or does not fit."""
        if question_id not in self._kept:
            question, most = self.questions[question_id], self._rl.rollout.max_new_tokens
            prompt = encode_question(question, self._tokenizer, self._config.model, self._config.data, most)
            self._kept[question_id] = prompt
            self._num_bytes += _num_bytes(prompt)
        self._kept.move_to_end(question_id)
        found = self._kept[question_id]
        while self._num_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._num_bytes -= _num_bytes(self._kept.popitem(last=False)[1])
        return found


def _num_bytes(prompt: EncodedSample) -> int:
    return prompt.token_ids_T.nbytes + sum(one.pixels_PZ.nbytes for one in prompt.media)


@dataclass
class Head:
    """What only rank 0 has."""

    sampler: Sampler
    engine: RoundsEngine
    collector: Collector
    curves: Curves
    held_out: Sequence[Question]
    metrics: MetricsWriter

    def at_rollout(self, step: int, progress: Progress) -> None:
        """Show it. Rewards are a phase of their own where they are all that the batch waits for."""
        self.metrics.at(step, "rollout" if progress.num_running else "rewards", progress.words("groups"))

    def at_evaluation(self, step: int, progress: Progress) -> None:
        self.metrics.at(step, "evaluation", progress.words("questions"))


@dataclass
class Run:
    config: RunConfig
    rl: RLConfig
    trainer: Trainer
    publisher: Publisher
    engines: SeveralEngines | None
    """This rank's; of vLLM all are rank 0's."""
    read: ReadPrompt
    canary: Sequence[EncodedSample]
    reference: Sequence[VisionLanguageModel] | None
    watchdog: Watchdog
    wish: StopWish
    rounds: Rounds = field(init=False)
    saver: Saver = field(init=False)
    head: Head | None = None
    version: int = -1
    gaps: tuple[Gap, ...] = ()
    _step: int = 0

    def watch(self, step: int, phase: Phase, shown: str = "") -> None:
        """``shown``: what a terminal calls the phase, where it has another name there."""
        self._step = step
        self.watchdog.at(step, phase)
        if self.head is not None:
            self.head.metrics.at(step, shown or phase)

    def at_round(self) -> None:
        """A round of sampling has begun: the ranks move."""
        self.watchdog.at(self._step, "rollout")

    def at_optimizer(self, step: int) -> Callable[[], None]:
        return partial(self.watchdog.at, step, "optimizer")

    def rollout(self, step: int) -> Collected | None:
        """The step's batch, on every rank; None on all of them where a signal asked rank 0 to stop."""
        collected: list[Collected | None] = [None]
        if self.head is None:
            self.rounds.follow()
        else:
            tell = partial(self.head.at_rollout, step)
            collected = [self.head.collector.collect(step, self.config.seed, lambda: bool(self.wish.name), tell)]
            self.head.engine.finish()
        dist.broadcast_object_list(collected, src=0)
        return collected[0]

    def evaluate(self, step: int) -> None:
        """Ask the held-out questions, where they are due after ``step``, and tell the curves."""
        every = self.rl.evaluation.every_steps
        if not every or (step % every and step != self.config.train.steps):
            return
        self.watch(step, "rollout", "evaluation")
        head, temperature = self.head, self.rl.evaluation.temperature
        if head is None:
            self.rounds.follow()
            return
        tell = partial(head.at_evaluation, step)
        found = evaluate(head.sampler, head.held_out, temperature, self.config.seed, tell)
        head.engine.finish()
        head.curves.evaluated(step, found)

    def tell(
        self, step: int, batch: Collected, update: UpdateResult | None, num_stale: Mapping[str, int], times: StepTimes
    ) -> None:
        self.watch(step, "metrics")
        if self.head is not None:
            self.head.curves.step(step, batch, update, num_stale, self.gaps, times.seconds, times.total)

    def save(self, step: int, *, wait: bool = False) -> None:
        """Where a checkpoint is due after ``step``; with ``wait`` always, and it is whole on return."""
        self.watch(step, "save")
        self.saver.check()
        every = self.config.train.checkpoint.every_steps
        if step and (wait or step == self.config.train.steps or (every and step % every == 0)):
            self.saver.save(step, wait=wait)

    def announce(self, event: str, step: int, detail: str) -> None:
        if self.head is not None:
            self.head.curves.event(event, step, detail)

    def state(self) -> dict[str, Any]:
        """For the checkpoint, beside weights and step."""
        if self.head is None:
            return {}
        return {"rl": self.head.collector.state()}
