"""Samples into packs: best fit decreasing for one capacity (tokens) or two (tokens and vision patches).

The packs are defined, item by item, in ``packing_reference``; the work is done in C++ with the GIL released.
Invariants: every item in exactly one pack, no pack over a capacity, the same packs as the definition.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mimo_megatron import _packing
from mimo_megatron.errors import DataError


@dataclass(frozen=True)
class Packs:
    """Item numbers, pack after pack: pack b is ``items[offsets[b] : offsets[b + 1]]``, largest item first."""

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return self.items[self.offsets[pack] : self.offsets[pack + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[pack] for pack in range(len(self)))

    def totals(self, costs: NDArray[Any]) -> NDArray[np.int64]:
        """The summed cost of each pack."""
        before = np.concatenate([[0], np.cumsum(costs[self.items], dtype=np.int64)])
        return np.diff(before[self.offsets])


def pack(lengths: ArrayLike, capacity: int) -> Packs:
    """Packs of at most ``capacity`` tokens. ``DataError`` names the first item that exceeds it."""
    return Packs(*_packing.pack_one(checked(lengths, capacity, "tokens"), capacity))


def pack_two_costs(tokens: ArrayLike, patches: ArrayLike, token_capacity: int, patch_capacity: int) -> Packs:
    """Packs of at most ``token_capacity`` tokens and ``patch_capacity`` patches.

    ``DataError`` names the first item that exceeds one of them.
    """
    tokens, patches = checked(tokens, token_capacity, "tokens"), checked(patches, patch_capacity, "patches")
    if len(tokens) != len(patches):
        raise DataError(f"{len(tokens)} token counts but {len(patches)} patch counts; give both for every sample")
    return Packs(*_packing.pack_two(tokens, patches, token_capacity, patch_capacity))


def checked(values: ArrayLike, capacity: int, unit: str) -> NDArray[np.int64]:
    """The costs as int64 [N]. ``DataError`` unless they are whole numbers from 0 to ``capacity``."""
    costs = np.asarray(values)
    if costs.ndim != 1 or (costs.size and costs.dtype.kind not in "iu"):
        raise DataError(f"{unit} of samples must be a 1-D integer array, not {costs.ndim}-D {costs.dtype}")
    if not 0 < capacity <= _packing.MAX_CAPACITY:
        raise DataError(
            f"a pack of {capacity} {unit} cannot be filled; the capacity must be in 1 .. {_packing.MAX_CAPACITY}"
        )
    if not costs.size:
        return np.zeros(0, np.int64)
    if costs.min() < 0:
        raise DataError(f"item {costs.argmin()} has {costs.min()} {unit}; counts cannot be negative")
    if costs.max() > capacity:
        item = int((costs > capacity).argmax())
        raise DataError(
            f"item {item} has {costs[item]} {unit} but a pack holds {capacity}; raise the capacity or drop the sample"
        )
    return costs.astype(np.int64, copy=False)
