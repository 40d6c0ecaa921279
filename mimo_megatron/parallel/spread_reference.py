"""The definition of spreading, in plain Python, for tests and the planner. The C++ gives the same ranks.

First every piece, the most costly first and equal ones by number, goes to the least loaded rank, the first of equals.
Then, at most once for each piece: of all ways to move a piece off the most loaded rank or to swap it for one of another
rank, the one that leaves the larger of the two loads smallest, if that lowers it. Over when the most loaded rank is
within a thousandth of the mean.
"""

from collections.abc import Iterator, Sequence

GOOD_ENOUGH = 1000
EMPTY_PLACE = -1


def loads(costs: Sequence[int], ranks: Sequence[int], num_ranks: int) -> list[int]:
    """The summed cost of every rank's pieces."""
    sums = [0] * num_ranks
    for cost, rank in zip(costs, ranks, strict=True):
        sums[rank] += cost
    return sums


def spread_reference(costs: Sequence[int], num_ranks: int) -> list[int]:
    order = sorted(range(len(costs)), key=lambda piece: costs[piece], reverse=True)
    ranks = [0] * len(costs)
    so_far = [0] * num_ranks
    for piece in order:
        ranks[piece] = so_far.index(min(so_far))
        so_far[ranks[piece]] += costs[piece]
    for _ in costs:
        now = loads(costs, ranks, num_ranks)
        heavy = now.index(max(now))
        best = min(_swaps(costs, ranks, now, heavy), default=None)
        if max(now) * num_ranks - sum(now) <= sum(now) // GOOD_ENOUGH or best is None:
            break
        _larger, rank, taken, _cost, given = best
        ranks[taken] = rank
        if given != EMPTY_PLACE:
            ranks[given] = heavy
    return ranks


def _swaps(
    costs: Sequence[int], ranks: Sequence[int], now: Sequence[int], heavy: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(larger load afterwards, other rank, piece taken, cost and number of the piece given back) of every swap with
    another rank that lowers the larger of the two loads; a move gives back an empty place of cost 0."""
    for taken in (piece for piece, rank in enumerate(ranks) if rank == heavy):
        places = [(rank, 0, EMPTY_PLACE) for rank in range(len(now))]
        places += [(rank, costs[piece], piece) for piece, rank in enumerate(ranks)]
        for rank, cost, given in places:
            change = costs[taken] - cost
            larger = max(now[heavy] - change, now[rank] + change)
            if rank != heavy and larger < now[heavy]:
                yield larger, rank, taken, cost, given
