"""Rewarded groups of responses, and what each of their tokens weighs in the update.

Source: Shao et al. 2024 (GRPO) for advantages within a group; the MiMo-VL report, section 3.3, for the mean over all
tokens of a group. Invariants: adding a number to all rewards of a group changes nothing; a group of equal rewards gives
zeros; the weights of a batch depend on the whole batch and not on how it is packed or dealt out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.rl import AlgorithmConfig
from mimo_megatron.types import EncodedSample, Rollout


@dataclass(frozen=True)
class RewardedGroup:
    """The responses to one question, all of them with a reward."""

    question_id: str
    task: str
    num_prompt_tokens: int
    num_patches: int
    rollouts: tuple[Rollout, ...]
    rewards_G: tuple[float, ...]
    reasons_G: tuple[str, ...]
    """Why each reward is as it is (``reward/verdict.py``)."""

    @property
    def num_tokens(self) -> int:
        """Of all responses."""
        return sum(len(one.token_ids_T) for one in self.rollouts)

    @property
    def mean(self) -> float:
        return float(np.mean(self.rewards_G))

    @property
    def std(self) -> float:
        """Of the population."""
        return float(np.std(self.rewards_G))


def advantages(rewards_G: Sequence[float], std_floor: float) -> NDArray[np.float64]:
    """[G] (reward - mean) / max(std, std_floor). The floor keeps differences of 1e-4 between continuous rewards from
    becoming advantages of 1."""
    rewards = np.asarray(rewards_G, np.float64)
    if np.ptp(rewards) == 0:  # whose mean may be off by a rounding
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / max(float(rewards.std()), std_floor)


def token_weights(
    groups: Sequence[RewardedGroup], algorithm: AlgorithmConfig, max_new_tokens: int
) -> list[NDArray[np.float64]]:
    """[G] of each group: the weight of every token of a response, so that the sum over all tokens of weight x term,
    divided by the number of tokens, is the batch's objective."""
    num_tokens = sum(group.num_tokens for group in groups)
    num_responses = sum(len(group.rollouts) for group in groups)
    weigh: dict[str, Callable[[RewardedGroup, int], float]] = {
        "group-token-mean": lambda group, length: num_tokens / (len(groups) * group.num_tokens),
        "token-mean": lambda group, length: 1.0,
        "sequence-mean": lambda group, length: num_tokens / (num_responses * length),
        "constant": lambda group, length: num_tokens / (num_responses * max_new_tokens),
    }
    of = weigh[algorithm.normaliser]
    return [np.array([of(group, len(one.token_ids_T)) for one in group.rollouts]) for group in groups]


@dataclass(frozen=True)
class PolicyRow:
    """One response of a batch as it will be trained; its prompt is read where it is packed."""

    question_id: str
    rollout: Rollout
    num_tokens: int
    """With its prompt."""
    num_patches: int
    advantage: float
    weight: float


def policy_rows(groups: Sequence[RewardedGroup], algorithm: AlgorithmConfig, max_new_tokens: int) -> list[PolicyRow]:
    """Every response of the groups, group after group."""
    return [
        PolicyRow(
            group.question_id,
            rollout,
            group.num_prompt_tokens + len(rollout.token_ids_T),
            group.num_patches,
            float(advantage),
            float(weight),
        )
        for group, weights_G in zip(groups, token_weights(groups, algorithm, max_new_tokens), strict=True)
        for rollout, advantage, weight in zip(
            group.rollouts, advantages(group.rewards_G, algorithm.std_floor), weights_G, strict=True
        )
    ]


def policy_sample(prompt: EncodedSample, row: PolicyRow, number: int) -> EncodedSample:
    """Prompt and response as one sample. Its columns: the response's ``advantage`` and ``weight``, the
    ``engine_logprob`` of each token, and ``row``, its number in the batch."""
    response_T = row.rollout.token_ids_T
    num_prompt, num_tokens = prompt.num_tokens, prompt.num_tokens + len(response_T)
    is_response_T = np.arange(num_tokens) >= num_prompt
    engine_T = np.concatenate([np.zeros(num_prompt, np.float32), row.rollout.logprobs_T])
    columns = {
        "advantage": is_response_T * row.advantage,
        "weight": is_response_T * row.weight,
        "row": is_response_T * float(number),
        "engine_logprob": engine_T,
    }
    return replace(
        prompt,
        id=f"{row.question_id}#{row.rollout.index}",
        token_ids_T=np.concatenate([prompt.token_ids_T, response_T]),
        loss_mask_T=is_response_T,
        columns={name: column_T.astype(np.float32) for name, column_T in columns.items()},
    )


def without_stale(groups: Sequence[RewardedGroup], version: int) -> tuple[list[RewardedGroup], Counter[str]]:
    """The groups whose every token was sampled by policy ``version``, and how many of each task were not."""
    fresh, stale = [], Counter[str]()
    for group in groups:
        if all((one.versions_T == version).all() for one in group.rollouts):
            fresh.append(group)
        else:
            stale[group.task] += 1
    return fresh, stale
