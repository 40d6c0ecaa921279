"""The rules of the section ``rl``: each fires alone, and what is right is accepted."""

from pathlib import Path
from typing import Any

import pytest

from mimo_megatron.config.check import check
from mimo_megatron.config.check_rl import RL_RULES
from mimo_megatron.config.load import load_recipe
from mimo_megatron.errors import ConfigError
from tests.unit.test_config import failed, rl_recipe


@pytest.mark.parametrize(
    ("rule", "overrides"),
    [
        ("the_policy_is_what_is_sampled", ["rl.rollout.temperature=0.9"]),
        ("the_policy_is_what_is_sampled", ["rl.rollout.top_p=0.95", "rl.algorithm.name=grpo"]),
        ("on_policy_is_one_update_without_kl", ["rl.algorithm.updates_per_batch=2"]),
        ("on_policy_is_one_update_without_kl", ["rl.algorithm.kl_weight=0.01", "start_from=a"]),
        ("evaluation_is_sampled_or_greedy", ["rl.evaluation.temperature=0.5"]),
        ("the_divergence_is_from_a_start", ["rl.algorithm={name: grpo, kl_weight: 0.01}"]),
        ("a_group_fits_an_engine", ["rl.rollout.group_size=65"]),
        ("one_service_judges", ["rl.reward={url: 'http://localhost:8100', folder: a}"]),
        ("tasks_have_a_name_each", ["rl.prompts.0.task=chat"]),
        ("each_task_has_a_group_in_every_step", ["rl.prompts.1.ratio=3.1"]),
        ("responses_fit", ["rl.rollout.max_new_tokens=512"]),
        ("responses_fit", ["rl.rollout.engine=vllm", "rl.vllm={python: python, max_model_len: 24}"]),
        ("vllm_is_found", ["rl.rollout.engine=vllm"]),
        ("reward_models_are_found", ["rl.reward.text_model=null"]),
        ("reward_models_are_found", ["rl.prompts.0.reward=rm_multimodal"]),
        ("the_policy_writes_text", ["model.text.head=reward"]),
        ("no_prediction_layers", ["model.text.num_mtp_layers=1"]),
        ("evaluation_has_questions", ["rl.evaluation.every_steps=5"]),
    ],
)
def test_each_rule_of_rl_fires_alone(tmp_path: Path, rule: str, overrides: list[str]) -> None:
    path = rl_recipe(tmp_path)
    check(load_recipe(path), 1)
    config = load_recipe(path, overrides)
    assert config.rl is not None and failed(path, 1, *overrides) == set()
    assert {one.__name__ for one in RL_RULES if list(one(config.rl, config))} == {rule}
    with pytest.raises(ConfigError, match="1 mistake\n"):
        check(config, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl.algorithm={name: grpo, updates_per_batch: 4, kl_weight: 0.01}", "start_from=a"],
        ["rl.rollout.engine=vllm", "rl.vllm.python=.vllm-env/bin/python"],
        ["rl.reward={url: 'http://localhost:8100', text_model: null}"],
        ["rl.evaluation.every_steps=5", "rl.prompts.0.held_out=c.jsonl"],
        ["train.packs_per_step=3"],
        ["parallel={pp: 2, vpp: 2}", "train.packs_per_step=3"],
    ],
)
def test_rl_may_be_so(tmp_path: Path, overrides: list[str]) -> None:
    """Packs of a step are not counted before there are any: rollouts fill them."""
    check(load_recipe(rl_recipe(tmp_path), overrides), 8)


def test_all_rules_of_rl_are_tested() -> None:
    marks: Any = test_each_rule_of_rl_fires_alone
    assert {case[0] for case in marks.pytestmark[0].args[1]} == {rule.__name__ for rule in RL_RULES}
