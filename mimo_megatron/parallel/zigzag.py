"""Context-parallel slices of a pack: each rank holds one chunk counted from the front and its mirror from the back.

Causal work is then equal on all ranks. The cut is over the pack's slots, so no sample is padded for it.
"""

import torch
from torch import Tensor

Range = tuple[int, int]


def local_ranges(num_slots: int, rank: int, size: int) -> tuple[Range, ...]:
    """The slot ranges of this rank, in order: one at size 1, two else. Requires num_slots divisible by 2 * size."""
    if size == 1:
        return ((0, num_slots),)
    assert num_slots % (2 * size) == 0, f"{num_slots} slots do not divide into 2 * {size} chunks"
    chunk = num_slots // (2 * size)
    mirror = 2 * size - 1 - rank
    return (rank * chunk, (rank + 1) * chunk), (mirror * chunk, (mirror + 1) * chunk)


def local_slots(num_slots: int, rank: int, size: int) -> Tensor:
    """int64: the global slot of every local slot of this rank."""
    return torch.cat([torch.arange(start, stop) for start, stop in local_ranges(num_slots, rank, size)])


def global_to_local(num_slots: int, rank: int, size: int) -> Tensor:
    """int64 [S]: the local slot of every global slot, -1 where another rank holds it."""
    local_of_S = torch.full((num_slots,), -1, dtype=torch.int64)
    slots = local_slots(num_slots, rank, size)
    local_of_S[slots] = torch.arange(len(slots))
    return local_of_S


def merge_order(num_slots: int, size: int) -> Tensor:
    """int64 [S]: where each global slot stands in the concatenation of all ranks' slices."""
    gathered = torch.cat([local_slots(num_slots, rank, size) for rank in range(size)])
    order_S = torch.empty_like(gathered)
    order_S[gathered] = torch.arange(num_slots)
    return order_S
