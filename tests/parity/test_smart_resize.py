"""Resized shapes against transformers' Qwen2-VL image processor."""

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from mimo_megatron.data.image import smart_resize
from mimo_megatron.errors import DataError


def random_shapes(count: int) -> list[tuple[int, int]]:
    """Sides from 1 to 20,000 pixels, evenly over orders of magnitude; ratios on both sides of the limit."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, np.log(20_000), (count, 2))).astype(int)
    edges = [
        (1, 1),
        (1, 200),
        (200, 1),
        (1, 201),
        (201, 1),
        (2, 400),
        (2, 401),
        (14, 14),
        (28, 5600),
        (42, 70),
        (13, 2600),
    ]
    return [*edges, *map(tuple, sides.tolist())]


@pytest.mark.parametrize("limits", [(3136, 12_845_056), (3136, 1_003_520), (200_704, 602_112), (1, 10_000), (784, 784)])
@pytest.mark.parametrize("multiple", [28, 32])
def test_shapes_equal_hf_on_random_sizes(limits: tuple[int, int], multiple: int) -> None:
    min_pixels, max_pixels = limits
    num_refused = 0
    for height, width in random_shapes(1000):
        try:
            want = hf_smart_resize(height, width, multiple, min_pixels, max_pixels)
        except ValueError:
            num_refused += 1
            with pytest.raises(DataError, match=f"height {height} and width {width}.*ratio at most 200; crop or drop"):
                smart_resize(height, width, multiple=multiple, min_pixels=min_pixels, max_pixels=max_pixels)
            continue
        got = smart_resize(height, width, multiple=multiple, min_pixels=min_pixels, max_pixels=max_pixels)
        assert got == want, (height, width)
    assert 50 < num_refused < 500  # the sizes exercise both outcomes


def test_limits_that_exclude_everything_are_refused() -> None:
    with pytest.raises(DataError, match=r"0 < min_pixels \(100\) <= max_pixels \(50\)"):
        smart_resize(60, 60, multiple=28, min_pixels=100, max_pixels=50)
