"""Three-axis positions against transformers' ``get_rope_index`` for Qwen2.5-VL.

After a video that lasts longer than it is wide, transformers 5 continues the text at start + max(height, width): our
``video_advance`` "frame". The paper, the code the weights were released with, and transformers' own decoding (its
``rope_deltas``) continue at the largest position + 1: our "time", compared with transformers' positions of each stretch
of text and medium, joined by its own deltas.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.data.positions import mrope_positions
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedMedia

MODEL = preset("tiny-vl")
TEXT = 7


def medium(kind: str, grid: tuple[int, int, int], seconds_per_grid: float = 0.0) -> EncodedMedia:
    return EncodedMedia(kind, np.zeros((0, 1176), np.uint8), grid, seconds_per_grid)  # type: ignore[arg-type]


def with_advance(advance: str, tokens_per_second: float = 2.0) -> ModelConfig:
    assert MODEL.vision is not None
    update = {"video_advance": advance, "tokens_per_second": tokens_per_second}
    return MODEL.model_copy(update={"vision": MODEL.vision.model_copy(update=update)})


def random_stretch(rng: np.random.Generator) -> tuple[list[int], EncodedMedia]:
    """Some text, then one image or video, some of which last longer than they are wide."""
    height, width = (2 * int(side) for side in rng.integers(1, 9, 2))
    one, pad = medium("image", (1, height, width)), MODEL.tokens.image_pad
    if rng.random() < 0.5:
        seconds = float(rng.choice([0.5, 1.0, rng.uniform(0, 4)]))
        one, pad = medium("video", (int(rng.integers(1, 12)), height, width), seconds), MODEL.tokens.video_pad
    num_text = int(rng.integers(1, 6))  # transformers tells neighbouring media apart by the text between them
    return [TEXT] * num_text + [pad] * (one.num_patches // 4), one


def hf_positions(
    token_ids: list[int], media: list[EncodedMedia], tokens_per_second: float = 2.0
) -> tuple[torch.Tensor, int]:
    """([3, T] positions, the position that follows the last)."""
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
        ),
        get_vision_position_ids=partial(Qwen2_5_VLModel.get_vision_position_ids, None),
    )
    grids = {kind: [one.grid for one in media if one.kind == kind] for kind in ("image", "video")}
    ids = torch.tensor([token_ids])
    is_image, is_video = ids == MODEL.tokens.image_pad, ids == MODEL.tokens.video_pad
    positions, delta = Qwen2_5_VLModel.get_rope_index(
        model,
        ids,
        is_image.int() + 2 * is_video.int(),
        torch.tensor(grids["image"]),
        torch.tensor(grids["video"]),
        torch.tensor([one.seconds_per_grid for one in media if one.kind == "video"]),
    )
    return positions[:, 0], len(token_ids) + int(delta)


def random_layout(seed: int) -> list[tuple[list[int], list[EncodedMedia]]]:
    rng = np.random.default_rng(seed)
    stretches = [random_stretch(rng) for _ in range(rng.integers(0, 5))]
    tail = [TEXT] * int(rng.integers(1, 6))
    return [*((ids, [one]) for ids, one in stretches), (tail, [])]


def joined(layout: list[tuple[list[int], list[EncodedMedia]]]) -> tuple[list[int], list[EncodedMedia]]:
    return [i for ids, _ in layout for i in ids], [one for _, media in layout for one in media]


def test_positions_equal_hf_on_random_layouts() -> None:
    model = with_advance("frame")
    for seed in range(1000):
        token_ids, media = joined(random_layout(seed))
        want, _ = hf_positions(token_ids, media)
        np.testing.assert_array_equal(mrope_positions(np.array(token_ids), media, model), want, err_msg=f"seed {seed}")


def test_text_after_a_video_starts_past_its_last_moment() -> None:
    model = with_advance("time")
    num_differing = 0
    for seed in range(1000):
        layout = random_layout(seed)
        stretches, start = [], 0
        for token_ids, media in layout:
            stretch, length = hf_positions(token_ids, media)
            stretches.append(stretch + start)
            start += length
        want, (token_ids, media) = torch.cat(stretches, 1), joined(layout)
        np.testing.assert_array_equal(mrope_positions(np.array(token_ids), media, model), want, err_msg=f"seed {seed}")
        num_differing += not torch.equal(want, hf_positions(token_ids, media)[0])
    assert num_differing > 100  # the layouts do tell the two rules apart


@pytest.mark.parametrize("tokens_per_second", [1.0, 2.0, 4.0, 25.0, 41.0])
def test_times_truncate_as_in_hf(tokens_per_second: float) -> None:
    """Products near whole numbers, where the rounding of the multiplication decides."""
    for frame_rate in (0.7, 1.0, 1.3, 2.0, 2.06, 3.0, 23.976, 24.0, 24.97, 29.97, 30.0):
        token_ids, media = [MODEL.tokens.video_pad] * 400, [medium("video", (400, 2, 2), 2 / frame_rate)]
        want, _ = hf_positions(token_ids, media, tokens_per_second)
        got = mrope_positions(np.array(token_ids), media, with_advance("time", tokens_per_second))
        np.testing.assert_array_equal(got, want)


def test_text_alone_counts_up_on_all_axes() -> None:
    np.testing.assert_array_equal(mrope_positions(np.full(9, TEXT), [], MODEL), np.tile(np.arange(9), (3, 1)))


def test_neighbouring_media_need_no_text_between_them() -> None:
    media = [medium("image", (1, 2, 4)), medium("image", (1, 4, 2)), medium("video", (2, 2, 2), 1.0)]
    image, video = MODEL.tokens.image_pad, MODEL.tokens.video_pad
    got = mrope_positions(np.array([image] * 4 + [video] * 2 + [TEXT]), media, with_advance("time"))
    np.testing.assert_array_equal(got, [[0, 0, 2, 2, 4, 6, 7], [0, 0, 2, 3, 4, 4, 7], [0, 1, 2, 2, 4, 4, 7]])


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([5, 5, 5], "3 image and video placeholders for 4 merged vision tokens of 1 media"),
        ([5, 5, TEXT, 5, 5], "medium 0 .image, grid .1, 4, 4.. needs 4 placeholders 5 in one run, but slots 0 to 4"),
        ([6, 6, 6, 6], "needs 4 placeholders 5 in one run"),
    ],
    ids=["too few", "torn", "wrong kind"],
)
def test_placeholders_that_do_not_fit_are_named(token_ids: list[int], message: str) -> None:
    assert (MODEL.tokens.image_pad, MODEL.tokens.video_pad) == (5, 6)
    with pytest.raises(DataError, match=message):
        mrope_positions(np.array(token_ids), [medium("image", (1, 4, 4))], MODEL)


def test_the_comparison_rejects_a_slightly_wrong_time_scale() -> None:
    token_ids, media = [MODEL.tokens.video_pad] * 100, [medium("video", (100, 2, 2), 1.0)]
    want, _ = hf_positions(token_ids, media)
    assert not np.array_equal(mrope_positions(np.array(token_ids), media, with_advance("time", 2.02)), want)
