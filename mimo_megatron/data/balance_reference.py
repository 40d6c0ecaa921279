"""The definition of balanced packing and of dealing, in plain Python, for tests and for reading. The C++ does the same.

Packing. As many packs as the lower bound says. The samples with the fewest tokens, up to 15 % of the cost that binds
(tokens or patches, whichever needs more packs), are put aside as filler. The others go, the longest first, down a
binary tree over the packs: at each fork to the half whose packs have the smaller mean *excess*, the left one of equals,
among the halves in which some pack has room for the tokens and some for the patches. A sample's excess is its cost less
that of as many tokens of filler (of the mean sample, if that is less), since it is filler that will take the room it
leaves. Where the way ends without a pack it becomes filler. Filler goes, largest first, where it fits best.

Where the cost that does not bind needs 55 % of the packs or more, large samples go by cost, the most costly first, and,
where tokens bind, those without patches are the first to be filler.

Where that needs over 1/500 more packs than the lower bound it is tried again in this second way, with vision counted 9
times in the excess; then plain best fit; the first with the fewest packs is taken. Where the cost that does not bind
needs 4/5 of the packs or more, patches would run out before tokens, and the first of these tries is left out.

Dealing. The most costly pack first to the rank with the least cost that may still get one. Then swaps of two packs are
proposed at random, and kept if the sum of the ranks' potentials falls.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from mimo_megatron.data.packing import Packs
from mimo_megatron.data.packing_reference import pack_two_costs_reference

FILLER_PERCENT = 15
TOLERATED_FRACTION = 500
TIGHT_PERCENT = 55
VISION_EMPHASIS = 8
COST_STEEPNESS, VISION_STEEPNESS = 100.0, 16.0


def pack_balanced_reference(
    tokens: Sequence[int],
    patches: Sequence[int],
    costs: Sequence[int],
    vision_costs: Sequence[int],
    token_capacity: int,
    patch_capacity: int,
) -> Packs:
    if not tokens:
        return Packs(np.zeros(1, np.int64), np.zeros(0, np.int64))
    bounds = (-(-sum(tokens) // token_capacity), -(-sum(patches) // patch_capacity))
    lower_bound, tried = max(*bounds, 1), []
    for emphasis in (VISION_EMPHASIS,) if 5 * min(bounds) >= 4 * lower_bound else (0, VISION_EMPHASIS):
        weighted = [cost + emphasis * vision for cost, vision in zip(costs, vision_costs, strict=True)]
        is_tight = emphasis > 0 or 100 * min(bounds) >= TIGHT_PERCENT * lower_bound
        order = costs if is_tight else tokens
        tried.append(_balanced(tokens, patches, order, weighted, token_capacity, patch_capacity, is_tight))
        if min(map(len, tried)) - lower_bound <= lower_bound // TOLERATED_FRACTION:
            return min(tried, key=len)
    tried.append(pack_two_costs_reference(tokens, patches, token_capacity, patch_capacity))
    return min(tried, key=len)


def _balanced(
    tokens: Sequence[int],
    patches: Sequence[int],
    order: Sequence[int],
    weighted: Sequence[int],
    token_capacity: int,
    patch_capacity: int,
    text_first: bool,
) -> Packs:
    def size(i: int) -> int:
        return tokens[i] * patch_capacity + 2 * patches[i] * token_capacity

    by_tokens, by_patches = -(-sum(tokens) // token_capacity), -(-sum(patches) // patch_capacity)
    tokens_bind = by_tokens >= by_patches
    binding = tokens if tokens_bind else patches
    num_packs = max(by_tokens, by_patches, 1)

    filler = set[int]()
    wanted = sum(binding) * FILLER_PERCENT // 100
    shortest = sorted(range(len(tokens)), key=lambda i: (tokens[i], -i))
    for i in ([i for i in shortest if not patches[i]] if text_first and tokens_bind else []) + shortest:
        if sum(binding[i] for i in filler) >= wanted:
            break
        filler.add(i)
    filler_tokens = sum(tokens[i] for i in filler)
    per_token = sum(weighted[i] for i in filler) // filler_tokens if filler_tokens else 0
    per_token = min(per_token, sum(weighted) // max(sum(tokens), 1))

    members: list[list[int]] = [[] for _ in range(num_packs)]
    space = [(token_capacity, patch_capacity)] * num_packs
    excess = [0] * num_packs
    large = [i for i in range(len(tokens)) if i not in filler]
    for i in sorted(large, key=lambda i: order[i], reverse=True):
        pack = _way_down(space, excess, tokens[i], patches[i])
        if pack is None:
            filler.add(i)
            continue
        members[pack].append(i)
        space[pack] = (space[pack][0] - tokens[i], space[pack][1] - patches[i])
        excess[pack] += weighted[i] - per_token * tokens[i]

    filled_at = list(range(num_packs))
    for place, i in enumerate(sorted(sorted(filler), key=size, reverse=True)):
        fitting = [pack for pack, (t, p) in enumerate(space) if t >= tokens[i] and p >= patches[i]]
        if not fitting:
            fitting = [len(space)]
            members.append([])
            space.append((token_capacity, patch_capacity))
            filled_at.append(0)
        first, second = (0, 1) if tokens_bind else (1, 0)
        best = min(fitting, key=lambda pack: (space[pack][first], -space[pack][second], -filled_at[pack]))
        members[best].append(i)
        space[best] = (space[best][0] - tokens[i], space[best][1] - patches[i])
        filled_at[best] = num_packs + place
    return Packs(
        np.cumsum([0, *map(len, members)], dtype=np.int64),
        np.array([i for pack in members for i in sorted(pack)], np.int64),
    )


def _way_down(space: Sequence[tuple[int, int]], excess: Sequence[int], tokens: int, patches: int) -> int | None:
    first, size = 0, 1
    while size < len(space):
        size *= 2
    while True:
        halves = [range(first, min(first + size, len(space)))]
        if size > 1:
            halves = [range(start, min(start + size // 2, len(space))) for start in (first, first + size // 2)]
        holding = [
            half
            for half in halves
            if any(space[pack][0] >= tokens for pack in half) and any(space[pack][1] >= patches for pack in half)
        ]
        if not holding:
            return None
        if size == 1:
            return first
        first = min(holding, key=lambda half: sum(excess[pack] for pack in half) / len(half)).start
        size //= 2


def deal_reference(
    costs: Sequence[int], vision_costs: Sequence[int], num_ranks: int, proposals_per_pack: int
) -> list[int]:
    """The rank of each pack."""
    each = len(costs) // num_ranks
    cost, vision = (
        [one / (max(sum(values), 1) / num_ranks / steepness) for one in values]
        for values, steepness in ((costs, COST_STEEPNESS), (vision_costs, VISION_STEEPNESS))
    )
    ranks, num_held = [0] * len(costs), [0] * num_ranks
    cost_of, vision_of = [0.0] * num_ranks, [0.0] * num_ranks
    least = [(0.0, rank) for rank in range(num_ranks)]
    for pack in sorted(range(len(costs)), key=lambda one: costs[one], reverse=True):
        _, rank = heapq.heappop(least)
        ranks[pack] = rank
        num_held[rank] += 1
        cost_of[rank] += cost[pack]
        vision_of[rank] += vision[pack]
        if num_held[rank] < each:
            heapq.heappush(least, (cost_of[rank], rank))
    if num_ranks == 1 or each == 1:
        return ranks
    state = 1
    for _ in range(proposals_per_pack * len(costs)):
        pair = []
        for _ in range(2):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            pair.append((state >> 32) * len(costs) >> 32)
        one, two = pair
        a, b = ranks[one], ranks[two]
        if a == b:
            continue
        more_cost, more_vision = cost[two] - cost[one], vision[two] - vision[one]
        then = _potential(cost_of[a] + more_cost, vision_of[a] + more_vision)
        then += _potential(cost_of[b] - more_cost, vision_of[b] - more_vision)
        if then >= _potential(cost_of[a], vision_of[a]) + _potential(cost_of[b], vision_of[b]):
            continue
        ranks[one], ranks[two] = b, a
        cost_of[a], cost_of[b] = cost_of[a] + more_cost, cost_of[b] - more_cost
        vision_of[a], vision_of[b] = vision_of[a] + more_vision, vision_of[b] - more_vision
    return ranks


def _potential(cost: float, vision: float) -> float:
    total = 0.0
    for excess in (cost - (COST_STEEPNESS - 1), vision - (VISION_STEEPNESS - 1)):
        power = max(excess, 0.0)
        for _ in range(4):
            power *= power
        total += power
    return total
