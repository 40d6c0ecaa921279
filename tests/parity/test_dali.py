"""DALI's CPU decoder gives Pillow's pixels, also in forked processes and after damaged files. Skipped without DALI."""

import importlib.util
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mimo_megatron.config.presets import preset
from mimo_megatron.data import decode
from mimo_megatron.data.decode import decode_rgb
from mimo_megatron.data.image import encode_image
from mimo_megatron.errors import DataError
from tests.parity.test_decode import SIZES, jpeg
from tests.parity.test_image_pixels import LIMITS

VISION = preset("tiny-vl").vision
assert VISION is not None
HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
pytestmark = pytest.mark.skipif(not HAS_DALI, reason='needs DALI: pip install "mimo-megatron[dali]"')


def assert_pillows_pixels(data: bytes) -> None:
    np.testing.assert_array_equal(decode_rgb(data, "dali"), decode_rgb(data, "pillow"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_pixels_are_pillows(subsampling: str, size: tuple[int, int]) -> None:
    for quality, progressive in ((30, False), (90, True), (97, False)):
        assert_pillows_pixels(jpeg(*size, subsampling=subsampling, quality=quality, progressive=progressive))


def test_grey_print_and_uncoded_colours_are_pillows() -> None:
    for data in (jpeg(63, 45, "L"), jpeg(63, 45, "CMYK"), jpeg(63, 45, keep_rgb=True)):
        assert_pillows_pixels(data)


def test_pixels_are_taken_as_stored_whatever_the_orientation_tag() -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    assert_pillows_pixels(jpeg(56, 112, exif=tag))


def test_dali_decodes_jpegs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons above would compare Pillow with Pillow."""
    monkeypatch.setattr(decode, "_on_white", lambda _image: pytest.fail("Pillow was asked"))
    assert decode_rgb(jpeg(63, 45), "dali").shape == (63, 45, 3)


def test_patches_are_those_of_the_default() -> None:
    data = jpeg(150, 220, subsampling="4:2:0")
    one, other = (encode_image(data, VISION, **LIMITS, decoder=decoder) for decoder in ("dali", "turbo"))
    np.testing.assert_array_equal(one.pixels_PZ, other.pixels_PZ)


def test_what_pillow_accepts_of_damaged_files_dali_gives_alike() -> None:
    """The other way round there are exceptions: DALI gives pixels of a few files that Pillow refuses."""
    rng, whole = np.random.default_rng(0), jpeg(40, 56)
    accepted = refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        damaged = bytes(data[: round(len(data) * rng.choice([1, 1, 0.9]))])
        try:
            want = decode_rgb(damaged, "pillow")
        except DataError:
            refused += 1
            continue
        accepted += 1
        np.testing.assert_array_equal(decode_rgb(damaged, "dali"), want)
    assert accepted > 20 and refused > 10


def test_a_truncated_file_is_refused_and_the_next_one_read() -> None:
    whole = jpeg(90, 90)
    for kept in (0.99, 0.5, 0.05):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_rgb(whole[: round(len(whole) * kept)], "dali")
    assert_pillows_pixels(whole)


def test_threads_and_forked_processes_decode_beside_their_parent() -> None:
    """As the loader's workers do, and worse: the parent has decoded before it forks."""
    files = [jpeg(60 + number, 90) for number in range(8)]
    want = [decode_rgb(data, "pillow") for data in files]
    assert_pillows_pixels(files[0])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        by_process = pool.starmap_async(decode_rgb, [(data, "dali") for data in files]).get(timeout=60)
    with ThreadPoolExecutor(2) as threads:
        by_thread = list(threads.map(decode_rgb, files, ["dali"] * len(files)))
    for found in (by_process, by_thread):
        for one, other in zip(found, want, strict=True):
            np.testing.assert_array_equal(one, other)
