"""One optimizer step: packs forward and backward, one global count of trained tokens, clip, update.

What is below it - schedule, collectives, sharding - is megatron-core's, behind ``mcore``.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimo_megatron import platform
from mimo_megatron.config.model import TextConfig
from mimo_megatron.config.run import ParallelConfig, RunConfig
from mimo_megatron.data.media_part import ALL_MEDIA, NO_MEDIA, MediaPart
from mimo_megatron.errors import NonFiniteError
from mimo_megatron.log import get_logger
from mimo_megatron.loss.cross_entropy import Logits, token_losses
from mimo_megatron.loss.preference import pair_losses
from mimo_megatron.mcore import fp8, weights
from mimo_megatron.mcore import optimizer as mcore_optimizer
from mimo_megatron.mcore.layers import fp8_by_part
from mimo_megatron.mcore.optimizer import DistributedDataParallel, MegatronOptimizer
from mimo_megatron.mcore.overlap import Overlap, finish_param_gather, start_param_gather
from mimo_megatron.mcore.schedule import LossSums, StepSums, run_microbatches
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.local_pack import LocalPack, local_pack
from mimo_megatron.model.vision_share import VisionSharing
from mimo_megatron.model.vlm import VisionLanguageModel, build_chunks
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.train.attention import chosen
from mimo_megatron.types import PackedBatch

Loss = Callable[[Any, LocalPack], LossSums]
"""Of what the model gives for the pack's rows: logits, explicit or implicit, or rewards."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trainer:
    """The parts of a run that a step touches."""

    config: RunConfig
    mesh: Mesh
    device: torch.device
    chunks: list[DistributedDataParallel]
    """This rank's stages of the pipeline, in order."""
    optimizer: MegatronOptimizer

    @property
    def bare_chunks(self) -> list[VisionLanguageModel]:
        """For all that is not a step: parameters that are still being gathered are waited for."""
        finish_param_gather(self.chunks)
        return [chunk.module for chunk in self.chunks]

    @property
    def sharing(self) -> VisionSharing | None:
        """How the ranks of the first stage share images out; None on the others, and where all encode all."""
        return self.chunks[0].module.sharing


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the step's trained tokens, or pairs of responses, of all ranks."""
    mtp_loss: float | None
    """Of the multi-token-prediction layers together, per trained token; None where none is trained."""
    num_trained: int
    """Tokens; pairs where a reward model is trained."""
    grad_norm: float
    pair_accuracy: float | None = None
    """Share of pairs whose chosen response has the higher reward; None where tokens are predicted."""


def numerics_of(config: RunConfig, dtype: torch.dtype) -> Numerics:
    """How the run's model computes, with weights of ``dtype``."""
    train = config.train
    vision_attention, text_attention = chosen(config)
    return Numerics(
        dtype,
        train.recompute,
        train.recomputes_vision,
        train.offload_activations,
        fp32_head=config.rl is not None,
        vision_attention=vision_attention,
        text_attention=text_attention,
        head_loss=train.head_loss,
        head_logits=train.head_logits,
        fp8=train.fp8,
    )


def build_model(config: RunConfig, mesh: Mesh, device: torch.device) -> list[VisionLanguageModel]:
    """This rank's stages with weights drawn from the seed, frozen parts taken out of training."""
    train = config.train
    numerics = numerics_of(config, DTYPES[train.precision])
    if train.fp8 is not None:
        get_logger().info("FP8 products, %s scaling: %s", train.fp8.scaling, fp8_by_part(train.fp8))
    # PyTorch's layers draw weights as they are made, which are drawn anew below: on a GPU that takes no time.
    with device if device.type == "cuda" else nullcontext():
        chunks = [chunk.to(device) for chunk in build_chunks(config.model, config.parallel, numerics, mesh)]
    weights.draw_weights(chunks, config.seed, mesh.tp)
    for chunk in chunks:
        chunk.freeze({name for name in mcore_optimizer.MODULES if train.module(name).is_frozen})
    return chunks


def build_trainer(config: RunConfig, mesh: Mesh, local_rank: int = 0) -> Trainer:
    device = platform.current().device(local_rank)
    chunks = build_model(config, mesh, device)
    wrapped = mcore_optimizer.wrap(chunks, config.train.precision == "bf16", Overlap.of(config.train))
    return Trainer(config, mesh, device, wrapped, mcore_optimizer.build(wrapped, config.train))


def cross_entropy(mesh: Mesh, mtp_loss_weight: float = 0.0) -> Loss:
    """The pre-training loss: the weighted sum of token losses; and ``mtp_loss_weight`` times the mean over the
    multi-token-prediction layers of theirs (DeepSeek-V3, equation 25)."""

    def loss(logits_RV: Logits, pack: LocalPack) -> LossSums:
        labels_R = torch.cat([lane.labels_R for lane in pack.lanes])
        weights_R = torch.cat([lane.weights_R for lane in pack.lanes])
        losses_R = token_losses(logits_RV, labels_R, mesh.tp, overwrite=True) * weights_R
        num_main = len(pack.lanes[0].rows_R)
        main, ahead = losses_R[:num_main].sum(), losses_R[num_main:].sum()
        num_ahead = max(len(pack.lanes) - 1, 1)
        return LossSums(main + mtp_loss_weight / num_ahead * ahead, main, pack.lanes[0].weights_R.sum())

    return loss


def preference(mesh: Mesh) -> Loss:
    """The loss of a reward model: the sum over pairs of responses (``loss/preference.py``)."""

    def loss(rewards_R1: Tensor, pack: LocalPack) -> LossSums:
        found = pair_losses(rewards_R1.squeeze(-1), pack.lanes[0].labels_R, pack.num_rows, mesh.cp)
        return LossSums(found.loss, found.loss, found.count, found.num_right)

    return loss


def loss_of(text: TextConfig, mesh: Mesh) -> Loss:
    """What a model with this head is trained by."""
    return preference(mesh) if text.head == "reward" else cross_entropy(mesh, text.mtp_loss_weight)


def backward(trainer: Trainer, batches: Sequence[PackedBatch], loss: Loss | None = None) -> StepSums:
    """The sums of all ranks; the gradient buffers then hold d(objective sum / trained tokens). Without a ``loss`` it is
    what the model's head is trained by."""
    text = trainer.config.model.text
    packs = local_packs(text, trainer.mesh, [chunk.module for chunk in trainer.chunks], batches)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    slots = packs[0].num_stream_slots

    def place(pack: LocalPack, stage: torch.nn.Module) -> LocalPack:
        has_encoder = stage.module.pre_process  # type: ignore[union-attr]
        return (pack if has_encoder else pack.without_media()).to(trainer.device)

    return run_microbatches(trainer.chunks, packs, slots, loss or loss_of(text, trainer.mesh), place=place)


def local_packs(
    text: TextConfig, mesh: Mesh, chunks: Sequence[VisionLanguageModel], batches: Sequence[PackedBatch]
) -> list[LocalPack]:
    """What this rank's stages compute of ``batches``, still on the CPU."""
    return [local_pack(batch, mesh.cp, text.num_mtp_layers, chunks[0].sharing) for batch in batches]


def media_part(parallel: ParallelConfig, mesh: Mesh) -> MediaPart:
    """What this rank encodes of its packs' media, and its loader therefore decodes."""
    if not mesh.is_first_stage:
        return NO_MEDIA
    return MediaPart(mesh.tp_cp.rank, mesh.tp_cp.size) if parallel.vision_placement == "balanced" else ALL_MEDIA


def train_step(
    trainer: Trainer,
    batches: Sequence[PackedBatch],
    step: int,
    rate_factor: float,
    at_optimizer: Callable[[], None] = lambda: None,
    loss: Loss | None = None,
) -> StepResult:
    """Update the parameters once on ``batches``, this dp rank's microbatches. Every rank calls it in step.

    ``NonFiniteError`` on all ranks, before the update, where the loss or gradient norm is not finite. ``at_optimizer``
    is called between backward and update; ``loss`` as for ``backward``.
    """
    sums = backward(trainer, batches, loss)
    at_optimizer()
    mean_loss, objective = sums.loss / max(sums.count, 1), sums.objective / max(sums.count, 1)
    mcore_optimizer.set_rate(trainer.optimizer, trainer.config.train, rate_factor)
    norm = mcore_optimizer.gradient_norm(trainer.optimizer)  # known before any rank judges, so that all judge alike
    for what, value in (("loss", objective), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise NonFiniteError(f"step {step}: the {what} is {value}, before the optimizer")
    mcore_optimizer.update(trainer.optimizer, norm)
    start_param_gather(trainer.chunks)
    fp8.end_step(trainer.chunks)
    text = trainer.config.model.text
    weight = text.mtp_loss_weight if text.num_mtp_layers else 0.0
    mtp_loss = (objective - mean_loss) / weight if weight else None
    accuracy = sums.num_right / max(sums.count, 1) if text.head == "reward" else None
    return StepResult(mean_loss, mtp_loss, sums.count, norm, accuracy)
