"""Which queries of this rank may look at which keys of the pack: the causal attention layout as plain integers."""

import itertools
from collections.abc import Sequence

from mimo_megatron.attention.packed import Piece
from mimo_megatron.parallel.zigzag import Range


def causal_pieces(segment_bounds: Sequence[int], ranges: Sequence[Range]) -> tuple[Piece, ...]:
    """One piece for every overlap of a segment with a local range, in local order.

    ``segment_bounds`` are cumulative over the whole pack; ``ranges`` are this rank's slots (``zigzag.local_ranges``).
    A piece's queries are numbered locally, its keys globally: keys reach from the segment's start to the last query.
    """
    pieces = []
    offset = 0
    for range_start, range_end in ranges:
        for start, end in itertools.pairwise(segment_bounds):
            first, last = max(start, range_start), min(end, range_end)
            if first < last:
                q_start = offset + first - range_start
                pieces.append(Piece(q_start=q_start, q_end=q_start + last - first, k_start=start, k_end=last))
        offset += range_end - range_start
    return tuple(pieces)
