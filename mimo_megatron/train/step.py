"""One optimizer step: packs forward and backward, one global count of trained tokens, clip, update.

What is below it - schedule, collectives, sharding - is megatron-core's, behind ``mcore``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_megatron import platform
from mimo_megatron.config.run import RunConfig
from mimo_megatron.errors import MimoError
from mimo_megatron.loss.cross_entropy import token_losses
from mimo_megatron.mcore import optimizer as mcore_optimizer
from mimo_megatron.mcore import weights
from mimo_megatron.mcore.optimizer import DistributedDataParallel, MegatronOptimizer
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.local_pack import LocalPack, local_pack
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.types import PackedBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NonFiniteError(MimoError):
    """The loss or the gradient is not finite; the optimizer has not been touched."""


@dataclass(frozen=True)
class Trainer:
    """The parts of a run that a step touches."""

    config: RunConfig
    mesh: Mesh
    device: torch.device
    model: DistributedDataParallel
    optimizer: MegatronOptimizer

    @property
    def bare_model(self) -> VisionLanguageModel:
        return self.model.module


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the step's trained tokens, all ranks."""
    num_trained_tokens: int
    grad_norm: float


def build_model(config: RunConfig, mesh: Mesh, device: torch.device) -> VisionLanguageModel:
    """This rank's stage with weights drawn from the seed, frozen parts taken out of training."""
    train = config.train
    numerics = Numerics(DTYPES[train.precision], recompute=train.recompute == "full")
    model = VisionLanguageModel(config.model, config.parallel, numerics, mesh).to(device)
    weights.draw_weights(model, config.seed, mesh.tp)
    model.freeze({name for name in mcore_optimizer.MODULES if train.module(name).is_frozen})
    return model


def build_trainer(config: RunConfig, mesh: Mesh, local_rank: int = 0) -> Trainer:
    device = platform.current().device(local_rank)
    model = build_model(config, mesh, device)
    wrapped = mcore_optimizer.wrap(model, config.train.precision == "bf16")
    return Trainer(config, mesh, device, wrapped, mcore_optimizer.build(wrapped, config.train))


def cross_entropy(mesh: Mesh) -> Callable[[Tensor, LocalPack], tuple[Tensor, Tensor]]:
    """The pre-training loss: (weighted sum of token losses, sum of weights)."""

    def loss(logits_RV: Tensor, pack: LocalPack) -> tuple[Tensor, Tensor]:
        losses_R = token_losses(logits_RV, pack.labels_R, mesh.tp)
        return (losses_R * pack.weights_R).sum(), pack.weights_R.sum()

    return loss


def backward(trainer: Trainer, batches: Sequence[PackedBatch]) -> tuple[float, int]:
    """(loss sum, trained tokens) of all ranks; the gradient buffers then hold d(loss sum / trained tokens)."""
    packs = [local_pack(batch, trainer.mesh.cp).to(trainer.device) for batch in batches]
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    return run_microbatches(trainer.model, packs, batches[0].num_slots, cross_entropy(trainer.mesh))


def train_step(trainer: Trainer, batches: Sequence[PackedBatch], step: int, rate_factor: float) -> StepResult:
    """Update the parameters once on ``batches``, this dp rank's microbatches. Every rank calls it in step.

    ``NonFiniteError`` before the update where the loss or gradient norm is not finite.
    """
    loss_sum, count = backward(trainer, batches)
    loss = loss_sum / max(count, 1)
    _require_finite("loss", loss, step, trainer.mesh, batches)
    mcore_optimizer.set_rate(trainer.optimizer, trainer.config.train, rate_factor)
    trainer.optimizer.prepare_grads()
    _require_finite("gradient norm", trainer.optimizer.get_grad_norm(), step, trainer.mesh, batches)
    _updated, grad_norm, _zeros = trainer.optimizer.step()
    return StepResult(loss, count, float(grad_norm or 0.0))


def _require_finite(what: str, value: float, step: int, mesh: Mesh, batches: Sequence[PackedBatch]) -> None:
    if not math.isfinite(value):
        samples = ", ".join(one for batch in batches for one in batch.sample_ids)
        raise NonFiniteError(
            f"step {step}: the {what} is {value}, before the optimizer; dp rank {mesh.dp.rank} held samples {samples}. "
            "Lower the learning rate, lengthen the warm-up, or look at these samples with `mimo-megatron data preview`"
        )
