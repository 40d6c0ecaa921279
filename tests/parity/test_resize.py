"""Frames resized into patches in C++ against Pillow's resize followed by ``patchify``, bit for bit."""

import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mimo_megatron import _packing
from mimo_megatron.config.presets import preset
from mimo_megatron.data.image import encode_image
from mimo_megatron.data.patches import patchify, resize_to_patches
from tests.parity.test_image_pixels import file_bytes

VISION = preset("tiny-vl").vision
assert VISION is not None
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 500))
UNITS = st.integers(1, 12)


def frame(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Noise, or noise of black and white alone, of which a bicubic overshoots most."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels if seed % 2 else np.where(pixels > 127, 255, 0).astype(np.uint8)


def by_definition(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return patchify(np.asarray(resized)[None], VISION, is_still=True)


def resized(pixels: NDArray[np.uint8], height: int, width: int, way: str = "") -> NDArray[np.uint8]:
    out = np.full((height * width // 196, 588), 7, np.uint8)
    _packing.resize_to_patches(pixels, height, width, 14, 2, 1, 0, out, way)
    return out


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, UNITS, UNITS, st.integers(0, 99))
@example(510, 3, 7, 10, 0)  # both orders of the passes, and rows narrower than what is computed at once
@example(3, 510, 1, 10, 0)
@example(28, 28, 1, 1, 1)
def test_any_frame_at_any_size_is_pillows(in_height: int, in_width: int, rows: int, columns: int, seed: int) -> None:
    pixels = frame(in_height, in_width, seed)
    want = by_definition(pixels, 28 * rows, 28 * columns)
    for way in _packing.resize_ways():
        np.testing.assert_array_equal(resized(pixels, 28 * rows, 28 * columns, way), want, err_msg=way)


@pytest.mark.parametrize(("height", "width"), [(1013, 1400), (2100, 900)])
def test_a_large_frame_is_pillows(height: int, width: int) -> None:
    pixels = frame(height, width, 1)
    np.testing.assert_array_equal(resized(pixels, 700, 840), by_definition(pixels, 700, 840))


def test_the_frames_of_a_video_go_side_by_side_into_its_patches() -> None:
    frames = np.stack([frame(60, 90, seed) for seed in (1, 2)])
    patches_PC = np.zeros((4 * 6, VISION.patch_bytes), np.uint8)
    for number, one in enumerate(frames):
        resize_to_patches(one, (56, 84), VISION, patches_PC, number)
    resized = [Image.fromarray(one).resize((84, 56), Image.Resampling.BICUBIC) for one in frames]
    np.testing.assert_array_equal(patches_PC, patchify(np.stack([np.asarray(one) for one in resized]), VISION))


def test_the_comparison_rejects_a_weight_that_is_off_by_little() -> None:
    """Bilinear is far off; a frame shifted by a hundredth of a pixel is the least fault that we thought of."""
    pixels = frame(300, 400, 1)
    shifted = Image.fromarray(pixels).resize((112, 84), Image.Resampling.BICUBIC, box=(0.01, 0, 400, 300))
    want = patchify(np.asarray(shifted)[None], VISION, is_still=True)
    assert not np.array_equal(resized(pixels, 84, 112), want)


@pytest.mark.parametrize(
    ("shape", "size", "room"),
    [((0, 5, 3), (28, 28), 4), ((5, 5, 4), (28, 28), 4), ((5, 5, 3), (28, 30), 4), ((5, 5, 3), (28, 28), 8)],
    ids=["no rows", "four channels", "no whole units", "too much room"],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], size: tuple[int, int], room: int) -> None:
    with pytest.raises(ValueError, match=r"a frame is bytes of|do not fill"):
        resize_to_patches(np.zeros(shape, np.uint8), size, VISION, np.zeros((room, 588), np.uint8))


def test_memory_is_flat_over_thousands_of_images() -> None:
    files = [file_bytes("YCbCr", height, width) for height, width in [(60, 300), (200, 90), (150, 150), (31, 57)]]

    def read(times: int) -> int:
        for number in range(times):
            encode_image(files[number % 4], VISION, min_pixels=3136, max_pixels=60_000)
        return psutil.Process().memory_info().rss

    before = read(500)
    assert read(2000) - before < 4e6, "2,000 images of 60,000 pixels, 180 KB each"
