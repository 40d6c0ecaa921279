"""How a run of the suite is set: the real one on a GPU, and its rehearsal, the same code at tiny size on a CPU."""

import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo  # not loaded with torch

NO_TIME = "no time was left"
COMPILE_SECONDS = {"flex": 20.0, "torch.compile": 10.0}
"""Of ways that are compiled for each shape, forward and backward: a guess, not timed. A section begins no such row with
less left: it would be ended in the middle, and what comes behind would wait for a new process."""
TEXT = "8K text"
"""The class of packs that have the slots of 8K and no images."""


@dataclass(frozen=True)
class Sizes:
    """What is measured, in the dims of docs/shapes.md."""

    copy_bytes: int
    gemm: int
    """Rows, columns and depth of the large product."""
    recipes: dict[str, str]
    """Name of a pack class -> recipe whose packs and training it takes."""
    overrides: tuple[str, ...]
    """Of every recipe: the 7B shape at reduced depth."""
    num_packs: dict[str, int]
    num_samples: int
    """Of conversations with and without images; packs of text alone have as many of their own."""
    time_budget_ms: float
    """Of one measurement, beside its warm-up."""
    fp8_rows: int
    num_linears: int
    """Of those that FP8 is compared in."""
    table_rows: int
    """Of the row operations in the kernel table."""
    table_logit_rows: int
    num_windows: int
    """Of the case whose windows are all full."""
    head_slots: int
    """Of a pack, of which some or all are trained, in the section of the head's loss."""
    head_logits: tuple[int, ...]
    """``train.head_logits`` that are tried. None makes a chunk as wide as the model: logits are told by their shape."""
    optimizer_layers: int
    """Of the decoder, and as many of the encoder, whose parameters an optimizer's step is timed on."""


_ONE_RANK = (
    "parallel.tp=1", "parallel.cp=1", "parallel.sequence_parallel=false", "parallel.vision_placement=replicated",
    "start_from=null", "train.packs_per_step=1", "data.workers=0",
    # The suite's tokenizer has its special tokens at the first ids, in every size.
    "model.tokens={pad: 0, turn_start: 1, turn_end: 2, vision_start: 3, vision_end: 4, image_pad: 5, video_pad: 6}",
)  # fmt: skip
REAL = Sizes(
    copy_bytes=2**31,
    gemm=8192,
    recipes={"8K": "mimo_vl_7b/stage3.yaml", "32K": "mimo_vl_7b/stage4.yaml"},
    overrides=(*_ONE_RANK, "model.text.num_layers=8"),
    num_packs={"8K": 3, "32K": 1, TEXT: 2},
    num_samples=112,
    time_budget_ms=150.0,
    fp8_rows=8192,
    num_linears=6,
    table_rows=32_768,
    table_logit_rows=8192,
    num_windows=512,
    head_slots=8192,
    head_logits=(2**24, 2**27),
    optimizer_layers=2,
)
# Heads of 80, as the kernel wants them; as few layers as leave one in FP8; grids of a few patches, which the
# interpreter takes in seconds.
TINY = Sizes(
    copy_bytes=2**20,
    gemm=128,
    recipes={"8K": "tiny/stage3.yaml", "32K": "tiny/stage4.yaml"},
    overrides=(
        *_ONE_RANK, "parallel.pp=1", "parallel.vpp=1", "model.text.num_layers=3", "model.vision.depth=2",
        "model.vision.width=80", "model.vision.num_heads=1", "model.vision.ffn_width=208",
        "model.vision.full_attention_layers=[1]", "data.pack_tokens=256", "data.pack_patches=128",
        "data.max_pixels=12544", "data.video.max_total_tokens=16",
    ),
    num_packs={"8K": 1, "32K": 1, TEXT: 1},
    num_samples=12,
    time_budget_ms=0.0,
    fp8_rows=16,
    num_linears=1,  # the CPU's FP8 product takes a second
    table_rows=32,
    table_logit_rows=16,
    num_windows=2,
    head_slots=8,
    head_logits=(2048,),
    optimizer_layers=1,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """``device`` and ``dtype`` of everything that is measured. Bfloat16 on a GPU; the interpreter computes it wrongly,
    so a rehearsal is in float32."""

    device: torch.device
    is_rehearsal: bool
    seed: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sizes(self) -> Sizes:
        return TINY if self.is_rehearsal else REAL

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, generator: torch.Generator, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Standard normal numbers on the device: never zeros, on which products run faster than on data."""
        drawn = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return drawn.to(dtype or self.dtype)

    def prepare_torch(self) -> None:
        """Before the first section: seeds, and compilers that fail aloud instead of going on uncompiled."""
        torch.manual_seed(self.seed)
        dynamo: Any = torch._dynamo
        # One function is compiled for every shape of the tables, and with and without gradients: more than the 8 times
        # after which torch.compile would go on eagerly.
        dynamo.config.recompile_limit = 128
        dynamo.config.accumulated_recompile_limit = 1024
        dynamo.config.fail_on_recompile_limit_hit = True

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def device_facts(setting: Setting) -> dict[str, Any]:
    if not setting.on_gpu:
        return {"name": "cpu", "cores": os.cpu_count()}
    seen = torch.cuda.get_device_properties(0)
    return {
        "name": seen.name,
        "compute_capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory_bytes": seen.total_memory,
        "l2_bytes": seen.L2_cache_size,
        "cuda": torch.version.cuda,
    }


@dataclass
class Bench:
    """What sections share in one process: the setting, the ceilings once they are measured, and made packs."""

    setting: Setting
    ceilings: dict[str, float] = field(default_factory=dict)
    """FLOP/s and bytes/s measured in this process."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What one section leaves for later ones: packs."""
    ends: float = math.inf
    """When, by ``time.monotonic``, the section in progress should have no more to do: before it is ended."""

    suite_ends: float = math.inf
    """The same of the whole suite."""

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def has_time_for(self, way: str) -> bool:
        """For a row of ``way``, with what it takes to compile."""
        return self.seconds_left() > (COMPILE_SECONDS.get(way, 0.0) if self.setting.on_gpu else 0.0)
