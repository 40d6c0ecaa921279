"""Tiles of causal attention over pieces: which keys a tile of queries reads, which queries a tile of keys.

A piece is (q_start, q_end, k_start, k_end), its last query at its last key: query q sees the keys from k_start to
q + k_end - q_end. Query ranges follow one another, key ranges are free: under context parallelism they overlap.
What lies beyond the diagonal is in no tile's reach; blocks that lie wholly on this side of it need no mask.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mimo_triton_kernels.tiles import Tiling, cut

Piece = tuple[int, int, int, int]
Span = tuple[int, int, int]


@dataclass(frozen=True)
class KeyTiling:
    """Dims: X tiles, Y spans of queries. All int32, on the device of the kernel."""

    tiles_X4: Tensor
    """[key_start, key_end, first span, the span after its last]; no span: keys that no query sees."""
    spans_Y3: Tensor
    """[query_start, query_middle, query_end]: queries from ``query_middle`` on see every key of the tile."""

    def __len__(self) -> int:
        return len(self.tiles_X4)


@lru_cache(maxsize=64)
def query_tiling(pieces: tuple[Piece, ...], rows: int, step: int, device: torch.device) -> Tiling:
    """Tiles of at most ``rows`` queries whose keys are read ``step`` at a time; those with the most keys first."""
    tiles = sorted(_query_tiles(pieces, rows, step), key=lambda tile: tile[2] - tile[4])
    q_start_Q, q_end_Q, k_start_Q, k_end_Q = torch.tensor(pieces, dtype=torch.int32).view(-1, 4).unbind(1)
    low_T, beyond_T = torch.stack([k_start_Q, k_end_Q - q_end_Q]).repeat_interleave(q_end_Q - q_start_Q, dim=1)
    seen_2T = torch.stack([low_T, beyond_T + torch.arange(1, len(low_T) + 1, dtype=torch.int32)])
    tiles_X5 = torch.tensor(tiles, dtype=torch.int32).view(-1, 5)
    return Tiling(tiles_X5.to(device, non_blocking=True), seen_2T.to(device, non_blocking=True))


def _query_tiles(pieces: tuple[Piece, ...], rows: int, step: int) -> Iterator[tuple[int, int, int, int, int]]:
    for first, *others in _together(pieces, rows):
        q_start, q_end, k_start, k_end = first
        if others:
            yield q_start, others[-1][1], k_start, k_start, others[-1][3]
            continue
        for row in range(q_start, q_end, rows):
            row_end = min(row + rows, q_end)
            seen_by_all = row + 1 + k_end - q_end - k_start
            yield row, row_end, k_start, k_start + seen_by_all // step * step, row_end + k_end - q_end


def _together(pieces: tuple[Piece, ...], rows: int) -> list[list[Piece]]:
    """Neighbours whose keys are neighbours too and that fit into one tile of ``rows`` queries and as many keys."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        q_start, q_end, k_start, k_end = piece
        if q_start == q_end:
            continue
        if groups and k_start == groups[-1][-1][3]:
            first_q, _, first_k, _ = groups[-1][0]
            if max(q_end - first_q, k_end - first_k) <= rows:
                groups[-1].append(piece)
                continue
        groups.append([piece])
    return groups


@lru_cache(maxsize=64)
def key_tiling(pieces: tuple[Piece, ...], num_keys: int, rows: int, step: int, device: torch.device) -> KeyTiling:
    """Tiles of at most ``rows`` keys whose queries are read ``step`` at a time; those with the most queries first.

    Every key is in one tile; its spans run through the pieces in their order, so that sums have one.
    """
    filled = [piece for piece in pieces if piece[0] < piece[1]]
    edges = tuple(sorted({0, num_keys, *(edge for piece in filled for edge in piece[2:])}))
    place_of = {edge: place for place, edge in enumerate(edges)}
    seen_by: list[list[Piece]] = [[] for _ in edges]  # for every stretch between two edges
    for piece in filled:
        for place in range(place_of[piece[2]], place_of[piece[3]]):
            seen_by[place].append(piece)
    found = []
    for key_start, key_end, *_ in cut(edges, rows, step):
        stretches = seen_by[bisect_right(edges, key_start) - 1 : bisect_left(edges, key_end)]
        found.append((key_start, key_end, _spans(sorted(set().union(*stretches)), key_start, key_end, step)))
    found.sort(key=lambda tile: -sum(end - start for start, _, end in tile[2]))
    tiles, spans = [], []
    for key_start, key_end, of_tile in found:
        tiles.append((key_start, key_end, len(spans), len(spans) + len(of_tile)))
        spans += of_tile
    tiles_X4, spans_Y3 = (torch.tensor(x, dtype=torch.int32).view(-1, n) for x, n in ((tiles, 4), (spans, 3)))
    return KeyTiling(tiles_X4.to(device, non_blocking=True), spans_Y3.to(device, non_blocking=True))


def _spans(pieces: list[Piece], key_start: int, key_end: int, step: int) -> list[Span]:
    """The queries that see one of the keys at least, piece by piece; neighbours that all need a mask are one span."""
    spans: list[Span] = []
    for q_start, q_end, k_start, k_end in pieces:
        shift = k_end - q_end
        start = max(q_start, key_start - shift)
        sees_all = max(start, key_end - 1 - shift) if k_start <= key_start and key_end <= k_end else q_end
        middle = min(q_end, start + -(-(sees_all - start) // step) * step)
        if spans and middle == q_end and spans[-1][1] == spans[-1][2] == start:
            spans[-1] = (spans[-1][0], q_end, q_end)
        else:
            spans.append((start, middle, q_end))
    return spans
