"""Random models, samples and recipes for tests: tiny, but with every feature of the real ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, ModuleTraining, ParallelConfig, RunConfig, SourceConfig, TrainConfig
from mimo_megatron.types import EncodedMedia, EncodedSample

Grid = tuple[int, int, int]


def tiny_model(**text_fields: Any) -> ModelConfig:
    model = preset("tiny-vl")
    return model.model_copy(update={"text": model.text.model_copy(update=text_fields)})


def random_media(grid: Grid, seed: int, seconds_per_grid: float = 0.0) -> EncodedMedia:
    """An image where ``seconds_per_grid`` is 0, else a video; grids are in patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (int(np.prod(grid)), 1176), dtype=np.uint8)
    return EncodedMedia("video" if seconds_per_grid else "image", pixels, grid, seconds_per_grid)


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


def mixed_packs() -> list[list[EncodedSample]]:
    """Four packs: two images of odd shape and text; text only; video and a flat image; one large image."""
    return [
        [random_sample(0, 20, [random_media((1, 10, 6), 0)]), random_sample(1, 9, [random_media((1, 2, 34), 1)])],
        [random_sample(2, 31), random_sample(3, 1 + 1), random_sample(4, 40)],
        [random_sample(5, 12, [random_media((3, 4, 6), 2, 1.5), random_media((1, 4, 4), 3)]), random_sample(6, 17)],
        [random_sample(7, 25, [random_media((1, 18, 10), 4)])],
    ]


def run_config(model: ModelConfig, *, parallel: ParallelConfig | None = None, **train_fields: Any) -> RunConfig:
    """A recipe whose data is never opened: the test brings its own packs. Everything is trained."""
    every = ModuleTraining(lr=1e-3)
    train: dict[str, Any] = dict(steps=4, packs_per_step=4, precision="fp32", vision=every, projector=every, text=every)
    nowhere = Path("/nonexistent")
    return RunConfig(
        name="test",
        dir=nowhere,
        model=model,
        parallel=parallel or ParallelConfig(),
        data=DataConfig(sources=(SourceConfig(path=nowhere),), tokenizer=nowhere, pack_tokens=128, pack_patches=1024),
        train=TrainConfig(**(train | train_fields)),
    )
