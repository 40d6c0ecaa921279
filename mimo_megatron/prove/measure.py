"""What a case computes on its ranks, and how far it is from one process.

Two measurements: loss and every parameter's gradient in fp64, where nothing but a wrong term can be larger than 1e-12;
and the parameters after one clipped SGD step through the real trainer, whose optimizer megatron has in fp32 alone. With
bf16 weights both come from the trainer. Errors are norms of differences relative to the reference: of a gradient to its
norm, of a step, beyond the rounding of the parameters themselves, to that of the update.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from mimo_megatron.config.check import check
from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import fp8, optimizer, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.overlap import Overlap
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.model.vlm import VisionLanguageModel, build_chunks
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.prove.cases import Case, run_config
from mimo_megatron.prove.faults import planted
from mimo_megatron.prove.material import MOST_ROLLOUTS, PACKS
from mimo_megatron.rl.update import PolicyLoss, clipping_of
from mimo_megatron.train.step import Loss, build_trainer, local_packs, loss_of, numerics_of, train_step
from mimo_megatron.types import PackedBatch

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """Whole tensors by global name. ``before`` and ``after`` are parameters, around the step."""

    loss: float
    count: int
    gradients: Named
    before: Named
    after: Named
    grad_norm: float


@dataclass(frozen=True)
class Errors:
    """Of one case against one process, the worst over its ranks; replicas are compared on every rank that holds one."""

    count: float
    loss: float
    gradients: Mapping[str, float]
    grad_norm: float
    step: Mapping[str, float]
    missing: tuple[str, ...] = ()
    """Parameters that no rank held."""

    @property
    def worst_gradient(self) -> tuple[float, str]:
        return max(((error, name) for name, error in self.gradients.items()), default=(0.0, ""))

    @property
    def worst_step(self) -> tuple[float, str]:
        return max(((error, name) for name, error in self.step.items()), default=(0.0, ""))


def outcome(address: RankAddress, case: Case) -> Outcome:
    """Loss, gradients and step of ``case`` on this rank's stages. A collective over all ranks."""
    config = run_config(case.layout, case.feature)
    check(config, address.world_size)
    with megatron(config.parallel, address) as mesh:
        batches = [collate(pack, config.model, case.feature.slots) for pack in PACKS[case.feature.packs]]
        own = batches[mesh.dp.rank :: mesh.dp.size]
        return Outcome(*gradients(config, mesh, own), *_step(config, mesh, own))


def errors(address: RankAddress, case: Case, reference: Path, fault: str = "") -> Errors:
    """How far this rank's part of ``case`` is from the outcome of one process that ``reference`` holds."""
    with planted(fault):
        got = outcome(address, case)
    want: Outcome = torch.load(reference, weights_only=False)
    update = {name: want.after[name] - want.before[name] for name in want.after}
    return Errors(
        count=abs(got.count - want.count),
        loss=_apart(got.loss, want.loss),
        gradients={
            name: relative(grad - want.gradients[name], want.gradients[name]) for name, grad in got.gradients.items()
        },
        grad_norm=_apart(got.grad_norm, want.grad_norm),
        step={
            name: relative(param - want.after[name], update[name], _rounding(param))
            for name, param in got.after.items()
        },
    )


def relative(difference: Tensor, scale: Tensor, rounding: float = 0.0) -> float:
    """norm(difference) / norm(scale), of what is beyond ``rounding``; 0 where both are 0, infinite for what is not a
    number: a comparison with that would be lost among others."""
    distance = difference.double().norm().item()
    if not math.isfinite(distance):
        return math.inf
    return max(distance - rounding, 0.0) / max(scale.double().norm().item(), 1e-30)


def _apart(got: float, want: float) -> float:
    """Relative to ``want``; 0 where both are 0, as where no pack reaches a part that is trained."""
    if got == want == 0:
        return 0.0
    error = abs(got / want - 1) if want else math.inf
    return error if math.isfinite(error) else math.inf


def _rounding(param: Tensor) -> float:
    """By how much two parameters may differ that are rounded to their dtype on either side of the same number."""
    return torch.finfo(param.dtype).eps * param.double().norm().item()


def merged(of_ranks: list[Errors], reference: Path) -> Errors:
    """One verdict from all ranks: the worst of what any of them saw."""
    want: Outcome = torch.load(reference, weights_only=False)
    gradients, step = (_worst([getattr(one, kind) for one in of_ranks]) for kind in ("gradients", "step"))
    missing = [name for name in want.gradients if name not in gradients]
    missing += [name for name in want.after if name not in step]
    return Errors(
        count=max(one.count for one in of_ranks),
        loss=max(one.loss for one in of_ranks),
        gradients=gradients,
        grad_norm=max(one.grad_norm for one in of_ranks),
        step=step,
        missing=tuple(missing),
    )


def _worst(many: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: max(one[name] for one in many if name in one) for one in many for name in one}


def gradients(config: RunConfig, mesh: Mesh, batches: list[PackedBatch]) -> tuple[float, int, Named]:
    """(objective sum, trained tokens, gradients) of one step from the seed's weights, in fp64, or in bf16 with bf16.

    Where FP8 scales come from the step before, of the second such step."""
    text, train = config.model.text, config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float64
    chunks = build_chunks(config.model, config.parallel, numerics_of(config, dtype), mesh)
    weights.draw_weights(chunks, config.seed, mesh.tp)
    for chunk in chunks:
        chunk.freeze({name for name in optimizer.MODULES if train.module(name).is_frozen})
    wrapped = optimizer.wrap(chunks, dtype is torch.bfloat16, Overlap.of(train))
    packs = local_packs(text, mesh, chunks, batches)
    loss = _loss(config, mesh, next(chunks[0].parameters()).device)
    if train.fp8 is not None and train.fp8.scaling == "delayed":
        run_microbatches(wrapped, packs, packs[0].num_stream_slots, loss, whole_gradients=True)
        fp8.end_step(chunks)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
    sums = run_microbatches(wrapped, packs, packs[0].num_stream_slots, loss, whole_gradients=True)
    named = {name: _whole(name, gradient_of(param), param, mesh) for name, param in _trained(chunks)}
    return sums.objective, sums.count, named


def _loss(config: RunConfig, mesh: Mesh, device: torch.device) -> Loss:
    if config.rl is None:
        return loss_of(config.model.text, mesh)
    return PolicyLoss(config.model.tokens, mesh, MOST_ROLLOUTS, clipping_of(config.rl.algorithm), device)


def _step(config: RunConfig, mesh: Mesh, batches: list[PackedBatch]) -> tuple[Named, Named, float]:
    trainer = build_trainer(config, mesh)
    before = _parameters(trainer.bare_chunks, mesh)
    for step in range(1, config.train.steps + 1):
        result = train_step(trainer, batches, step, 1.0, loss=_loss(config, mesh, trainer.device))
    return before, _parameters(trainer.bare_chunks, mesh), result.grad_norm


def _parameters(chunks: list[VisionLanguageModel], mesh: Mesh) -> Named:
    return {name: _whole(name, param.detach(), param, mesh) for name, param in weights.global_parameters(chunks)}


def _trained(chunks: list[VisionLanguageModel]) -> Iterator[tuple[str, Parameter]]:
    return ((name, param) for name, param in weights.global_parameters(chunks) if param.requires_grad)


def gradient_of(param: Parameter) -> Tensor:
    """What megatron's wrapper has accumulated."""
    return param.main_grad  # type: ignore[attr-defined]


def _whole(name: str, local: Tensor, param: Parameter, mesh: Mesh) -> Tensor:
    return weights.unshard(name, local, param, mesh.tp).clone()
