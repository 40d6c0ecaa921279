"""Where a sample is placed - pack, microbatch, data-parallel rank - changes neither loss nor gradient."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from mimo_megatron.data.collate import collate
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.prove.cases import FEATURES, ONE, Layout, run_config
from mimo_megatron.prove.material import PACKS
from mimo_megatron.prove.measure import gradients, relative
from mimo_megatron.types import EncodedSample
from tests.harness import run_ranks

SLOTS = 192
Arrangement = list[list[list[EncodedSample]]]
"""Of every data-parallel rank, its packs."""


def arrangements(dp: int, number: int) -> list[Arrangement]:
    """Random ones of all samples of the mixed packs and those with odd segments, over 4 to 8 packs."""
    samples = [sample for name in ("mixed", "odd_segments") for pack in PACKS[name] for sample in pack]
    draw = np.random.default_rng(3)
    found = []
    while len(found) < number:
        num_packs = dp * int(draw.integers(4 // dp, 8 // dp + 1))
        packs: list[list[EncodedSample]] = [[] for _ in range(num_packs)]
        for sample in draw.permutation(len(samples)):
            packs[draw.integers(num_packs)].append(samples[sample])
        if all(packs) and max(sum(one.num_tokens for one in pack) for pack in packs) <= SLOTS:
            found.append([packs[rank::dp] for rank in range(dp)])
    return found


def outcomes(address: RankAddress, many: list[Arrangement]) -> list[tuple[float, int, dict[str, Tensor]]]:
    config = run_config(Layout("", address.world_size), FEATURES[0])
    with megatron(config.parallel, address) as mesh:
        return [
            gradients(config, mesh, [collate(pack, config.model, SLOTS) for pack in ranks[mesh.dp.rank]])
            for ranks in many
        ]


def largest_error(got: tuple[float, int, dict[str, Tensor]], want: tuple[float, int, dict[str, Tensor]]) -> float:
    assert got[1] == want[1]
    errors = [relative(got[2][name] - want[2][name], want[2][name]) for name in want[2]]
    return max(abs(got[0] / want[0] - 1), *errors)


@pytest.fixture(scope="module")
def as_given() -> Any:
    return run_ranks(outcomes, ONE.ranks, arrangements(1, 1))[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("dp, number", [(1, 10), (2, 6)])
def test_permuting_samples_over_packs_microbatches_and_ranks_changes_nothing(dp, number, as_given):
    for rank in run_ranks(outcomes, dp, arrangements(dp, number)):
        assert max(largest_error(got, as_given) for got in rank) < 1e-12


def test_a_label_trained_in_anothers_place_is_noticed(as_given):
    """As many tokens as before, one of them another."""
    (ranks,) = arrangements(1, 1)
    packs = [list(pack) for pack in ranks[0]]
    first = packs[0][0]
    mask = first.loss_mask_T.copy()
    trained, other = int(mask.nonzero()[0][0]), int((~mask[1:]).nonzero()[0][-1]) + 1
    mask[[trained, other]] = mask[[other, trained]]
    packs[0][0] = replace(first, loss_mask_T=mask)
    got = run_ranks(outcomes, 1, [[packs]])[0][0]
    assert got[1] == as_given[1] and largest_error(got, as_given) > 1e-3
