"""Frames cut into patches: whole merge units row by row, then the patches of a unit; a patch is channel-first.

A patch of a video holds the frames of its temporal step; one of a still image a single frame, ``still_bytes`` long.
``resize_to_patches`` is Pillow's bicubic resize followed by ``patchify``, bit for bit, in one pass in C++ and without
the GIL (csrc/resize.cpp). Pillow's from its release 13: older ones order the passes otherwise for some tall images.
"""

import numpy as np
from numpy.typing import NDArray

from mimo_megatron import _packing
from mimo_megatron.config.model import VisionConfig


def resize_to_patches(
    frame_HW3: NDArray[np.uint8],
    size: tuple[int, int],
    vision: VisionConfig,
    patches_PZ: NDArray[np.uint8],
    number: int = 0,
) -> None:
    """Write the frame, resized to ``size`` (height, width), into its patches, as the ``number``-th frame of each.

    ``patches_PZ`` is contiguous and has as many frames a patch as its width says.
    """
    frames = patches_PZ.shape[1] // vision.still_bytes
    _packing.resize_to_patches(
        frame_HW3, *size, vision.patch_size, vision.spatial_merge_size, frames, number, patches_PZ
    )


def patchify(frames_FHW3: NDArray[np.uint8], vision: VisionConfig, *, is_still: bool = False) -> NDArray[np.uint8]:
    """[P, Z] patches, step after step; Z is ``patch_bytes``, or ``still_bytes`` of a still.

    The last frame is repeated to fill the last step.
    """
    time, patch, merge = 1 if is_still else vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    if missing := -len(frames_FHW3) % time:
        frames_FHW3 = np.concatenate([frames_FHW3, np.repeat(frames_FHW3[-1:], missing, axis=0)])
    num_frames, height, width, channels = frames_FHW3.shape
    unit = merge * patch
    blocks = frames_FHW3.reshape(
        num_frames // time, time, height // unit, merge, patch, width // unit, merge, patch, channels
    )
    return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * time * patch * patch)


def unpatchify(patches_PC: NDArray[np.uint8], grid: tuple[int, int, int], vision: VisionConfig) -> NDArray[np.uint8]:
    """[frames, height, width, 3] pixels: the inverse of ``patchify``, repeated last frame included."""
    time, patch, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    steps, rows, columns = grid
    blocks = patches_PC.reshape(steps, rows // merge, columns // merge, merge, merge, -1, time, patch, patch)
    frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(steps * time, rows * patch, columns * patch, -1)
