"""Slices of a pack and coordinates of the rank grid: nothing is lost, nothing is held twice."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimo_megatron.attention.packed import Piece
from mimo_megatron.attention.pieces import causal_pieces
from mimo_megatron.errors import ConfigError
from mimo_megatron.parallel import zigzag
from mimo_megatron.parallel.mesh import coordinates, data_parallel_size

SIZES = st.integers(1, 4)


@given(st.integers(1, 6), SIZES)
def test_every_slot_is_held_by_exactly_one_context_parallel_rank(chunk, size):
    num_slots = 2 * size * chunk
    held = torch.cat([zigzag.local_slots(num_slots, rank, size) for rank in range(size)])
    assert sorted(held.tolist()) == list(range(num_slots))


@given(st.integers(1, 6), SIZES)
def test_merging_all_slices_gives_the_pack_in_order(chunk, size):
    num_slots = 2 * size * chunk
    gathered = torch.cat([zigzag.local_slots(num_slots, rank, size) for rank in range(size)])
    assert gathered[zigzag.merge_order(num_slots, size)].tolist() == list(range(num_slots))


@given(st.integers(1, 6), SIZES, st.data())
def test_global_to_local_inverts_local_slots(chunk, size, data):
    num_slots = 2 * size * chunk
    rank = data.draw(st.integers(0, size - 1))
    slots = zigzag.local_slots(num_slots, rank, size)
    local = zigzag.global_to_local(num_slots, rank, size)
    assert local[slots].tolist() == list(range(len(slots)))
    assert (local >= 0).sum() == len(slots)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), SIZES)
def test_pieces_of_all_ranks_are_the_causal_pairs_of_the_segments(lengths, size):
    """Counted pair by pair, so that a piece that is too long, too short or misplaced shows."""
    unit = 2 * size
    lengths = [*lengths, -sum(lengths) % unit or unit]
    bounds = [0, *itertools.accumulate(lengths)]
    pairs = []
    for rank in range(size):
        slots = zigzag.local_slots(bounds[-1], rank, size).tolist()
        pieces = causal_pieces(bounds, zigzag.local_ranges(bounds[-1], rank, size))
        assert [row for piece in pieces for row in range(piece.q_start, piece.q_end)] == list(range(len(slots)))
        pairs += [(slots[q], k) for piece in pieces for q, k in _seen(piece)]
    wanted = [
        (q, k) for start, end in itertools.pairwise(bounds) for q in range(start, end) for k in range(start, q + 1)
    ]
    assert sorted(pairs) == sorted(wanted)


def _seen(piece: Piece) -> list[tuple[int, int]]:
    """(query, key) pairs of a bottom-right-aligned causal piece."""
    offset = piece.k_end - piece.q_end
    return [(q, k) for q in range(piece.q_start, piece.q_end) for k in range(piece.k_start, q + offset + 1)]


@given(SIZES, SIZES, SIZES, SIZES)
def test_ranks_and_coordinates_are_one_to_one(tp, cp, dp, pp):
    seen = {coordinates(rank, tp=tp, cp=cp, dp=dp, pp=pp) for rank in range(tp * cp * dp * pp)}
    assert seen == set(itertools.product(range(tp), range(cp), range(dp), range(pp)))


def test_a_world_that_the_layout_does_not_divide_is_refused_with_the_equation():
    assert data_parallel_size(8, tp=2, pp=2, cp=1) == 2
    with pytest.raises(ConfigError, match=r"world size 6 % \(tp 2 \* pp 2 \* cp 1 = 4\) != 0"):
        data_parallel_size(6, tp=2, pp=2, cp=1)
