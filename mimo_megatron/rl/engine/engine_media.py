"""Prompts as an outside engine wants them: one placeholder for each picture, and the picture itself, resized."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.data.patches import unpatchify
from mimo_megatron.rl.engine.vllm_wire import pixels_hash
from mimo_megatron.types import EncodedMedia, EncodedSample


@dataclass(frozen=True)
class SentMedium:
    """A picture or video on its way to an engine."""

    key: str
    """Equal where pixels, kind, size and time are."""
    pixels: str
    """``pixels_hash`` of the patches that the trainer's encoder reads."""
    media: EncodedMedia


def sent_media(sample: EncodedSample) -> list[SentMedium]:
    """The sample's pictures and videos, in the order of its placeholders."""
    found = []
    for one in sample.media:
        pixels = pixels_hash(one.patches_PC)
        frames, rows, columns = one.grid
        found.append(SentMedium(f"{one.kind}-{frames}x{rows}x{columns}-{one.seconds_per_grid!r}-{pixels}", pixels, one))
    return found


def frames_of(one: EncodedMedia, model: ModelConfig) -> NDArray[np.uint8]:
    """[frames, height, width, 3] pixels, from which patching gives ``one.patches_PC`` again."""
    assert model.vision is not None, "a text model has no media"
    frames = unpatchify(one.patches_PC, one.grid, model.vision)
    return frames[:1] if one.kind == "image" else frames


def collapse(sample: EncodedSample, model: ModelConfig) -> list[int]:
    """The sample's token ids with one placeholder for each picture, as engines expand them again."""
    token_ids_T, media = sample.token_ids_T, sample.media
    placeholders = (model.tokens.image_pad, model.tokens.video_pad)
    slots = np.flatnonzero(np.isin(token_ids_T, placeholders))
    keep = np.ones(len(token_ids_T), np.bool_)
    first = 0
    for one in media:
        num_merged = one.num_patches // model.vision.merge_factor if model.vision else 0
        keep[slots[first + 1 : first + num_merged]] = False
        first += num_merged
    assert first == len(slots), (first, len(slots))
    return token_ids_T[keep].tolist()
