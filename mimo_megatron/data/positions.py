"""The three-axis positions (time, height, width) of one sample's tokens, for M-RoPE with absolute time.

Text counts 0, 1, 2, ... on all three axes. A medium's tokens share a start and spread over its grid, a video's time
axis in units of ``1 / tokens_per_second`` seconds. What follows starts one past the largest of its positions
(``vision.video_advance`` "time") or, after videos too, one past the largest row or column ("frame", as transformers 5
does: the text then starts inside the time of a video that lasts longer than it is wide).
Invariants: a sample's first position is 0; each run of text or medium starts past the one before, by the chosen rule.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedMedia


def mrope_positions(
    token_ids_T: NDArray[np.int64], media: Sequence[EncodedMedia], model: ModelConfig
) -> NDArray[np.int64]:
    """int64 [3, T] time, height and width position of each token.

    ``token_ids_T`` holds one placeholder for each merged vision token, in the order of ``media``.
    """
    placeholder_slots = np.flatnonzero(
        (token_ids_T == model.tokens.image_pad) | (token_ids_T == model.tokens.video_pad)
    )
    grids = [_media_positions(one, model) for one in media]
    num_expected = sum(grid.shape[1] for grid in grids)
    if len(placeholder_slots) != num_expected:
        raise DataError(
            f"{len(placeholder_slots)} image and video placeholders for {num_expected} merged vision tokens of "
            f"{len(media)} media; write one placeholder per merged token"
        )
    positions_3T = np.empty((3, len(token_ids_T)), np.int64)
    first_axis = 1 if model.vision and model.vision.video_advance == "frame" else 0
    next_slot = next_position = first = 0
    for number, (one, grid_3M) in enumerate(zip(media, grids, strict=True)):
        slots = placeholder_slots[first : first + grid_3M.shape[1]]
        first += len(slots)
        start, end = int(slots[0]), int(slots[-1]) + 1
        placeholder = model.tokens.image_pad if one.kind == "image" else model.tokens.video_pad
        if end - start != len(slots) or (token_ids_T[slots] != placeholder).any():
            raise DataError(
                f"medium {number} ({one.kind}, grid {one.grid}) needs {len(slots)} placeholders {placeholder} in one "
                f"run, but slots {start} to {end - 1} hold other tokens; keep its placeholders together and in order"
            )
        next_position = _count_text(positions_3T[:, next_slot:start], next_position)
        positions_3T[:, start:end] = next_position + grid_3M
        next_position += int(grid_3M[first_axis:].max()) + 1
        next_slot = end
    _count_text(positions_3T[:, next_slot:], next_position)
    return positions_3T


def _count_text(positions_3T: NDArray[np.int64], first: int) -> int:
    """Fills a run of text in place; returns the position after it."""
    positions_3T[:] = np.arange(first, first + positions_3T.shape[1])
    return first + positions_3T.shape[1]


def _media_positions(one: EncodedMedia, model: ModelConfig) -> NDArray[np.int64]:
    """[3, merged tokens] positions of one medium, from 0.

    Time is multiplied out in float32 and then truncated, as in transformers; the last bit can decide. Sampled at 1.3
    frames a second, step 39 stands at 60 s: position 120 in float32, but 119 in float64.
    """
    assert model.vision is not None, "a text model has no media"
    merge = model.vision.spatial_merge_size
    frames, height, width = one.grid
    interval = np.float32(model.vision.tokens_per_second) * np.float32(one.seconds_per_grid)
    time = (np.arange(frames, dtype=np.float32) * interval).astype(np.int64)
    axes = np.meshgrid(time, np.arange(height // merge), np.arange(width // merge), indexing="ij")
    return np.stack(axes).reshape(3, -1)
