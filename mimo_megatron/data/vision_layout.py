"""Where every patch of a pack stands: attention windows, frames, rotary coordinates.

Everything the vision encoder needs beside pixels follows from the grids, so it is computed once, on the CPU, with the
pack. Invariants: window order is a permutation of the merge units that never leaves a frame; both bounds run from 0 to
P; no window is empty.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.types import VisionLayout


def vision_layout(
    grids: Sequence[tuple[int, int, int]], vision: VisionConfig, stills: Sequence[bool] | None = None
) -> VisionLayout:
    """The layout of a pack whose images and videos have these (time, height, width) patch grids, in pack order.

    ``stills`` says which of them are stored as one frame; none, where it is left out.

    Windows cover ``window_size`` pixels squared, row by row over each frame; those cut by the right or lower border
    hold fewer patches.
    """
    merge = vision.spatial_merge_size
    side = vision.window_size // vision.pixel_multiple  # units along one side of a window
    rope_hw, window_of_unit, frame_patches = [], [], []
    num_windows = 0
    for frames, height, width in grids:
        assert height % merge == 0 and width % merge == 0 and min(frames, height, width) > 0, (frames, height, width)
        unit_rows, unit_cols = height // merge, width // merge
        rope_hw.append(np.tile(_patch_coordinates(unit_rows, unit_cols, merge), (frames, 1)))

        windows_across = -(-unit_cols // side)
        windows_in_frame = -(-unit_rows // side) * windows_across
        window_rows = np.arange(unit_rows) // side * windows_across
        window_in_frame = (window_rows[:, None] + np.arange(unit_cols) // side).ravel()
        first_windows = num_windows + np.arange(frames) * windows_in_frame
        window_of_unit.append((first_windows[:, None] + window_in_frame).ravel())
        num_windows += frames * windows_in_frame
        frame_patches.append(np.full(frames, height * width))

    window_M = np.concatenate([np.zeros(0, np.int64), *window_of_unit])
    return VisionLayout(
        grids_I3=tuple((int(t), int(h), int(w)) for t, h, w in grids),
        stills_I=tuple(stills) if stills is not None else (False,) * len(grids),
        rope_hw_P2=torch.from_numpy(np.concatenate([np.zeros((0, 2), np.int64), *rope_hw])),
        window_order_M=torch.from_numpy(np.argsort(window_M, kind="stable")),
        window_bounds=_bounds(np.bincount(window_M) * vision.merge_factor),
        frame_bounds=_bounds(np.concatenate([np.zeros(0, np.int64), *frame_patches])),
    )


def _patch_coordinates(unit_rows: int, unit_cols: int, merge: int) -> np.ndarray:
    """[patches of one frame, 2] row and column, in merge-block order: unit by unit, then inside the unit."""
    rows, cols = np.indices((unit_rows * merge, unit_cols * merge))
    blocks = np.stack([rows, cols], axis=-1).reshape(unit_rows, merge, unit_cols, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def _bounds(counts: np.ndarray) -> tuple[int, ...]:
    return (0, *np.cumsum(counts).tolist())
