"""Prompts on their way to an outside engine: placeholders collapsed, pictures whole again, what it reads compared."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_megatron.config.presets import preset
from mimo_megatron.data.patches import patchify, unpatchify
from mimo_megatron.errors import EngineError
from mimo_megatron.rl.engine import vllm_wire as wire
from mimo_megatron.rl.engine.engine_media import collapse, frames_of, sent_media
from mimo_megatron.rl.engine.vllm import check_report
from mimo_megatron.types import EncodedMedia, EncodedSample

MODEL = preset("tiny-vl")
assert MODEL.vision is not None
VISION = MODEL.vision
TOKENS = MODEL.tokens


def medium(kind: str, frames: int, rows: int, columns: int, seed: int = 0, seconds: float = 0.0) -> EncodedMedia:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 28 * rows, 28 * columns, 3), dtype=np.uint8)
    grid = (-(-frames // 2), 2 * rows, 2 * columns)
    return EncodedMedia(kind, patchify(pixels, VISION), grid, seconds)  # type: ignore[arg-type]


def sample_of(*media: EncodedMedia) -> EncodedSample:
    ids = [TOKENS.turn_start, 20]
    for one in media:
        pad = TOKENS.image_pad if one.kind == "image" else TOKENS.video_pad
        ids += [TOKENS.vision_start, *[pad] * (one.num_patches // 4), TOKENS.vision_end, 30]
    return EncodedSample("s", np.array(ids, np.int64), np.zeros(len(ids), np.bool_), media)


def report_of(sample: EncodedSample) -> dict:
    """What an engine says that reads the sample as the trainer does."""
    pixels: dict[str, list[str]] = {}
    for one in sample.media:
        pixels.setdefault(one.kind, []).append(wire.pixels_hash(one.patches_PC))
    seconds = [float(np.float32(one.seconds_per_grid)) for one in sample.media if one.kind == "video"]
    ids_hash = wire.ids_hash(sample.token_ids_T)
    return {"num_tokens": sample.num_tokens, "ids_hash": ids_hash, "pixels": pixels, "seconds": seconds}


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_unpatchify_gives_the_pixels_back_with_the_last_frame_repeated(frames, rows, columns, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 28 * rows, 28 * columns, 3), dtype=np.uint8)
    patches = patchify(pixels, VISION)
    again = unpatchify(patches, (-(-frames // 2), 2 * rows, 2 * columns), VISION)
    assert np.array_equal(again[:frames], pixels)
    assert all(np.array_equal(one, pixels[-1]) for one in again[frames:])
    assert np.array_equal(patchify(again, VISION), patches)


def test_a_picture_goes_as_one_frame_and_a_video_as_all_of_them():
    assert frames_of(medium("image", 1, 2, 3), MODEL).shape == (1, 56, 84, 3)
    assert frames_of(medium("video", 5, 2, 3, seconds=1.0), MODEL).shape == (6, 56, 84, 3)


def test_collapse_leaves_one_placeholder_for_each_picture_and_all_else():
    sample = sample_of(medium("image", 1, 2, 3), medium("video", 4, 1, 2, seconds=1.0), medium("image", 1, 1, 1))
    start, end = TOKENS.vision_start, TOKENS.vision_end
    assert collapse(sample, MODEL) == [
        TOKENS.turn_start, 20, start, TOKENS.image_pad, end, 30, start, TOKENS.video_pad, end, 30,
        start, TOKENS.image_pad, end, 30,
    ]  # fmt: skip
    words = sample_of()
    assert collapse(words, MODEL) == words.token_ids_T.tolist()


def test_equal_pictures_have_one_key_and_another_size_or_time_has_another():
    one, again, other = (medium("image", 1, 2, 3, seed) for seed in (0, 0, 1))
    turned = replace(one, grid=(1, 6, 4))
    keys = [sent.key for sent in sent_media(sample_of(one, again, other, turned))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    slow, fast = (medium("video", 4, 1, 1, seconds=seconds) for seconds in (1.0, 0.5))
    assert len({sent.key for sent in sent_media(sample_of(slow, fast))}) == 2


@pytest.mark.parametrize("fault", ["none", "length", "ids", "pixels", "seconds"])
def test_a_prompt_that_the_engine_reads_otherwise_is_an_error(fault):
    sample = sample_of(medium("image", 1, 2, 3), medium("video", 5, 1, 2, seconds=2 / 1.2))
    report = report_of(sample)
    if fault == "none":
        return check_report(sample, report)
    if fault == "length":
        report["num_tokens"] += 1
    elif fault == "ids":
        report["ids_hash"] = wire.ids_hash(sample.token_ids_T[::-1].copy())
    elif fault == "seconds":
        report["seconds"] = [1.0]
    else:
        patches = sample.media[0].patches_PC.copy()
        patches[3, 5] ^= 1
        report["pixels"]["image"] = [wire.pixels_hash(patches)]
    with pytest.raises(EngineError, match="vLLM"):
        check_report(sample, report)
