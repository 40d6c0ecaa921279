"""What is proven on: random samples with every shape of input that a pack can hold, the same on every call."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mimo_megatron.config.presets import preset
from mimo_megatron.types import EncodedMedia, EncodedSample

Grid = tuple[int, int, int]
Packs = list[list[EncodedSample]]
MOST_ROLLOUTS = 16
"""Responses are numbered below it."""


def random_media(grid: Grid, seed: int, seconds_per_grid: float = 0.0) -> EncodedMedia:
    """An image where ``seconds_per_grid`` is 0, else a video; grids are in patches."""
    draw, num_patches = np.random.default_rng(seed), int(np.prod(grid))
    if seconds_per_grid:
        return EncodedMedia("video", draw.integers(0, 256, (num_patches, 1176), dtype=np.uint8), grid, seconds_per_grid)
    return EncodedMedia("image", draw.integers(0, 256, (num_patches, 588), dtype=np.uint8), grid, frame_repeats=2)


def random_sample(seed: int, num_text: int, media: Sequence[EncodedMedia] = ()) -> EncodedSample:
    """Media first, each between its marks, then text; about half of the text tokens are trained."""
    tokens = preset("tiny-vl").tokens
    draw = np.random.default_rng(seed)
    ids: list[int] = []
    for one in media:
        pad = tokens.image_pad if one.kind == "image" else tokens.video_pad
        ids += [tokens.vision_start, *[pad] * (one.num_patches // 4), tokens.vision_end]
    num_context = len(ids)
    ids += draw.integers(16, 512, num_text).tolist()
    mask = draw.random(len(ids)) < 0.5
    mask[: num_context + 1] = False
    mask[-1] = True
    return EncodedSample(f"sample-{seed}", np.array(ids, np.int64), mask, tuple(media))


def image(height: int, width: int, seed: int) -> EncodedMedia:
    """An image of ``height`` x ``width`` patches."""
    return random_media((1, height, width), seed)


def mixed() -> Packs:
    """Two images of odd shape and text; text only; video and a flat image; one large image."""
    return [
        [random_sample(0, 20, [image(10, 6, 0)]), random_sample(1, 9, [image(2, 34, 1)])],
        [random_sample(2, 31), random_sample(3, 1 + 1), random_sample(4, 40)],
        [random_sample(5, 12, [random_media((3, 4, 6), 2, 1.5), image(4, 4, 3)]), random_sample(6, 17)],
        [random_sample(7, 25, [image(18, 10, 4)])],
    ]


def several_images() -> Packs:
    """Two and three images a sample, some cut by a window's border."""
    return [
        [random_sample(10, 13, [image(10, 6, 10), image(4, 12, 11)]), random_sample(11, 5, [image(2, 2, 12)])],
        [random_sample(12, 7, [image(6, 6, 13), image(2, 8, 14), image(8, 2, 15)])],
        [random_sample(13, 21, [image(8, 8, 16)]), random_sample(14, 11, [image(12, 4, 17)])],
        [random_sample(15, 9, [image(4, 4, 18), image(10, 10, 19)])],
    ]


def video() -> Packs:
    """Clips of one to four grid steps, one beside an image."""
    return [
        [random_sample(20, 12, [random_media((4, 4, 6), 20, 0.5)])],
        [random_sample(21, 9, [random_media((2, 6, 6), 21, 1.0), image(4, 4, 22)])],
        [random_sample(22, 15, [random_media((1, 10, 4), 23, 2.0)]), random_sample(23, 10)],
        [random_sample(24, 8, [random_media((3, 4, 4), 24, 1.5)])],
    ]


def text_only() -> Packs:
    return [[random_sample(30 + 2 * pack, 29 + pack), random_sample(31 + 2 * pack, 40)] for pack in range(4)]


def zero_image_ranks() -> Packs:
    """Every other pack has no image: with two data-parallel ranks, one of them never sees one."""
    with_images, without = several_images(), text_only()
    return [with_images[0], without[0], with_images[1], without[1]]


def giant_image() -> Packs:
    """One image that fills its pack; nothing else has one."""
    return [[random_sample(40, 7, [image(16, 20, 40)])], *text_only()[:3]]


def odd_segments() -> Packs:
    """Segments of 1, 3 and odd lengths, cut anywhere by context parallelism; an image across every cut."""
    return [
        [random_sample(50, 1), random_sample(51, 3), random_sample(52, 11, [image(14, 6, 50)]), random_sample(53, 41)],
        [random_sample(54, 47), random_sample(55, 1), random_sample(56, 1), random_sample(57, 45)],
        [random_sample(58, 23), random_sample(59, 5, [image(10, 16, 51)]), random_sample(60, 13)],
        [random_sample(61, 95)],
    ]


def pairs() -> Packs:
    """Two responses to each prompt, side by side: one pair, two, none, and one whose members differ in length most."""

    def pair(seed: int, lengths: tuple[int, int], media: Sequence[EncodedMedia] = ()) -> list[EncodedSample]:
        members = [random_sample(seed + 100 * place, length, media) for place, length in enumerate(lengths)]
        return [replace(one, reads_reward=True) for one in members]

    return [
        [*pair(70, (12, 9), [image(6, 6, 70)]), *pair(71, (20, 5))],
        pair(72, (31, 17), [image(4, 10, 71)]),
        [],
        pair(73, (2, 77)),
    ]


def rollouts() -> Packs:
    """Responses with advantages of both signs, weights and log-probabilities of others; two to one picture; a pack
    without any; a response of one token."""

    def response(number: int, num_prompt: int, length: int, media: Sequence[EncodedMedia] = ()) -> EncodedSample:
        sample = random_sample(80 + number, num_prompt + length, media)
        is_response_T = np.arange(sample.num_tokens) >= sample.num_tokens - length
        draw = np.random.default_rng(number)
        columns = {
            "advantage": np.full(sample.num_tokens, draw.normal()),
            "weight": np.full(sample.num_tokens, draw.uniform(0.5, 2)),
            "row": np.full(sample.num_tokens, float(number)),
            **{
                f"{whose}_logprob": draw.normal(-6.2, 0.2, sample.num_tokens)
                for whose in ("engine", "old", "reference")
            },
        }
        columns = {name: (is_response_T * column_T).astype(np.float32) for name, column_T in columns.items()}
        return replace(sample, loss_mask_T=is_response_T, columns=columns)

    of_both = image(6, 6, 80)
    return [
        [response(0, 6, 9, [of_both]), response(1, 6, 14, [of_both]), response(2, 9, 1)],
        [response(3, 31, 40)],
        [],
        [response(4, 5, 12, [random_media((2, 4, 6), 81, 1.0)]), response(5, 3, 33)],
    ]


PACKS: Mapping[str, Packs] = {
    make.__name__: make()
    for make in (mixed, several_images, video, text_only, zero_image_ranks, giant_image, odd_segments, pairs, rollouts)
}
