"""Prompts and their rollouts for the simulator: how long a group takes, how it is scored, whether it is valid.

A prompt has a probability of a right answer, drawn from a symmetric beta distribution: most prompts are nearly always
or nearly never solved, as after some training. A response's length is log-normal around its prompt's, which grows with
difficulty; a wrong response is longer, and one that reaches ``max_tokens`` is cut off and wrong. A group is valid if
its answers are neither all right nor all wrong.

What the MiMo-7B report states: 32,768 tokens at most and 41 % passing. All else is guessed, but for two numbers that
are fitted to the idle ratios of its table (docs/rollout-scheduler.md): ``median_tokens`` and ``reward_seconds``.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Workload:
    group_size: int = 16
    max_tokens: int = 32_768
    tokens_per_second: float = 50.0
    """Of one response, however many its worker decodes: decoding waits for memory. Only ratios of times matter."""
    passing_shape: float = 0.18
    """Both parameters of the beta distribution; with the lengths below it makes 41 % of the groups valid."""
    median_tokens: float = 2800.0
    """Of right answers to prompts that are solved half of the time."""
    difficulty: float = 0.4
    """The logarithm of the median rises by this from a prompt solved half of the time to one never solved."""
    prompt_sigma: float = 0.4
    response_sigma: float = 0.45
    wrong_factor: float = 1.3
    """A wrong response is this much longer."""
    reward_seconds: float = 16.0
    """Mean time to score a group; log-normal too, since judging code runs its tests."""
    reward_sigma: float = 1.0


@dataclass(frozen=True)
class Rollouts:
    """One attempt at each of a list of prompts; columns by prompt."""

    generation_seconds: Floats
    """Until the longest of the group's responses ends."""
    reward_seconds: Floats
    mean_tokens: Floats
    """Over the group's responses."""
    is_valid: NDArray[np.bool_]


class Trace:
    """An endless list of prompts, the same for every policy that is given the same seed."""

    def __init__(self, workload: Workload, num_prompts: int, seed: int) -> None:
        self._workload = workload
        self._seed = seed
        random = np.random.default_rng([seed, 0])
        self._passing = random.beta(workload.passing_shape, workload.passing_shape, num_prompts)
        self._center = (
            math.log(workload.median_tokens)
            + workload.difficulty * (1 - 2 * self._passing)
            + workload.prompt_sigma * random.standard_normal(num_prompts)
        )
        self._attempts: list[Rollouts] = []

    def attempt(self, number: int) -> Rollouts:
        """The rollouts of the ``number``-th time that a prompt is generated: the same prompt, other responses."""
        while len(self._attempts) <= number:
            self._attempts.append(self._roll(np.random.default_rng([self._seed, 1 + len(self._attempts)])))
        return self._attempts[number]

    def _roll(self, random: np.random.Generator) -> Rollouts:
        workload = self._workload
        shape = (len(self._passing), workload.group_size)
        is_right = random.random(shape) < self._passing[:, None]
        spread = workload.response_sigma * random.standard_normal(shape)
        logs = self._center[:, None] + spread + np.where(is_right, 0.0, math.log(workload.wrong_factor))
        tokens = np.minimum(np.exp(logs), workload.max_tokens)
        num_right = (is_right & (tokens < workload.max_tokens)).sum(axis=1)
        judged = random.lognormal(-(workload.reward_sigma**2) / 2, workload.reward_sigma, shape[0])
        return Rollouts(
            generation_seconds=tokens.max(axis=1) / workload.tokens_per_second,
            reward_seconds=workload.reward_seconds * judged,
            mean_tokens=tokens.mean(axis=1),
            is_valid=(num_right > 0) & (num_right < workload.group_size),
        )
