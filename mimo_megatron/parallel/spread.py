"""Pieces of work over ranks, so that the most loaded rank has as little as possible.

Longest processing time first, then moves and swaps away from the most loaded rank (``spread_reference`` is the
definition); the work is done in C++ with the GIL released. A function of (costs, number of ranks) alone, so every rank
that knows the costs finds the same.
"""

from collections.abc import Sequence

import numpy as np

from mimo_megatron import _packing
from mimo_megatron.parallel.spread_reference import loads

__all__ = ["loads", "spread"]


def spread(costs: Sequence[int], num_ranks: int) -> list[int]:
    """The rank, from 0, of each piece. Costs are whole and not negative; times the ranks, their sum is at most 2^60."""
    return _packing.spread(np.array(costs, dtype=np.int64), num_ranks).tolist()
