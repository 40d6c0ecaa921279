"""Packing against its definition in plain Python, and what must hold for any input."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mimo_megatron.data.packing import Packs, pack, pack_two_costs
from mimo_megatron.data.packing_reference import check_packs, pack_reference, pack_two_costs_reference

# Small capacities, so that equal lengths, exact fits and equal spaces are frequent; 64 and 4096 are the edges of the
# bitmap's words.
CAPACITIES = st.one_of(st.integers(1, 24), st.sampled_from([63, 64, 65, 4095, 4096, 4097]))


@st.composite
def one_cost(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(CAPACITIES)
    return draw(st.lists(st.integers(0, capacity), max_size=60)), capacity


@st.composite
def two_costs(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    token_capacity, patch_capacity = draw(CAPACITIES), draw(CAPACITIES)
    patches = st.one_of(st.just(0), st.integers(0, patch_capacity))  # text samples have none
    items = draw(st.lists(st.tuples(st.integers(0, token_capacity), patches), max_size=60))
    return [one for one, _ in items], [other for _, other in items], token_capacity, patch_capacity


def assert_same(ours: Packs, theirs: Packs) -> None:
    assert [one.tolist() for one in ours] == [one.tolist() for one in theirs]


@settings(max_examples=400, deadline=None)
@given(one_cost())
def test_packs_of_one_cost_are_those_of_the_definition(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = pack(lengths, capacity)
    check_packs(packs, (lengths, capacity))
    assert_same(packs, pack_reference(lengths, capacity))


@settings(max_examples=400, deadline=None)
@given(two_costs())
def test_packs_of_two_costs_are_those_of_the_definition(case: tuple[list[int], list[int], int, int]) -> None:
    tokens, patches, token_capacity, patch_capacity = case
    packs = pack_two_costs(tokens, patches, token_capacity, patch_capacity)
    check_packs(packs, (tokens, token_capacity), (patches, patch_capacity))
    assert_same(packs, pack_two_costs_reference(tokens, patches, token_capacity, patch_capacity))


@settings(deadline=None)
@given(one_cost(), CAPACITIES)
def test_two_costs_without_patches_pack_as_one_cost(case: tuple[list[int], int], patch_capacity: int) -> None:
    lengths, capacity = case
    assert_same(pack_two_costs(lengths, [0] * len(lengths), capacity, patch_capacity), pack(lengths, capacity))


@settings(deadline=None)
@given(two_costs(), st.randoms(use_true_random=False))
def test_order_of_the_items_does_not_change_the_packs_contents(case, random) -> None:
    tokens, patches, token_capacity, patch_capacity = case
    turn = list(range(len(tokens)))
    random.shuffle(turn)
    turned_tokens, turned_patches = [tokens[i] for i in turn], [patches[i] for i in turn]

    packs, turned = pack(tokens, token_capacity), pack(turned_tokens, token_capacity)
    assert [[tokens[i] for i in one] for one in packs] == [[turned_tokens[i] for i in one] for one in turned]

    packs = pack_two_costs(tokens, patches, token_capacity, patch_capacity)
    turned = pack_two_costs(turned_tokens, turned_patches, token_capacity, patch_capacity)
    assert [[(tokens[i], patches[i]) for i in one] for one in packs] == [
        [(turned_tokens[i], turned_patches[i]) for i in one] for one in turned
    ]


@settings(deadline=None)
@given(one_cost())
def test_no_two_packs_fit_into_one(case: tuple[list[int], int]) -> None:
    """What any-fit guarantees: the fill is above one half."""
    lengths, capacity = case
    packs = pack(lengths, capacity)
    totals = np.sort(packs.totals(np.array(lengths, np.int64)))
    assert len(packs) < 2 or totals[0] + totals[1] > capacity


@given(one_cost(), st.data())
def test_checker_rejects_a_corrupted_pack_list(case: tuple[list[int], int], data: st.DataObject) -> None:
    lengths, capacity = case
    assume(len(lengths) > 1)
    packs = pack(lengths, capacity)
    fault = data.draw(st.sampled_from(["item twice", "item lost", "number too high"]))
    items, offsets = packs.items.copy(), packs.offsets.copy()
    if fault == "item twice":
        items[0] = items[-1]
    elif fault == "item lost":
        items, offsets[-1] = items[:-1], offsets[-1] - 1
    else:
        items[0] = len(items)
    with pytest.raises((AssertionError, IndexError)):
        check_packs(Packs(offsets, items), (lengths, capacity))


@given(one_cost())
def test_checker_rejects_packs_over_the_capacity(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = pack(lengths, capacity)
    assume(len(packs) > 1)
    merged = Packs(np.delete(packs.offsets, 1), packs.items)  # the first two packs as one
    with pytest.raises(AssertionError, match="over"):
        check_packs(merged, (lengths, capacity))
