"""Which rank of a stage encodes which images of a pack, and where the features of all stand once gathered.

A piece is one image or one temporal grid step of a video: nothing in the encoder attends beyond it. Pieces are spread
over the tp x cp ranks by their predicted FLOPs, all on the CPU and from the grids alone, so every rank finds the same.
Invariant: which rank encodes a piece changes neither the features nor, after the sums, any gradient.

Dims: U pieces, Y bytes of pixels, M merge units (features), X own features.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.config.vision_flops import piece_flops
from mimo_megatron.parallel.mesh import Axis
from mimo_megatron.parallel.spread import loads, spread
from mimo_megatron.types import VisionLayout

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VisionSharing:
    """How the ranks of one stage share out the images of every microbatch."""

    vision: VisionConfig
    text_width: int
    tp_cp: Axis

    def costs(self, grids_I3: Sequence[Grid]) -> list[int]:
        """[U] predicted forward FLOPs of each piece, in pack order."""
        return piece_flops(self.vision, self.text_width, grids_I3)

    def predicted_loads(self, grids_I3: Sequence[Grid]) -> list[int]:
        """Predicted forward FLOPs of each rank."""
        costs = self.costs(grids_I3)
        return loads(costs, spread(costs, self.tp_cp.size), self.tp_cp.size)


@dataclass(frozen=True)
class VisionShare:
    """Where the features stand when the blocks of all ranks, each as long as the longest, lie one after another."""

    num_rows: tuple[int, ...]
    """Features of each rank."""
    order_M: Tensor
    """int64 [M]: the place of every feature of the pack."""

    @property
    def block(self) -> int:
        """Rows of a block."""
        return max(self.num_rows)

    def to(self, device: torch.device) -> "VisionShare":
        return replace(self, order_M=self.order_M.to(device, non_blocking=True))


def share_out(
    pixels_Y: Tensor, layout: VisionLayout, sharing: VisionSharing, pieces_held: Sequence[int] | None = None
) -> tuple[Tensor, VisionLayout, VisionShare]:
    """The pixels this rank encodes with their own layout (perhaps none at all), and where all features stand.

    ``pieces_held`` are those whose pixels are given, where the loader decoded no others: it must be this rank's own.
    """
    ranks_U = spread(sharing.costs(layout.grids_I3), sharing.tp_cp.size)
    own = [piece for piece, rank in enumerate(ranks_U) if rank == sharing.tp_cp.rank]
    if pieces_held is None:
        bounds = _byte_bounds(layout, sharing.vision)
        pixels_Y = torch.cat([pixels_Y[:0], *(pixels_Y[bounds[piece] : bounds[piece + 1]] for piece in own)])
    else:
        assert list(pieces_held) == own, f"the loader decoded the pieces {pieces_held}, this rank encodes {own}"
    merge_factor = sharing.vision.merge_factor
    return pixels_Y, layout_of(layout, own, merge_factor), _share(layout, ranks_U, sharing, merge_factor)


def all_pixels(parts: Sequence[Tensor], layout: VisionLayout, sharing: VisionSharing) -> Tensor:
    """All pixels of a pack, from those that each rank encodes: the way back from ``share_out``."""
    bounds, taken = _byte_bounds(layout, sharing.vision), [0] * len(parts)
    pieces = []
    for piece, rank in enumerate(spread(sharing.costs(layout.grids_I3), sharing.tp_cp.size)):
        end = taken[rank] + bounds[piece + 1] - bounds[piece]
        pieces.append(parts[rank][taken[rank] : end])
        taken[rank] = end
    return torch.cat(pieces)


def _byte_bounds(layout: VisionLayout, vision: VisionConfig) -> list[int]:
    """Where the pixels of each piece begin, and where the last end."""
    sizes = [
        height * width * (vision.still_bytes if is_still else vision.patch_bytes)
        for is_still, (frames, height, width) in zip(layout.stills_I, layout.grids_I3, strict=True)
        for _ in range(frames)
    ]
    return [0, *itertools.accumulate(sizes)]


def layout_of(layout: VisionLayout, pieces: Sequence[int], merge_factor: int) -> VisionLayout:
    """The layout of some pieces of a pack, taken in pack order, as if they were all of it."""
    media = zip(layout.stills_I, layout.grids_I3, strict=True)
    frame_of_piece = [
        (is_still, (1, rows, columns)) for is_still, (count, rows, columns) in media for _ in range(count)
    ]
    rope, order, windows, frames = [layout.rope_hw_P2[:0]], [layout.window_order_M[:0]], [0], [0]
    window_bounds = torch.tensor(layout.window_bounds)
    first_window = torch.searchsorted(window_bounds, torch.tensor(layout.frame_bounds)).tolist()
    for piece in pieces:
        start, end = layout.frame_bounds[piece : piece + 2]
        shift = frames[-1] - start
        rope.append(layout.rope_hw_P2[start:end])
        order.append(layout.window_order_M[start // merge_factor : end // merge_factor] + shift // merge_factor)
        windows += (window_bounds[first_window[piece] + 1 : first_window[piece + 1] + 1] + shift).tolist()
        frames.append(end + shift)
    return VisionLayout(
        grids_I3=tuple(frame_of_piece[piece][1] for piece in pieces),
        stills_I=tuple(frame_of_piece[piece][0] for piece in pieces),
        rope_hw_P2=torch.cat(rope),
        window_order_M=torch.cat(order),
        window_bounds=tuple(windows),
        frame_bounds=tuple(frames),
    )


def _share(layout: VisionLayout, ranks_U: Sequence[int], sharing: VisionSharing, merge_factor: int) -> VisionShare:
    rows_U = [(end - start) // merge_factor for start, end in itertools.pairwise(layout.frame_bounds)]
    num_rows = tuple(loads(rows_U, ranks_U, sharing.tp_cp.size))
    place = [rank * max(num_rows) for rank in range(sharing.tp_cp.size)]
    order = []
    for rows, rank in zip(rows_U, ranks_U, strict=True):
        order.append(torch.arange(place[rank], place[rank] + rows))
        place[rank] += rows
    return VisionShare(num_rows, torch.cat(order))
