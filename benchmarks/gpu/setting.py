"""How a run of the suite is set: the real one on a GPU, and its rehearsal, the same code at tiny size on a CPU."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo  # not loaded with torch


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
    time_budget_ms: float
    """Of one measurement, beside its warm-up."""
    fp8_rows: int
    num_linears: int
    """Of those that FP8 is compared in."""
    table_rows: int
    """Of the row operations in the kernel table."""
    table_logit_rows: int


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
    num_packs={"8K": 4, "32K": 2},
    num_samples=112,
    time_budget_ms=150.0,
    fp8_rows=8192,
    num_linears=6,
    table_rows=32_768,
    table_logit_rows=8192,
)
# Heads of 80, as the kernel wants them; two layers; grids of a few patches, which the interpreter takes in seconds.
TINY = Sizes(
    copy_bytes=2**20,
    gemm=128,
    recipes={"8K": "tiny/stage3.yaml", "32K": "tiny/stage4.yaml"},
    overrides=(
        *_ONE_RANK, "parallel.pp=1", "parallel.vpp=1", "model.text.num_layers=2", "model.vision.depth=2",
        "model.vision.width=80", "model.vision.num_heads=1", "model.vision.full_attention_layers=[1]",
        "data.pack_tokens=640", "data.pack_patches=128", "data.max_pixels=12544",
        "data.video.max_total_tokens=16",
    ),
    num_packs={"8K": 2, "32K": 1},
    num_samples=12,
    time_budget_ms=0.0,
    fp8_rows=16,
    num_linears=1,  # the CPU's FP8 product takes a second
    table_rows=32,
    table_logit_rows=16,
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
    """What one section leaves for later ones: trainers and packs."""
