"""What, beside a pack, decides how much a rank keeps and computes; and how it is said what a part of a stage needs."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mimo_megatron.config.fp8 import Fp8Config, Fp8Engine
from mimo_megatron.config.model import ModelConfig, VisionConfig
from mimo_megatron.config.run import ModuleName, Offload, ParallelConfig, RunConfig
from mimo_megatron.config.vision_flops import frame_flops
from mimo_megatron.parallel.spread_reference import loads, spread_reference
from mimo_megatron.planner.packs import Grid, PackShape

Device = Literal["cpu", "cuda"]
Attention = Literal["sdpa", "varlen", "flash", "triton"]
WIDE = 4


@dataclass(frozen=True)
class Part:
    """Bytes: ``saved`` for the backward; ``forward`` above that while the part runs; ``backward`` above all that is
    saved up to it while its backward runs."""

    name: str
    saved: int
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Setting:
    model: ModelConfig
    layout: ParallelConfig
    trained: frozenset[ModuleName]
    recompute: str
    recompute_vision: bool
    value_bytes: int
    device: Device = "cuda"
    head_logits: int | None = None
    """Most that exist at a time; None for all."""
    vision_attention: Attention = "sdpa"
    text_attention: Attention = "sdpa"
    fp8: Fp8Config | None = None
    engine: Fp8Engine = "scaled_mm"
    """What is taken to multiply where there is FP8."""
    rounding: Literal["torch", "triton"] = "torch"
    """What is taken to round for ``scaled_mm``."""
    offload: Offload = "none"

    @classmethod
    def of(cls, config: RunConfig, device: Device = "cuda") -> "Setting":
        """``auto`` attention is taken for sdpa, which it is where nothing has been timed."""
        names: tuple[ModuleName, ...] = ("vision", "projector", "text")
        train = config.train
        vision: Attention = "sdpa" if train.vision_attention == "auto" else train.vision_attention
        text: Attention = "sdpa" if train.text_attention == "auto" else train.text_attention
        return cls(
            config.model,
            config.parallel,
            frozenset(name for name in names if not train.module(name).is_frozen),
            train.recompute,
            train.recomputes_vision,
            4 if train.precision == "fp32" else 2,
            device,
            train.head_logits if train.head_loss != "logits" else None,
            vision,
            text,
            train.fp8,
            engine_taken(train.fp8, device) if train.fp8 else "scaled_mm",
            rounding_taken(train.fp8, device) if train.fp8 else "torch",
            train.offload_activations,
        )

    @property
    def features_need_grad(self) -> bool:
        return bool(self.trained & {"vision", "projector"})

    def is_in_fp8(self, layer: int) -> bool:
        """Of a decoder layer, numbered from 0 over all stages."""
        return self.fp8 is not None and self.fp8.covers(layer, self.model.text.num_layers)

    def local_slots(self, pack: PackShape) -> int:
        return pack.num_slots // self.layout.cp

    def stream_slots(self, pack: PackShape) -> int:
        """s: slots between layers on this rank."""
        return self.local_slots(pack) // (self.layout.tp if self.layout.sequence_parallel else 1)

    def norm_bytes(self, rows: int, width: int) -> int:
        """What a norm keeps, without its output: the normed rows in 4 bytes, or on a GPU its input as it came, and one
        number a row (``ops.py``)."""
        return rows * (width * (self.value_bytes if self.device == "cuda" else WIDE) + WIDE)

    @property
    def shares_vision(self) -> bool:
        """Whether the tp and cp ranks of the first stage share out the images of a microbatch."""
        return self.layout.vision_placement == "balanced" and self.layout.tp * self.layout.cp > 1

    def vision_share(self, pack: PackShape) -> float:
        """The part of the pack's vision work that the most loaded rank of the first stage does: at least one image."""
        vision = self.model.vision
        if vision is None or not self.shares_vision or not pack.grids:
            return 1.0
        return _largest_share(vision, self.model.text.width, pack.grids, self.layout.tp * self.layout.cp)


def engine_taken(fp8: Fp8Config, device: Device) -> Fp8Engine:
    """What ``auto`` is taken for: on a GPU PyTorch's product, as without Transformer Engine, where that can do it."""
    if fp8.engine != "auto":
        return fp8.engine
    if device == "cpu":
        return "twin"
    return "transformer-engine" if fp8.scaling == "blockwise" else "scaled_mm"


def rounding_taken(fp8: Fp8Config, device: Device) -> Literal["torch", "triton"]:
    """What ``auto`` is taken for: on a GPU the kernels, as triton comes with PyTorch there."""
    if fp8.rounding != "auto":
        return fp8.rounding
    return "triton" if device == "cuda" and engine_taken(fp8, device) == "scaled_mm" else "torch"


@lru_cache(maxsize=64)
def _largest_share(vision: VisionConfig, text_width: int, grids: tuple[Grid, ...], num_ranks: int) -> float:
    costs = [frame_flops(vision, text_width, height, width) for frames, height, width in grids for _ in range(frames)]
    return max(loads(costs, spread_reference(costs, num_ranks), num_ranks)) / sum(costs)
