"""Advantages within a group, the weights of tokens, and the refusal of what another policy sampled."""

from dataclasses import replace

import numpy as np
import pytest

from mimo_megatron.config.rl import AlgorithmConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.rl.groups import (
    RewardedGroup,
    advantages,
    policy_rows,
    policy_sample,
    token_weights,
    without_stale,
)
from mimo_megatron.types import Rollout
from tests.rl_fixtures import MODEL, prompts

NORMALISERS = ("group-token-mean", "token-mean", "sequence-mean", "constant")


def group(rewards: tuple[float, ...], lengths: tuple[int, ...], version: int = 3, task: str = "count") -> RewardedGroup:
    prompt = prompts()[1]
    rollouts = tuple(
        Rollout("", index, np.arange(20, 20 + length), -np.ones(length), np.full(length, version), "stop")
        for index, length in enumerate(lengths)
    )
    return RewardedGroup(
        prompt.id, task, prompt.num_tokens, prompt.num_patches, rollouts, rewards, ("",) * len(rewards)
    )


def test_advantages_are_the_rewards_distances_from_the_mean_in_standard_deviations():
    assert advantages((0.0, 1.0, 1.0, 0.0), 0.02).tolist() == [-1, 1, 1, -1]


def test_a_group_of_equal_rewards_has_no_advantage():
    assert not advantages((0.7, 0.7, 0.7), 0.02).any()


def test_adding_a_number_to_all_rewards_changes_nothing():
    np.testing.assert_allclose(advantages((0.1, 0.4, 0.2), 0.02), advantages((0.6, 0.9, 0.7), 0.02), atol=1e-12)


def test_differences_below_the_floor_stay_small():
    assert np.abs(advantages((0.5, 0.5001), std_floor=0.02)).max() == pytest.approx(0.0025)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_the_weighted_mean_over_all_tokens_is_the_normalisers_mean(normaliser):
    groups = [group((0, 1), (3, 5)), group((0, 1, 1), (2, 8, 1))]
    terms = [[1.0, 2.0], [3.0, 4.0, 5.0]]  # one number for all tokens of a response
    weights = token_weights(groups, AlgorithmConfig(normaliser=normaliser), max_new_tokens=10)
    total = sum(
        weight * term * len(rollout.token_ids_T)
        for one, of_group, numbers in zip(groups, weights, terms, strict=True)
        for rollout, weight, term in zip(one.rollouts, of_group, numbers, strict=True)
    )
    sums = [3 * 1 + 5 * 2, 2 * 3 + 8 * 4 + 1 * 5]
    expected = {
        "group-token-mean": (sums[0] / 8 + sums[1] / 11) / 2,
        "token-mean": sum(sums) / 19,
        "sequence-mean": (1 + 2 + 3 + 4 + 5) / 5,
        "constant": sum(sums) / (5 * 10),
    }
    assert total / 19 == pytest.approx(expected[normaliser])


def test_columns_stand_where_the_tokens_are_predicted():
    prompt = prompts()[1]
    rows = policy_rows([group((0.0, 1.0), (3, 2))], AlgorithmConfig(), 10)
    samples = [policy_sample(prompt, row, number) for number, row in enumerate(rows)]
    batch = collate(samples, MODEL, sum(one.num_tokens for one in samples) + 5)
    trained = batch.loss_weights_S.nonzero().squeeze(-1)
    assert len(trained) == 5
    assert batch.labels_S[trained].tolist() == [20, 21, 22, 20, 21]
    assert batch.columns["advantage"][trained].tolist() == [-1, -1, -1, 1, 1]
    assert batch.columns["row"][trained].tolist() == [0, 0, 0, 1, 1]
    assert (batch.columns["engine_logprob"][trained] == -1).all()
    for column_S in batch.columns.values():
        assert not column_S[batch.loss_weights_S == 0].any()


def test_a_group_with_one_token_of_another_policy_is_refused_and_counted():
    fresh, stale = group((0, 1), (3, 2)), group((0, 1), (3, 2), task="box")
    stale.rollouts[1].versions_T[0] = 2
    assert without_stale([fresh, stale], version=3) == ([fresh], {"box": 1})
    assert without_stale([fresh, replace(stale, task="box")], version=2)[0] == []
