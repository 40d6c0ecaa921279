"""Tiles of attention kernels: every row once, all keys of its segment, none of a neighbour's without a mask."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_triton_kernels.tiles import tiling

ROWS, STEP = 64, 32
CPU = torch.device("cpu")


def bounds_of(lengths: list[int]) -> tuple[int, ...]:
    return (0, *torch.tensor(lengths).cumsum(0).tolist()) if lengths else (0,)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 200), max_size=8))
def test_every_row_is_in_one_tile_with_its_whole_segment_and_its_mask(lengths: list[int]) -> None:
    bounds = bounds_of(lengths)
    tiles = tiling(bounds, ROWS, STEP, CPU)
    seen = []
    for row_start, row_end, key_start, key_middle, key_end in tiles.tiles_X5.tolist():
        assert 0 < row_end - row_start <= ROWS and (key_middle - key_start) % STEP == 0
        for row in range(row_start, row_end):
            start, end = tiles.seen_2T[:, row].tolist()
            assert start <= row < end and (start, end) in set(pairwise(bounds))
            assert key_start <= start and end <= key_end, "keys of the row's segment that its tile does not read"
            assert key_middle == key_start or (start == key_start and key_middle <= end), "a neighbour's key, unmasked"
            seen.append(row)
        if key_end - key_start <= ROWS:
            assert (key_start, key_middle, key_end) == (row_start, row_start, row_end)
    assert sorted(seen) == list(range(bounds[-1]))


@pytest.mark.parametrize(
    ("lengths", "num_tiles"),
    [([64, 64], 2), ([4] * 16, 1), ([40, 24, 1], 2), ([32, 40, 24], 2), ([65], 2), ([4, 200, 4], 6), ([0, 0], 0)],
)
def test_short_neighbours_share_a_tile_and_long_segments_share_none(lengths: list[int], num_tiles: int) -> None:
    assert len(tiling(bounds_of(lengths), ROWS, STEP, CPU)) == num_tiles


def test_tiles_with_the_most_keys_come_first() -> None:
    tiles = tiling(bounds_of([10, 70, 300, 20]), ROWS, STEP, CPU).tiles_X5
    assert (tiles[:, 4] - tiles[:, 2]).tolist() == [300] * 5 + [70] * 2 + [20, 10]
