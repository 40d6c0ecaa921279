"""Patches of encoded images against transformers' Qwen2-VL image processor (its Pillow backend), and damaged files."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mimo_megatron.config.presets import preset
from mimo_megatron.data.decode import image_size
from mimo_megatron.data.image import encode_image
from mimo_megatron.errors import DataError
from mimo_megatron.model.patch_embed import PIXEL_MEAN, PIXEL_STD
from mimo_megatron.types import EncodedMedia

VISION = preset("tiny-vl").vision
assert VISION is not None
LIMITS = dict(min_pixels=3136, max_pixels=60_000)
SIZES = [(1, 1), (1, 150), (150, 1), (28, 28), (37, 53), (300, 40), (45, 390), (500, 400), (14, 2800)]
FORMATS = {
    "RGB": "PNG", "L": "PNG", "1": "PNG", "LA": "PNG", "RGBA": "PNG", "P": "PNG", "YCbCr": "JPEG",
    "CMYK": "TIFF", "palette with one transparent colour": "GIF", "lossy": "WEBP",
}  # fmt: skip


def smooth_noise(height: int, width: int, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise with structure at several scales, so that a wrong filter or a shifted pixel shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 160, (height // 8 + 1, width // 8 + 1, channels)).repeat(8, 0).repeat(8, 1)
    return (coarse[:height, :width] + rng.integers(0, 96, (height, width, channels))).astype(np.uint8)


def file_bytes(kind: str, height: int, width: int) -> bytes:
    pixels = smooth_noise(height, width, 4)
    if kind in ("lossy", "P", "palette with one transparent colour"):
        image = Image.fromarray(pixels[:, :, :3])
        image = image if kind == "lossy" else image.quantize(16)
    else:
        image = Image.fromarray(pixels, "RGBA").convert(kind)
    out = io.BytesIO()
    image.save(out, FORMATS[kind], **({"transparency": 3} if "transparent" in kind else {}))
    return out.getvalue()


def hf_pixels(data: bytes) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    processor = Qwen2VLImageProcessorPil(**LIMITS)
    with Image.open(io.BytesIO(data)) as image:
        out = processor(image, return_tensors="np")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


def normalized(one: EncodedMedia) -> NDArray[np.float64]:
    mean, std = (np.repeat(values, 392) for values in (PIXEL_MEAN, PIXEL_STD))
    return (one.patches_PC / 255 - mean) / std


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_patches_of_any_size_equal_hf(height: int, width: int) -> None:
    data = file_bytes("RGB", height, width)
    one = encode_image(data, VISION, **LIMITS)
    want, grid = hf_pixels(data)
    assert one.grid == grid and one.patches_PC.shape == (one.num_patches, 1176) == want.shape
    np.testing.assert_allclose(normalized(one), want, rtol=0, atol=1e-6)  # one pixel level is 0.014


@pytest.mark.parametrize("kind", FORMATS)
def test_patches_of_any_colour_mode_equal_hf(kind: str) -> None:
    data = file_bytes(kind, 93, 147)
    one = encode_image(data, VISION, **LIMITS)
    np.testing.assert_allclose(normalized(one), hf_pixels(data)[0], rtol=0, atol=1e-6)
    assert np.ptp(one.patches_PC) > 50  # the picture survived


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF"), (np.float32, "TIFF")]
)
def test_gray_of_more_than_8_bits_is_refused_from_its_header_where_hf_makes_it_white(dtype: type, kind: str) -> None:
    """As medical images and depth maps are stored."""
    out = io.BytesIO()
    Image.fromarray((smooth_noise(56, 84, 1)[:, :, 0] * 200.0).astype(dtype)).save(out, kind)
    white = (1 - np.repeat(PIXEL_MEAN, 392)) / np.repeat(PIXEL_STD, 392)
    assert (np.abs(hf_pixels(out.getvalue())[0] - white) < 1e-6).mean() > 0.95
    for read in (image_size, lambda data: encode_image(data, VISION, **LIMITS)):
        with pytest.raises(DataError, match=r"gray of more than 8 bits, mode (I|F).*write it with 8"):
            read(out.getvalue())


def test_a_transparent_image_lies_on_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (56, 56), (255, 0, 0, 0)).save(out, "PNG")
    assert (encode_image(out.getvalue(), VISION, **LIMITS).patches_PC == 255).all()


def test_pixels_are_taken_as_stored_whatever_the_orientation_tag() -> None:
    image, tag = Image.fromarray(smooth_noise(56, 112, 3)), Image.Exif()
    tag[0x0112] = 6  # "rotate by 90 degrees to view"
    plain, tagged = io.BytesIO(), io.BytesIO()
    image.save(plain, "PNG")
    image.save(tagged, "PNG", exif=tag)
    assert image_size(tagged.getvalue()) == (56, 112)
    one, other = (encode_image(out.getvalue(), VISION, **LIMITS) for out in (plain, tagged))
    np.testing.assert_array_equal(one.patches_PC, other.patches_PC)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_header_gives_the_size(kind: str) -> None:
    data = file_bytes(kind, 31, 57)
    assert image_size(data) == (31, 57)


def test_a_still_image_shows_its_frame_twice() -> None:
    patches_PC = encode_image(file_bytes("RGB", 60, 90), VISION, **LIMITS).patches_PC
    first, second = patches_PC.reshape(-1, 3, 2, 196).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "only a magic"])
def test_what_is_no_image_is_refused_with_the_remedy(data: bytes) -> None:
    for read in (image_size, lambda data: encode_image(data, VISION, **LIMITS)):
        with pytest.raises(DataError, match=f"image of {len(data)} bytes cannot be decoded .*drop the sample"):
            read(data)


@pytest.mark.parametrize("kind", ["RGB", "YCbCr", "CMYK", "lossy"])
def test_a_truncated_image_is_refused(kind: str) -> None:
    data = file_bytes(kind, 90, 90)
    with pytest.raises(DataError, match="cannot be decoded"):
        encode_image(data[: len(data) // 2], VISION, **LIMITS)


@given(
    st.sampled_from(["RGB", "P", "YCbCr", "CMYK", "lossy", "palette with one transparent colour"]),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_damage_never_raises_anything_but_a_data_error(
    kind: str, kept: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(file_bytes(kind, 29, 31))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        one = encode_image(bytes(data[: round(kept * len(data))]), VISION, **LIMITS)
    except DataError:
        return
    assert len(one.patches_PC) == one.num_patches


def test_the_comparison_rejects_another_filter_and_another_patch_order() -> None:
    data = file_bytes("RGB", 93, 147)
    want, (_, height, width) = hf_pixels(data)
    with Image.open(io.BytesIO(data)) as image:
        bilinear = io.BytesIO()
        image.resize((width * 14, height * 14), Image.Resampling.BILINEAR).save(bilinear, "PNG")
    assert np.abs(normalized(encode_image(bilinear.getvalue(), VISION, **LIMITS)) - want).max() > 0.1
    row_by_row = want.reshape(height // 2, width // 2, 2, 2, -1).transpose(0, 2, 1, 3, 4).reshape(want.shape)
    assert np.abs(normalized(encode_image(data, VISION, **LIMITS)) - row_by_row).max() > 0.1
