"""Training steps whose peak memory is measured in forked ranks, by counted tensor bytes; see ``tensor_meter``."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ModuleTraining, ParallelConfig, RunConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.offload import ActivationOffload
from mimo_megatron.parallel.mesh import coordinates
from mimo_megatron.planner.memory import rank_memory
from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.setting import Setting
from mimo_megatron.prove.material import Grid
from mimo_megatron.train.step import build_trainer, train_step
from mimo_megatron.types import EncodedSample, PackedBatch
from tests.samples import random_media, random_sample, run_config, tiny_model
from tests.tensor_meter import TensorMeter

SLOTS = 1024
FROZEN = ModuleTraining()

# A pack as (text tokens of each sample, grids of its images).
Samples = tuple[tuple[int, tuple[Grid, ...]], ...]
ONE_IMAGE: Samples = ((260, ((1, 48, 48),)), (180, ()))
MANY_IMAGES: Samples = ((100, ((1, 20, 14), (1, 6, 34))), (60, ((1, 26, 30),)), (200, ((1, 20, 14),)), (150, ()))
VIDEO: Samples = ((200, ((4, 16, 20),)), (120, ((1, 28, 24),)))
FRAMES: Samples = ((60, ((1, 20, 14), (1, 16, 18))),)
TEXT: Samples = ((300, ()), (90, ()), (400, ()), (90, ()))
LONG_TEXT: Samples = ((1000, ()),)


@dataclass(frozen=True)
class Case:
    name: str
    layout: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    packs: tuple[Samples, ...] = (MANY_IMAGES, ONE_IMAGE, VIDEO, MANY_IMAGES)
    train: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> ModelConfig:
        model = tiny_model(**self.text)
        assert model.vision is not None
        return model.model_copy(update={"vision": model.vision.model_copy(update=self.vision)})

    @property
    def config(self) -> RunConfig:
        config = run_config(
            self.model, parallel=ParallelConfig(**self.layout), packs_per_step=len(self.packs), **self.train
        )
        return config.model_copy(update={"data": config.data.model_copy(update={"pack_tokens": SLOTS})})

    def batches(self) -> list[PackedBatch]:
        return [collate(_samples(pack), self.model, SLOTS) for pack in self.packs]


CASES: tuple[Case, ...] = (
    Case("one process"),
    Case("one process, bf16", train=dict(precision="bf16")),
    Case("text only", packs=(TEXT, LONG_TEXT, TEXT)),
    Case("text, bf16, large vocabulary", packs=(TEXT, TEXT), text=dict(vocab_size=4096), train=dict(precision="bf16")),
    Case(
        "head in chunks, bf16, large vocabulary", packs=(TEXT, TEXT), text=dict(vocab_size=8192),
        train=dict(precision="bf16", head_loss="chunked", head_logits=400_000),
    ),
    Case("frozen vision", train=dict(vision=FROZEN)),
    Case("projector only", train=dict(vision=FROZEN, text=FROZEN)),
    Case("projector only, bf16, pp2", dict(pp=2), 2, train=dict(vision=FROZEN, text=FROZEN, precision="bf16")),
    Case("selective recompute", train=dict(recompute="selective")),
    Case("full recompute", train=dict(recompute="full")),
    Case("recompute of the encoder alone", train=dict(vision_recompute=True)),
    Case("full recompute but for the encoder", train=dict(recompute="full", vision_recompute=False)),
    Case("full recompute, bf16", train=dict(recompute="full", precision="bf16")),
    Case("tp2", dict(tp=2), 2),
    Case("tp2, sequence parallel, bf16", dict(tp=2, sequence_parallel=True), 2, train=dict(precision="bf16")),
    Case("cp2", dict(cp=2), 2),
    Case("cp2, one long segment", dict(cp=2), 2, packs=(LONG_TEXT, LONG_TEXT)),
    Case("dp2, bf16", {}, 2, train=dict(precision="bf16")),
    Case("pp2", dict(pp=2), 2),
    Case("pp2, uneven stages", dict(pp=2, stage_layers=(1, 3)), 2),
    Case("pp4, full recompute", dict(pp=4), 4, train=dict(recompute="full")),
    Case("pp2, vpp2", dict(pp=2, vpp=2), 2),
    Case(
        "tp2, pp2, sequence parallel, selective", dict(tp=2, pp=2, sequence_parallel=True), 4,
        train=dict(recompute="selective"),
    ),
    Case("tp2, balanced vision", dict(tp=2, vision_placement="balanced"), 2),
    Case("tp2, cp2, sequence parallel, balanced vision",
         dict(tp=2, cp=2, sequence_parallel=True, vision_placement="balanced"), 4),
    Case("multi-token prediction, pp2", dict(pp=2), 2, text=dict(num_mtp_layers=1)),
    Case("FP8, current", train=dict(fp8=Fp8Config())),
    Case("FP8, delayed, all layers, text, bf16", packs=(TEXT, LONG_TEXT), text=dict(ffn_width=1024),
         train=dict(precision="bf16", fp8=Fp8Config(scaling="delayed", history=256, first_layers=0, last_layers=0))),
    Case("FP8, blockwise, full recompute, text", packs=(TEXT, LONG_TEXT),
         train=dict(recompute="full", fp8=Fp8Config(scaling="blockwise", first_layers=0))),
    Case("FP8, current, selective, pp2, text", dict(pp=2), 2, packs=(TEXT, TEXT, LONG_TEXT),
         train=dict(recompute="selective", fp8=Fp8Config(first_layers=0))),
    Case("FP8, scaled_mm, tp2, sequence parallel, text", dict(tp=2, sequence_parallel=True), 2, packs=(TEXT, LONG_TEXT),
         train=dict(precision="bf16", fp8=Fp8Config(engine="scaled_mm"))),
    Case("triton in the decoder", packs=(TEXT,), text=dict(num_layers=2), train=dict(text_attention="triton")),
    Case("triton in the decoder, cp2", dict(cp=2), 2, packs=(TEXT,), text=dict(num_layers=1),
         train=dict(text_attention="triton")),
    Case("triton in the encoder", packs=(FRAMES,), text=dict(num_layers=1),
         vision=dict(width=160, num_heads=2, depth=2, full_attention_layers=(1,)),
         train=dict(vision_attention="triton")),
    Case("offload", train=dict(offload_activations="all")),
    Case("offload, full recompute, bf16", train=dict(offload_activations="all", recompute="full", precision="bf16")),
    Case("offload of the encoder, selective", train=dict(offload_activations="vision", recompute="selective")),
    Case("offload, pp2", dict(pp=2), 2, train=dict(offload_activations="all")),
    Case("offload of the decoder, pp2, vpp2", dict(pp=2, vpp=2), 2, train=dict(offload_activations="text")),
    Case("offload, multi-token prediction", train=dict(offload_activations="all"), text=dict(num_mtp_layers=1)),
    # Written after the formulas were settled, which did not change for them.
    Case(
        "tp2, cp2, full recompute, large vocabulary", dict(tp=2, cp=2, sequence_parallel=True), 4,
        text=dict(vocab_size=8192), train=dict(recompute="full", precision="bf16"),
    ),
    Case(
        "pp2, vpp2, uneven, frozen vision, selective", dict(pp=2, vpp=2, stage_layers=(0, 1, 2, 1)), 2,
        train=dict(recompute="selective", precision="bf16", vision=FROZEN),
    ),
    Case(
        "pp2, dp2, text only, bf16", dict(pp=2), 4, packs=(TEXT, LONG_TEXT, TEXT, LONG_TEXT),
        text=dict(vocab_size=8192), train=dict(precision="bf16"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank."""

    after_build: int
    """Weights, gradient buffers, optimizer state."""
    before_step: int
    """Those, what the first step left behind, and this step's packs."""
    peak: int
    host: int = 0
    """Most that waited on the host, and is not in the others."""


class Host:
    """``peak`` bytes of offloaded activations of this process, which a meter of the device takes no note of."""

    def __init__(self) -> None:
        self.peak = 0
        offloads: set[ActivationOffload] = set()
        to_host = ActivationOffload._to_host

        def uncounted(offload: ActivationOffload, source: Tensor) -> Tensor:
            offloads.add(offload)
            with _disable_current_modes():
                host = to_host(offload, source)
            self.peak = max(self.peak, host.nbytes + sum(one.host_bytes for one in offloads))
            return host

        ActivationOffload._to_host = uncounted


def measure(address: RankAddress, case: Case) -> Measured:
    """The second of two training steps, the first with all that stays after it."""
    config = case.config
    with megatron(config.parallel, address) as mesh:
        meter, host = TensorMeter(), Host()
        with meter:
            trainer = build_trainer(config, mesh)
            after_build = meter.live
            batches = case.batches()[mesh.dp.rank :: mesh.dp.size]
            for batch in batches:
                meter.count(*vars(batch).values(), *(vars(batch.vision).values() if batch.vision else ()))
            train_step(trainer, batches, 0, 1.0)
            gc.collect()  # Triton's interpreter leaves the last launches' tensors in cycles
            before_step = meter.live
            meter.reset_peak()
            train_step(trainer, batches, 1, 1.0)
    return Measured(after_build, before_step, meter.peak, host.peak)


@dataclass(frozen=True)
class Row:
    """One rank of a case: predicted and measured bytes. ``moving`` is what a step needs above what stays."""

    case: str
    rank: int
    state: int
    measured_state: int
    moving: int
    measured_moving: int
    peak: int
    measured_peak: int
    host: int
    measured_host: int


def compare(case: Case, measured: Sequence[Measured]) -> list[Row]:
    """The planner's numbers for the very packs of the case beside the measured ones, rank by rank.

    Where images are shared out it predicts the most loaded rank alone, and so only that one is compared.
    """
    config, layout = case.config, case.config.parallel
    dp = case.world_size // layout.model_ranks
    batches, rows = case.batches(), []
    for rank, found in enumerate(measured):
        _tp, cp_rank, dp_rank, pp_rank = coordinates(rank, tp=layout.tp, cp=layout.cp, dp=dp, pp=layout.pp)
        packs = [shape_of(batch) for batch in batches[dp_rank::dp]]
        predicted = rank_memory(config, Setting.of(config, "cpu"), dp, packs, pp_rank, cp_rank=cp_rank)
        rows.append(
            Row(
                case.name,
                rank,
                predicted.weights + predicted.gradients + predicted.optimizer,
                found.after_build,
                predicted.activations + predicted.passing,
                found.peak - found.before_step,
                predicted.total,
                found.peak,
                predicted.host,
                found.host,
            )
        )
    if layout.vision_placement == "balanced":
        return [max(rows, key=lambda row: row.measured_peak)]
    return rows


def shape_of(batch: PackedBatch) -> PackShape:
    grids = batch.vision.grids_I3 if batch.vision else ()
    return PackShape(batch.sample_ids[0], batch.num_slots, tuple(batch.segment_lengths), grids, batch.num_trained)


def _samples(pack: Samples) -> Sequence[EncodedSample]:
    return [
        random_sample(number, num_text, [random_media(grid, number) for grid in grids])
        for number, (num_text, grids) in enumerate(pack)
    ]
