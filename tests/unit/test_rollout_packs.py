"""The packs of an update: every response once, the same number on every rank, questions with pictures held together."""

import numpy as np
import pytest

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.rl.groups import PolicyRow
from mimo_megatron.rl.update import rollout_packs
from mimo_megatron.types import Rollout
from tests.samples import run_config, tiny_model

NOTHING = Rollout("", 0, np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64), "stop")


def row(question: str, num_tokens: int, num_patches: int = 0) -> PolicyRow:
    return PolicyRow(question, NOTHING, num_tokens, num_patches, 0.0, 1.0)


def config(pack_tokens: int = 256, pack_patches: int = 64, parallel: ParallelConfig = ParallelConfig()):  # noqa: B008
    found = run_config(tiny_model(), parallel=parallel)
    sizes = {"pack_tokens": pack_tokens, "pack_patches": pack_patches}
    return found.model_copy(update={"data": found.data.model_copy(update=sizes)})


def places(packs: list[list[int]], rows: list[PolicyRow], question: str) -> int:
    """How many packs hold responses to the question."""
    return sum(any(rows[number].question_id == question for number in pack) for pack in packs)


def test_every_response_is_in_one_pack_and_none_is_over_its_tokens():
    draw = np.random.default_rng(0)
    rows = [row(f"q{number // 8}", int(draw.integers(5, 200)), 16 * (number % 16 < 8)) for number in range(64)]
    packs = rollout_packs(rows, config(), 2)
    assert sorted(number for pack in packs for number in pack) == list(range(64))
    assert len(packs) % 2 == 0
    for pack in packs:
        assert sum(rows[number].num_tokens for number in pack) <= 256
        assert sum({rows[number].question_id: rows[number].num_patches for number in pack}.values()) <= 64


def test_responses_to_one_picture_share_a_pack_whose_patches_count_once():
    rows = [row(f"q{number // 8}", 8, 64) for number in range(32)]
    packs = rollout_packs(rows, config(), 1)
    assert sorted(packs) == [list(range(start, start + 8)) for start in range(0, 32, 8)]


def test_long_responses_are_held_together_only_up_to_a_quarter_of_a_pack():
    rows = [row("q", 100, 16) for _ in range(5)]
    packs = rollout_packs(rows, config(), 1)
    assert [len(pack) for pack in packs] == [2, 2, 1]


def test_responses_without_a_picture_are_packed_one_by_one():
    rows = [row("q", 30) for _ in range(2)] + [row("r", 196)]
    assert places(rollout_packs(rows, config(), 1), rows, "q") == 1
    rows = [row("q", 30) for _ in range(2)] + [row("r", 226), row("s", 226)]
    assert places(rollout_packs(rows, config(), 1), rows, "q") == 2  # each fills up another pack


@pytest.mark.parametrize(("parallel", "num_dp", "expected"), [
    (ParallelConfig(), 4, 4), (ParallelConfig(pp=2), 3, 3), (ParallelConfig(pp=2, vpp=2), 3, 6),
])  # fmt: skip
def test_every_rank_gets_as_many_packs_as_its_schedule_needs(parallel, num_dp, expected):
    assert len(rollout_packs([row("q", 10)], config(parallel=parallel), num_dp)) == expected
