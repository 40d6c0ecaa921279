"""Spreading over ranks against its definition in plain Python, and what must hold for any costs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_megatron import _packing
from mimo_megatron.parallel.spread import loads, spread
from mimo_megatron.parallel.spread_reference import spread_reference

# Small ranges, so that equal costs and equal loads are frequent; and large ones, as FLOPs are.
COSTS = st.one_of(
    st.lists(st.integers(0, 12), max_size=24),
    st.lists(st.integers(0, 10**14), max_size=24),
    st.lists(st.sampled_from([0, 7, 10, 1000]), max_size=24),
)
RANKS = st.integers(1, 6)


@settings(max_examples=500, deadline=None)
@given(COSTS, RANKS)
def test_ranks_are_those_of_the_definition(costs: list[int], num_ranks: int) -> None:
    assert spread(costs, num_ranks) == spread_reference(costs, num_ranks)


@settings(deadline=None)
@given(COSTS, RANKS)
def test_the_most_loaded_rank_has_at_most_what_longest_first_guarantees(costs: list[int], num_ranks: int) -> None:
    """Graham's bound: 4/3 - 1/(3 ranks) of the best possible, which is at least the mean and the largest piece."""
    ranks = spread(costs, num_ranks)
    assert len(ranks) == len(costs) and all(0 <= rank < num_ranks for rank in ranks)
    most = max(loads(costs, ranks, num_ranks))
    best = best_possible(costs, num_ranks) if len(costs) <= 7 else None
    if best is not None:
        assert 3 * num_ranks * most <= (4 * num_ranks - 1) * best


def best_possible(costs: list[int], num_ranks: int) -> int:
    """By trying every assignment."""
    reached = {(0,) * num_ranks}
    for cost in costs:
        reached = {
            tuple(sorted(x + cost * (i == r) for i, x in enumerate(one))) for one in reached for r in range(num_ranks)
        }
    return min(max(one) for one in reached)


@given(COSTS, RANKS, st.randoms(use_true_random=False))
def test_the_order_of_the_pieces_does_not_change_the_loads(costs: list[int], num_ranks: int, random) -> None:
    turned = random.sample(costs, len(costs))
    assert sorted(loads(costs, spread(costs, num_ranks), num_ranks)) == sorted(
        loads(turned, spread(turned, num_ranks), num_ranks)
    )


def test_a_swap_mends_what_longest_first_leaves() -> None:
    """On two ranks longest first gives 7 + 4 + 4 and 6 + 5; swapping 7 for 5 makes both 13."""
    ranks = spread([7, 6, 5, 4, 4], 2)
    assert sorted(loads([7, 6, 5, 4, 4], ranks, 2)) == [13, 13]


@pytest.mark.parametrize(
    ("costs", "num_ranks", "words"),
    [([1], 0, "at least 1"), ([3, -1], 2, "piece 1 costs -1"), ([2**59, 2**59], 2, "above 2\\^60")],
)
def test_what_cannot_be_spread_is_refused(costs: list[int], num_ranks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spread(costs, num_ranks)


def test_only_flat_integers_are_taken() -> None:
    with pytest.raises(TypeError):
        _packing.spread(np.array([0.5]), 2)  # type: ignore[arg-type]
