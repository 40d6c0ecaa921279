"""Tiles of causal attention: every pair of a query and a key it sees, once; no other without a mask; little in vain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_megatron.attention.pieces import causal_pieces
from mimo_megatron.parallel.zigzag import local_ranges
from mimo_triton_kernels.causal_tiles import Piece, key_tiling, query_tiling

CPU = torch.device("cpu")
BLOCKS = [(16, 8), (32, 32), (8, 16)]


def tuples(bounds: tuple[int, ...], rank: int = 0, cp: int = 1) -> tuple[Piece, ...]:
    pieces = causal_pieces(bounds, local_ranges(bounds[-1], rank, cp))
    return tuple((piece.q_start, piece.q_end, piece.k_start, piece.k_end) for piece in pieces)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[Piece, ...], int]:
    """Pieces with free keys, or those of packed segments on a context-parallel rank; and the number of keys."""
    if draw(st.booleans()):
        bounds = [0, *torch.tensor(draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))).cumsum(0).tolist()]
        bounds[-1] += -bounds[-1] % 4
        return tuples(tuple(bounds), draw(st.integers(0, 1)), 2 if draw(st.booleans()) else 1), bounds[-1]
    pieces, done, num_keys = [], 0, draw(st.integers(0, 90))
    for _ in range(draw(st.integers(0, 5))):
        k_start, k_end = sorted((draw(st.integers(0, num_keys)), draw(st.integers(0, num_keys))))
        q_end = done + draw(st.integers(0, k_end - k_start))
        pieces.append((done, q_end, k_start, k_end))
        done = q_end
    return tuple(pieces), num_keys


def pairs_of(pieces: tuple[Piece, ...]) -> set[tuple[int, int]]:
    return {
        (q, k) for q_start, q_end, k_start, k_end in pieces for q in range(q_start, q_end)
        for k in range(k_start, q + k_end - q_end + 1)
    }  # fmt: skip


@settings(max_examples=50)
@given(layouts(), st.sampled_from(BLOCKS))
def test_a_tile_of_queries_reads_all_their_keys_and_masks_what_one_does_not_see(layout, blocks) -> None:
    (pieces, _), (rows, step) = layout, blocks
    tiles = query_tiling(pieces, rows, step, CPU)
    seen_TR = [range(start, end) for start, end in tiles.seen_2T.T.tolist()]
    assert {(q, k) for q, keys in enumerate(seen_TR) for k in keys} == pairs_of(pieces)
    queries = []
    for row_start, row_end, key_start, key_middle, key_end in tiles.tiles_X5.tolist():
        assert 0 < row_end - row_start <= rows and (key_middle - key_start) % step == 0
        for q in range(row_start, row_end):
            assert key_start <= seen_TR[q].start and seen_TR[q].stop <= key_end, "keys that the tile does not read"
            unmasked = range(key_start, key_middle)
            assert not unmasked or (seen_TR[q].start == key_start and key_middle <= seen_TR[q].stop)
        queries += range(row_start, row_end)
    assert sorted(queries) == list(range(len(seen_TR)))


@settings(max_examples=50)
@given(layouts(), st.sampled_from(BLOCKS))
def test_a_tile_of_keys_reads_every_query_that_sees_one_of_them_once(layout, blocks) -> None:
    (pieces, num_keys), (rows, step) = layout, blocks
    pairs, reached, keys = pairs_of(pieces), [], []
    tiles = key_tiling(pieces, num_keys, rows, step, CPU)
    spans = tiles.spans_Y3.tolist()
    for key_start, key_end, first, end in tiles.tiles_X4.tolist():
        assert 0 < key_end - key_start <= rows
        of_tile = range(key_start, key_end)
        keys += of_tile
        for query_start, query_middle, query_end in spans[first:end]:
            assert query_start < query_end and ((query_middle - query_start) % step == 0 or query_middle == query_end)
            assert all((q, k) in pairs for q in range(query_middle, query_end) for k in of_tile), "unmasked, unseen"
            reached += [(q, k) for q in range(query_start, query_end) for k in of_tile if (q, k) in pairs]
        queries = [q for span in spans[first:end] for q in range(span[0], span[2])]
        assert queries == sorted(set(queries)), "sums run through the queries in order, each once"
    assert sorted(keys) == list(range(num_keys)), "keys that no query sees are written too"
    assert len(reached) == len(set(reached)) and set(reached) == pairs


def test_short_segments_share_tiles_on_both_sides() -> None:
    pieces = tuples(tuple(range(0, 65, 4)))
    assert query_tiling(pieces, 32, 16, CPU).tiles_X5.tolist() == [[0, 32, 0, 0, 32], [32, 64, 32, 32, 64]]
    tiles = key_tiling(pieces, 64, 32, 16, CPU)
    assert tiles.tiles_X4.tolist() == [[0, 32, 0, 1], [32, 64, 1, 2]]
    assert tiles.spans_Y3.tolist() == [[0, 32, 32], [32, 64, 64]]


def test_tiles_with_the_most_work_come_first() -> None:
    pieces = tuples((0, 10, 110, 130))
    lengths = [end - start for _, _, start, _, end in query_tiling(pieces, 16, 16, CPU).tiles_X5.tolist()]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 100
    tiles = key_tiling(pieces, 130, 16, 16, CPU)
    work = [sum(e - s for s, _, e in tiles.spans_Y3[a:b].tolist()) for _, _, a, b in tiles.tiles_X4.tolist()]
    assert work == sorted(work, reverse=True) and work[0] == 100


def num_scores(rows: int, step: int, ranges: list[tuple[int, int, int]]) -> int:
    """What kernels compute for blocks from start to middle and from middle to end, masked scores too."""
    return sum(rows * step * (-(-(middle - start) // step) - (middle - end) // step) for start, middle, end in ranges)


@pytest.mark.parametrize(
    ("bounds", "cp", "most"),
    [((0, 16384), 1, 1.01), ((0, 4096), 1, 1.04), ((0, 16384), 2, 1.02), (tuple(range(0, 16385, 512)), 1, 1.26)],
    ids=["16384", "4096", "16384 cp2", "512"],
)
def test_few_scores_beyond_the_diagonal_are_computed(bounds: tuple[int, ...], cp: int, most: float) -> None:
    """With the sizes of the kernels for Hopper; by tiles of keys 1.008, 1.031, 1.008 and 1.248."""
    reason = "the kernels need triton: pip install triton"
    plan = pytest.importorskip("mimo_triton_kernels.causal_attention", reason=reason).HOPPER
    for rank in range(cp):
        pieces = tuples(bounds, rank, cp)
        useful = sum(
            (q_end - q_start) * (2 * (k_end - k_start) - (q_end - q_start) + 1) // 2
            for q_start, q_end, k_start, k_end in pieces
        )
        for blocks in (plan.forward, plan.backward_q):
            tiles = query_tiling(pieces, blocks.rows, blocks.step, CPU).tiles_X5.tolist()
            assert useful <= num_scores(blocks.rows, blocks.step, [(x[2], x[3], x[4]) for x in tiles]) <= most * useful
        blocks = plan.backward_kv
        tiles = key_tiling(pieces, bounds[-1], blocks.rows, blocks.step, CPU)
        spans = tiles.spans_Y3.tolist()
        ranges = [tuple(spans[place]) for _, _, first, end in tiles.tiles_X4.tolist() for place in range(first, end)]
        assert useful <= num_scores(blocks.rows, blocks.step, ranges) <= most * useful


def test_scores_are_counted_by_whole_blocks() -> None:
    assert num_scores(16, 8, [(0, 8, 20)]) == 16 * 24 and num_scores(16, 8, [(0, 0, 0)]) == 0
