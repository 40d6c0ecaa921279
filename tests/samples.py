"""Random models, samples and recipes for tests: tiny, but with every feature of the real ones."""

from pathlib import Path
from typing import Any

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, ModuleTraining, ParallelConfig, RunConfig, SourceConfig, TrainConfig
from mimo_megatron.prove.material import mixed as mixed_packs
from mimo_megatron.prove.material import random_media, random_sample

__all__ = ["mixed_packs", "random_media", "random_sample", "run_config", "tiny_model"]


def tiny_model(**text_fields: Any) -> ModelConfig:
    model = preset("tiny-vl")
    return model.model_copy(update={"text": model.text.model_copy(update=text_fields)})


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
