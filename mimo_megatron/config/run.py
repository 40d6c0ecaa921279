"""What a training run is: the recipe's tree. One home per default; see docs/recipes.md for the meaning of each key."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mimo_megatron.config.base import Strict
from mimo_megatron.config.model import ModelConfig

ModuleName = Literal["vision", "projector", "text"]


class ParallelConfig(Strict):
    tp: int = Field(1, ge=1, description="Tensor parallel ranks.")
    pp: int = Field(1, ge=1, description="Pipeline stages.")
    cp: int = Field(1, ge=1, description="Context parallel ranks.")
    sequence_parallel: bool = False

    @property
    def model_ranks(self) -> int:
        return self.tp * self.pp * self.cp


class SourceConfig(Strict):
    path: Path = Field(description="Folder written by `mimo-megatron data index`.")
    weight: float = Field(1.0, gt=0, description="Relative share of this source's samples in an epoch.")


class VideoConfig(Strict):
    fps: float = 2.0
    max_frames: int = 256
    max_pixels_per_frame: int = 768 * 28 * 28
    max_total_tokens: int = 16_384


class DataConfig(Strict):
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    split: str = "train"
    tokenizer: Path = Field(description="Folder of a Hugging Face tokenizer.")
    pack_tokens: int = Field(gt=0, description="S: slots of a pack.")
    pack_patches: int = Field(gt=0, description="Vision patches a pack may hold.")
    window_samples: int = Field(10_000, gt=0, description="Samples shuffled and packed together.")
    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    video: VideoConfig = VideoConfig()
    system_prompt: str | None = None


class OptimizerConfig(Strict):
    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 switches clipping off.")


class ScheduleConfig(Strict):
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["cosine", "constant"] = "cosine"
    min_lr_fraction: float = Field(0.1, ge=0, le=1)


class ModuleTraining(Strict):
    """How one part of the model is trained: a peak learning rate, or frozen where it is null."""

    lr: float | None = Field(None, gt=0)

    @property
    def is_frozen(self) -> bool:
        return self.lr is None


class CheckpointConfig(Strict):
    every_steps: int = Field(0, ge=0, description="0 saves only at the end.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")


class TrainConfig(Strict):
    steps: int = Field(gt=0)
    packs_per_step: int = Field(gt=0, description="Global batch, in packs.")
    precision: Literal["fp32", "bf16"] = "bf16"
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    vision: ModuleTraining = ModuleTraining()
    projector: ModuleTraining = ModuleTraining()
    text: ModuleTraining = ModuleTraining()
    recompute: Literal["none", "full"] = "none"
    log_every: int = Field(1, ge=1)
    checkpoint: CheckpointConfig = CheckpointConfig()

    def module(self, name: ModuleName) -> ModuleTraining:
        return {"vision": self.vision, "projector": self.projector, "text": self.text}[name]


class RunConfig(Strict):
    name: str
    dir: Path = Field(description="Folder of this run: checkpoints, logs, report.")
    seed: int = 1
    model: ModelConfig
    start_from: Path | None = Field(None, description="Weights to begin with: a checkpoint or a Hugging Face folder.")
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    train: TrainConfig
