"""Every decoder gives Pillow's pixels, accepts the files that Pillow accepts, and is refused by name where missing."""

import importlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimo_megatron.config.run import DecoderName
from mimo_megatron.data import decode
from mimo_megatron.data.decode import decode_rgb
from mimo_megatron.errors import ConfigError, DataError
from tests.parity.test_image_pixels import FORMATS, file_bytes, smooth_noise

SIZES = [(64, 96), (63, 45), (9, 17), (1, 1), (200, 8)]


def jpeg(height: int, width: int, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(smooth_noise(height, width, 3)).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def assert_same_pixels(data: bytes) -> None:
    np.testing.assert_array_equal(decode_rgb(data, "turbo"), decode_rgb(data, "pillow"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_a_jpegs_pixels_are_pillows(subsampling: str, size: tuple[int, int]) -> None:
    for quality, progressive in ((30, False), (90, True), (97, False)):
        assert_same_pixels(jpeg(*size, subsampling=subsampling, quality=quality, progressive=progressive))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_print_colours_are_pillows(mode: str) -> None:
    assert_same_pixels(jpeg(63, 45, mode))


@pytest.mark.parametrize("kind", FORMATS)
def test_other_formats_are_pillows(kind: str) -> None:
    assert_same_pixels(file_bytes(kind, 31, 57))


def test_turbo_decodes_jpegs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons above would compare Pillow with Pillow."""
    monkeypatch.setattr(decode, "_on_white", lambda _image: pytest.fail("Pillow was asked"))
    assert decode_rgb(jpeg(63, 45), "turbo").shape == (63, 45, 3)
    assert decode_rgb(jpeg(63, 45, "L"), "turbo").shape == (63, 45, 3)


def test_another_transform_or_upsampling_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    turbo = importlib.import_module("simplejpeg")
    data = jpeg(64, 96, subsampling="4:2:0")
    want = decode_rgb(data, "pillow")
    for fault in ({"fastdct": True}, {"fastupsample": True}):
        assert not np.array_equal(turbo.decode_jpeg(data, "RGB", **fault), want), fault


@settings(max_examples=150, deadline=None)
@given(st.floats(0.2, 1), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4))
def test_damaged_jpegs_are_accepted_or_refused_alike(kept: float, changes: list[tuple[float, int]]) -> None:
    data = bytearray(jpeg(40, 56))
    for place, value in changes:
        data[int(place * len(data))] = value
    cut = bytes(data[: round(kept * len(data))])
    try:
        want = decode_rgb(cut, "pillow")
    except DataError:
        with pytest.raises(DataError):
            decode_rgb(cut, "turbo")
        return
    np.testing.assert_array_equal(decode_rgb(cut, "turbo"), want)


@pytest.mark.parametrize(("decoder", "remedy"), [("turbo", "pip install simplejpeg"), ("dali", r"megatron\[dali\]")])
def test_a_missing_back_end_is_refused_by_name(
    decoder: DecoderName, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decode._PACKAGES, decoder, "a_package_that_is_not_there")
    decode._package.cache_clear()
    try:
        with pytest.raises(ConfigError, match=rf"data\.decoder is {decoder}.*{remedy}.*data\.decoder=pillow"):
            decode_rgb(jpeg(9, 9), decoder)
        assert decode_rgb(jpeg(9, 9), "pillow").shape == (9, 9, 3)
    finally:
        decode._package.cache_clear()
