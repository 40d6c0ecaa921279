"""What a training run is: the recipe's tree. One home per default; see docs/recipes.md for the meaning of each key."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from mimo_megatron.config.base import Strict
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.pack_cost import PackCost
from mimo_megatron.config.rl import RLConfig

ModuleName = Literal["vision", "projector", "text"]
Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]
Offload = Literal["none", "vision", "text", "all"]
VisionAttention = Literal["auto", "sdpa", "varlen", "flash", "triton"]
TextAttention = Literal["auto", "sdpa", "varlen", "flash", "triton"]
HeadLoss = Literal["logits", "chunked", "triton"]
AdamName = Literal["transformer-engine", "apex", "torch"]
VisionPlacement = Literal["replicated", "balanced"]
SourceBackend = Literal["indexed", "energon"]
DecoderName = Literal["turbo", "pillow", "dali"]
LongSamples = Literal["refuse", "split"]

_SLOT_BYTES = 44
"""Of a pack: token and label 8 each, loss weight 4, three positions of 8."""
_PATCH_LAYOUT_BYTES = 20
"""Row and column of 8 each; a quarter of a window place and of a splice place."""


class ParallelConfig(Strict):
    tp: int = Field(1, ge=1, description="Tensor parallel ranks.")
    pp: int = Field(1, ge=1, description="Pipeline ranks.")
    vpp: int = Field(1, ge=1, description="Chunks of layers on each pipeline rank (interleaved schedule).")
    stage_layers: tuple[NonNegativeInt, ...] | None = Field(
        None, description="Decoder layers of each of the pp * vpp stages, in order; null for equal shares."
    )
    cp: int = Field(1, ge=1, description="Context parallel ranks.")
    sequence_parallel: bool = Field(
        False, description="Divide activations between the tensor parallel ranks outside attention and MLP too."
    )

    vision_placement: VisionPlacement = Field(
        "replicated",
        description="replicated: every tp * cp rank of the first stage encodes all images of a pack; balanced: they "
        "share the images (a video by frames) by predicted cost, and gather the features.",
    )

    @property
    def model_ranks(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline; stage i lies on pipeline rank i % pp."""
        return self.pp * self.vpp

    def layers_of_stages(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of every stage, in order."""
        return self.stage_layers or (num_layers // self.num_stages,) * self.num_stages


class SourceConfig(Strict):
    path: Path = Field(description="Folder written by `mimo-megatron data index`.")
    weight: float = Field(1.0, gt=0, description="Relative share of this source's samples in an epoch.")
    backend: SourceBackend = Field(
        "indexed",
        description="What reads the tars. indexed: our own reader; energon: megatron-energon, over a folder that "
        "`energon prepare` has seen too. Samples and their order are the same.",
    )
    long_samples: LongSamples = Field(
        "refuse",
        description="Texts with more tokens than a pack. refuse: left out and counted, as samples with media and "
        "preference pairs are in any case; split: cut into consecutive parts, each a sample of its own.",
    )


class VideoConfig(Strict):
    fps: float = Field(2.0, gt=0, description="Frames taken per second of video.")
    max_frames: int = Field(256, gt=0, description="Most frames taken of one video.")
    max_pixels_per_frame: int = Field(768 * 28 * 28, gt=0, description="A larger frame is scaled down to this.")
    max_total_tokens: int = Field(16_384, gt=0, description="Most vision tokens of one video; frames shrink to fit.")


class ReadConfig(Strict):
    """How the bytes of samples are read, and how often that is tried."""

    attempts: int = Field(3, ge=1, description="Times that a read is tried before its sample is left out.")
    backoff_seconds: float = Field(
        0.5, ge=0, description="Wait before the second time, doubled before each further one."
    )
    verify: bool = Field(True, description="Compare all that is read with its SHA-256 in the index.")


class EncodingConfig(Strict):
    """How messages, images and videos become tokens and patches; the same in training, scoring and generation."""

    tokenizer: Path = Field(description="Folder of a Hugging Face tokenizer.")
    min_pixels: int = Field(3136, gt=0, description="A smaller image is scaled up to this.")
    max_pixels: int = Field(12_845_056, gt=0, description="A larger image is scaled down to this.")
    decoder: DecoderName = Field(
        "turbo",
        description="What decodes JPEGs. turbo: libjpeg-turbo (simplejpeg), the fastest; pillow: Pillow, which decodes "
        "all other formats in any case; dali: NVIDIA DALI on the CPU, an extra. Pixels are the same.",
    )
    video: VideoConfig = Field(VideoConfig(), description="How videos are sampled and scaled.")
    read: ReadConfig = Field(ReadConfig(), description="How stored bytes are read.")
    system_prompt: str | None = Field(None, description="Put before samples that have no system message.")


class DataConfig(EncodingConfig):
    sources: tuple[SourceConfig, ...] = Field(
        (), description="Data sets that are mixed; none where the section rl names the questions."
    )
    split: str = Field("train", description="Rows of the index that are used: those of this split.")
    pack_tokens: int = Field(gt=0, description="S: slots of a pack.")
    pack_patches: int = Field(gt=0, description="Vision patches a pack may hold.")
    window_samples: int = Field(10_000, gt=0, description="Samples shuffled and packed together.")
    cost: PackCost | None = Field(
        None, description="What packs and ranks are balanced by; null: the model's FLOPs. `data calibrate` measures it."
    )
    workers: int = Field(
        0, ge=0, description="Processes of each rank that read, decode and pack ahead; 0: a thread does."
    )
    prefetch_mib: int = Field(
        1024, gt=0, description="Most memory of each rank, in MiB, for packs that are made ahead or being made."
    )
    sample_seconds: float = Field(
        300.0,
        gt=0,
        description="A sample that takes longer to read and decode is given up: with workers, killed, tried once more "
        "and left out; in the thread, where nothing can end it, the run stops and names it.",
    )
    max_skipped_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="The run stops where more than this share of the samples drawn since it was started, and more "
        "than 10, were left out because of faults.",
    )

    def pack_bytes(self, model: ModelConfig, num_patches: int) -> int:
        """Most memory of a finished pack of so many patches, which videos need: stills have half of the pixels."""
        of_patch = model.vision.patch_bytes + _PATCH_LAYOUT_BYTES if model.vision else 0
        return self.pack_tokens * _SLOT_BYTES + num_patches * of_patch

    def making_bytes(self, model: ModelConfig, num_patches: int) -> int:
        """Memory while it is made: its samples beside the pack, or the pack beside its copy in shared memory."""
        return 2 * self.pack_bytes(model, num_patches)


class OptimizerConfig(Strict):
    name: Literal["adamw"] = Field("adamw", description="AdamW, its state sharded over the data-parallel ranks.")
    implementation: Literal["auto"] | AdamName = Field(
        "auto",
        description="Whose AdamW. torch: PyTorch's, fused on a GPU; transformer-engine, apex: their FusedAdam, which "
        "needs a GPU; auto: on a GPU the first of Transformer Engine's, apex's and torch's that is installed, else "
        "torch's. A run that was saved with one resumes with another (docs/optimizer.md).",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="Decay of AdamW's two moving means.")
    eps: float = Field(1e-8, gt=0, description="Added to AdamW's divisor.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled; not applied to biases and norm weights.")
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 switches clipping off.")

    @model_validator(mode="after")
    def _means_decay(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas {self.betas} must each be from 0 to below 1, as (0.9, 0.95)")
        return self


class ScheduleConfig(Strict):
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rates rise from 0 to their peaks.")
    decay: Literal["cosine", "constant"] = Field("cosine", description="How the rates go on after the warm-up.")
    min_lr_fraction: float = Field(0.1, ge=0, le=1, description="Where the cosine ends, as a fraction of the peak.")


class ModuleTraining(Strict):
    """How one part of the model is trained: a peak learning rate, or frozen where it is null."""

    lr: float | None = Field(None, gt=0, description="Peak learning rate; null freezes the module.")

    @property
    def is_frozen(self) -> bool:
        return self.lr is None


class CheckpointConfig(Strict):
    every_steps: int = Field(0, ge=0, description="Steps between checkpoints; 0 saves only at the end.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    mode: Literal["async", "sync"] = Field(
        "async",
        description="async: training goes on while a copy of its state is written; sync: it waits, and needs no memory "
        "for the copy.",
    )


class TrainConfig(Strict):
    steps: int = Field(gt=0, description="Optimizer updates of the whole run.")
    packs_per_step: int = Field(
        1, gt=0, description="Global batch, in packs. Not used with rl: there rollouts make as many as they fill."
    )
    precision: Precision = Field("bf16", description="Of weights and activations; updates are in fp32.")
    fp8: Fp8Config | None = Field(
        None,
        description="Linear layers multiply in FP8, the decoder's unless `parts` says otherwise (docs/fp8.md); null: "
        "none do.",
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="One for all parts of the model.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The course of every learning rate.")
    vision: ModuleTraining = Field(ModuleTraining(), description="The vision encoder.")
    projector: ModuleTraining = Field(ModuleTraining(), description="The MLP between encoder and decoder.")
    text: ModuleTraining = Field(ModuleTraining(), description="The decoder, with its embedding and head.")
    recompute: Recompute = Field(
        "none",
        description="What is computed again in the backward pass, to save memory. selective: the attention products "
        "and MLPs of the decoder; full: all layers of decoder and encoder.",
    )
    vision_recompute: bool | None = Field(
        None,
        description="Whether the encoder's layers are computed again, whatever the decoder's are; without it, where "
        "recompute is full.",
    )
    offload_activations: Offload = Field(
        "none",
        description="Whose layers keep in host memory, between forward and backward, what recompute leaves to keep: "
        "the encoder's, the decoder's, or all (docs/offload.md). Not run on a GPU yet.",
    )
    vision_attention: VisionAttention = Field(
        "sdpa",
        description="Attention of the vision encoder. sdpa: PyTorch's, segments of one length in one call; varlen: "
        "the flash kernels of torch.nn.attention.varlen, in bf16 on a GPU; flash: those of the newest flash-attn "
        "installed (4, 3 or 2) that this GPU runs, in bf16, with a backward that gives the same bits every time; "
        "triton: this package's kernel for heads 80 wide (docs/kernels.md), which needs a GPU and triton; auto: the "
        "fastest by the table of measurements, sdpa where it has no row for the device. None has been timed on a GPU "
        "yet.",
    )
    text_attention: TextAttention = Field(
        "sdpa",
        description="Attention of the decoder in training, as `train.vision_attention`. triton: for heads 16, 32, 64 "
        "or 128 wide.",
    )
    head_loss: HeadLoss = Field(
        "logits",
        description="How the loss of predicted tokens is taken. logits: from a table of the logits of all trained "
        "rows; chunked: from some columns of the vocabulary at a time, made again in the backward pass, so that no "
        "table exists (docs/head-loss.md); triton: the same with kernels, which need a GPU and triton and have not "
        "been timed on a GPU yet.",
    )
    head_logits: int = Field(
        2**27, gt=0, description="With head_loss in chunks: most logits of a rank that exist at a time."
    )
    overlap_grad_reduce: bool = Field(
        False,
        description="Gradients are reduced over the data-parallel ranks, bucket by bucket, while the backward pass "
        "goes on (docs/overlap.md). Not run on a GPU yet.",
    )
    overlap_param_gather: bool = Field(
        False,
        description="With overlap_grad_reduce: updated parameters are gathered while the next forward pass goes on.",
    )
    ddp_bucket_size: int | None = Field(
        None,
        gt=0,
        description="With overlap_grad_reduce: parameters that are reduced together; null for megatron's default, "
        "40 million, or a million for each data-parallel rank where that is more.",
    )
    log_every: int = Field(1, ge=1, description="Steps between log lines.")
    collective_timeout_seconds: float = Field(
        1800.0, gt=0, description="A run that stands still for so long is ended, and the ranks that hold it are named."
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When to save and what to keep.")

    @property
    def recomputes_vision(self) -> bool:
        return self.recompute == "full" if self.vision_recompute is None else self.vision_recompute

    def module(self, name: ModuleName) -> ModuleTraining:
        return {"vision": self.vision, "projector": self.projector, "text": self.text}[name]


class RunConfig(Strict):
    name: str = Field(description="What logs and reports call this run.")
    dir: Path = Field(description="Folder of this run: checkpoints, logs, report.")
    seed: int = Field(1, ge=0, description="Fixes initial weights, the order of samples and their packs.")
    model: ModelConfig = Field(description="Sizes of the model; usually a preset.")
    start_from: Path | None = Field(None, description="Weights to begin with: a checkpoint or a Hugging Face folder.")
    parallel: ParallelConfig = Field(
        ParallelConfig(), description="The layout; ranks beyond tp * pp * cp are data parallel."
    )
    data: DataConfig = Field(description="What is trained on, and how it is packed.")
    train: TrainConfig = Field(description="How long, how fast, which parts.")
    rl: RLConfig | None = Field(None, description="Reinforcement learning, by `mimo-megatron rl`; null for training.")
