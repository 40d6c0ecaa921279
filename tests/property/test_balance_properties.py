"""Balanced packs and dealing: the C++ gives the definition's answer, and the definition keeps its promises."""

import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_megatron import _packing
from mimo_megatron.data.balance import SampleCosts, deal, pack_balanced
from mimo_megatron.data.balance_reference import deal_reference, pack_balanced_reference
from mimo_megatron.data.packing_reference import check_packs
from mimo_megatron.data.source import SampleLengths
from mimo_megatron.errors import DataError

TOKENS, PATCHES = 100, 64

_SAMPLE = st.tuples(
    st.integers(0, TOKENS), st.just(0) | st.integers(0, PATCHES), st.integers(0, 1000), st.integers(0, 300)
)
_SAMPLES = st.lists(_SAMPLE, max_size=60)
_CAPACITIES = st.tuples(st.integers(TOKENS, 300), st.integers(PATCHES, 200))


def columns(samples):
    return np.array(samples, np.int64).reshape(-1, 4).T


def packed(samples, capacities):
    tokens, patches, *costs = columns(samples)
    return pack_balanced(SampleLengths(tokens, patches), SampleCosts(*costs), *capacities)


@settings(max_examples=300)
@given(samples=_SAMPLES, capacities=_CAPACITIES)
def test_packs_are_those_of_the_definition(samples, capacities):
    packs = packed(samples, capacities)
    reference = pack_balanced_reference(*(column.tolist() for column in columns(samples)), *capacities)
    assert packs.offsets.tolist() == reference.offsets.tolist()
    assert packs.items.tolist() == reference.items.tolist()


@given(samples=_SAMPLES, capacities=_CAPACITIES)
def test_every_sample_is_in_one_pack_and_no_pack_exceeds_a_capacity(samples, capacities):
    tokens, patches, *_ = columns(samples)
    check_packs(packed(samples, capacities), (tokens, capacities[0]), (patches, capacities[1]))


@settings(max_examples=60)
@given(
    packs=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 3000)), min_size=1, max_size=6),
    num_ranks=st.integers(1, 4),
)
def test_ranks_are_those_of_the_definition(packs, num_ranks):
    costs, vision = zip(*packs * num_ranks, strict=True)
    ranks = _packing.deal(np.array(costs), np.array(vision), num_ranks, 300).tolist()
    assert ranks == deal_reference(costs, vision, num_ranks, 300)


@given(
    costs=st.lists(st.integers(0, 10**9), min_size=1, max_size=24),
    num_ranks=st.integers(1, 8),
)
def test_every_pack_goes_to_one_rank_and_every_rank_gets_equally_many(costs, num_ranks):
    costs = costs[: len(costs) // num_ranks * num_ranks]
    held = deal(costs, [0] * len(costs), num_ranks)
    assert {len(packs) for packs in held} == {len(costs) // num_ranks}
    assert sorted(itertools.chain(*held)) == list(range(len(costs)))


def test_a_heavy_pack_gets_light_companions():
    costs = [16, 10, 10, 10, 10, 8, 8, 8]
    assert [sum(costs[pack] for pack in packs) for packs in deal(costs, [0] * 8, 2)] == [40, 40]


@pytest.mark.parametrize("vision", [[4, 4, 0, 0], [4, 0, 4, 0], [4, 0, 0, 4]])
def test_vision_is_level_apart_where_costs_are_equal(vision):
    assert [sum(vision[pack] for pack in packs) for packs in deal([10] * 4, vision, 2)] == [4, 4]


def test_the_lightest_packs_of_a_rank_are_its_first_and_its_last():
    (held,) = deal([5, 9, 1, 7, 3], [0] * 5, 1)
    assert [[5, 9, 1, 7, 3][pack] for pack in held] == [1, 5, 9, 7, 3]


def test_packs_that_cannot_be_dealt_equally_are_refused():
    with pytest.raises(ValueError, match="5 packs cannot be dealt equally to 2 ranks"):
        deal([1] * 5, [0] * 5, 2)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([(101, 0, 1, 0)], "item 0 has 101 tokens but a pack holds 100"),
        ([(1, 0, 1, 0), (1, 65, 1, 0)], "item 1 has 65 patches but a pack holds 64"),
    ],
)
def test_a_sample_over_a_capacity_is_refused_by_name(samples, words):
    with pytest.raises(DataError, match=words):
        packed(samples, (TOKENS, PATCHES))


@pytest.mark.parametrize("cost", [-1, 2**49])
def test_costs_whose_sums_would_not_be_exact_are_refused(cost):
    with pytest.raises(ValueError, match="must not be negative, nor their sum above"):
        packed([(1, 0, 1, 0), (1, 0, cost, 0)], (TOKENS, PATCHES))


def test_packing_ends_where_the_caller_cancels_it():
    calls = iter([False, False, True])
    ones, zeros = np.ones(1_000_000, np.int64), np.zeros(1_000_000, np.int64)
    with pytest.raises(RuntimeError, match="cancelled"):
        pack_balanced(SampleLengths(7 * ones, zeros), SampleCosts(ones, zeros), TOKENS, PATCHES, lambda: next(calls))


def test_a_signal_such_as_ctrl_c_ends_packing_at_once():
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    def pack_many():
        ones, zeros = np.ones(700_000, np.int64), np.zeros(700_000, np.int64)
        pack_balanced(SampleLengths(5 * ones, zeros), SampleCosts(ones, zeros), TOKENS, PATCHES)

    began = time.process_time()
    pack_many()
    whole = time.process_time() - began
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        began = time.process_time()
        threading.Timer(whole / 5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(Stopped):
            pack_many()
        assert time.process_time() - began < 0.7 * whole
    finally:
        signal.signal(signal.SIGUSR1, before)
