"""Which rows one program of an attention kernel computes, and which keys they may see: plain integers, once per pack.

Segments lie one after another. Short neighbours share a tile, so that a window of 4 patches does not take a tile of 64
to itself; a long segment is cut into tiles. No tile holds a part of one segment and anything of another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Dims: X tiles, T rows. All int32, on the device of the kernel."""

    tiles_X5: Tensor
    """[row_start, row_end, key_start, key_middle, key_end]: keys before ``key_middle`` need no mask."""
    seen_2T: Tensor
    """Where the keys that each row sees start and end: with ``tiling`` those of its segment."""

    def __len__(self) -> int:
        return len(self.tiles_X5)


@lru_cache(maxsize=64)
def tiling(bounds: tuple[int, ...], rows: int, step: int, device: torch.device) -> Tiling:
    """Tiles of at most ``rows`` rows whose keys are read ``step`` at a time; segment i is rows bounds[i]..bounds[i+1].

    Tiles with the most keys come first, so that no long one is left to start when all others are done.
    """
    lengths = torch.tensor([end - start for start, end in pairwise(bounds)], dtype=torch.int32)
    edges = torch.tensor(bounds, dtype=torch.int32)
    seen_2T = torch.stack([edges[:-1].repeat_interleave(lengths), edges[1:].repeat_interleave(lengths)])
    tiles = sorted(cut(bounds, rows, step), key=lambda tile: tile[2] - tile[4])
    tiles_X5 = torch.tensor(tiles, dtype=torch.int32).view(-1, 5)
    return Tiling(
        tiles_X5.to(device, non_blocking=True),
        seen_2T.to(device, non_blocking=True),
    )


def cut(bounds: tuple[int, ...], rows: int, step: int) -> Iterator[tuple[int, int, int, int, int]]:
    """``Tiling.tiles_X5``, in the order of the rows."""
    first = bounds[0]  # of the short segments not yet given out
    for start, end in pairwise(bounds):
        if end - first <= rows:
            continue
        if first < start:
            yield first, start, first, first, start
        first = start
        if end - start > rows:
            middle = start + (end - start) // step * step
            yield from ((row, min(row + rows, end), start, middle, end) for row in range(start, end, rows))
            first = end
    if first < bounds[-1]:
        yield first, bounds[-1], first, first, bounds[-1]
