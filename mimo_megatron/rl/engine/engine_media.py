"""Prompts as an outside engine wants them: one placeholder for each picture, and the picture itself, resized."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.data.patches import unpatchify
from mimo_megatron.data.positions import mrope_positions
from mimo_megatron.errors import EngineError
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


def check_video_rules(sample: EncodedSample, model: ModelConfig) -> None:
    """``EngineError`` where vLLM would place the sample's videos in time otherwise than the trainer does."""
    videos = [one for one in sample.media if one.kind == "video"]
    if not videos:
        return
    assert model.vision is not None
    if model.vision.video_advance != "time":
        raise EngineError(
            f"sample {sample.id!r} has a video, and vision.video_advance of {model.name!r} is "
            f"{model.vision.video_advance!r}: vLLM counts on after a video by 'time' only; train such a model with it, "
            "or use rollout.engine=embedded"
        )
    for one in videos:
        steps = np.arange(one.grid[0])
        # vLLM multiplies in float64 what its processor stored in float32
        theirs = (steps * (float(np.float32(2 / (2 / one.seconds_per_grid))) * model.vision.tokens_per_second)).astype(
            np.int64
        )
        ours = _time_positions(one, sample, model)
        if not np.array_equal(theirs, ours):
            raise EngineError(
                f"sample {sample.id!r}: at {one.seconds_per_grid} s a step, rounding puts a frame of a video elsewhere "
                "in vLLM than in the trainer; sample the video at another rate"
            )


def _time_positions(one: EncodedMedia, sample: EncodedSample, model: ModelConfig) -> NDArray[np.int64]:
    """[temporal steps] the trainer's time positions of a video, from its own start."""
    assert model.vision is not None
    num_merged = one.num_patches // model.vision.merge_factor
    alone = np.full(num_merged, model.tokens.video_pad, np.int64)
    return mrope_positions(alone, [one], model)[0, :: num_merged // one.grid[0]]
