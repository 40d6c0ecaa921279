"""A step's microbatches run forward and backward one by one: which of them, and which parameters, are not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn import Parameter

from mimo_megatron.config.run import RunConfig
from mimo_megatron.mcore import weights
from mimo_megatron.mcore.boot import world
from mimo_megatron.mcore.optimizer import DistributedDataParallel
from mimo_megatron.mcore.overlap import finish_param_gather
from mimo_megatron.mcore.schedule import run_alone
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.train.step import local_packs, loss_of
from mimo_megatron.types import PackedBatch

_LARGEST_SHOWN = 3


@dataclass
class MicrobatchView:
    """One microbatch of one data-parallel rank, over all ranks that computed it."""

    microbatch: int
    dp_rank: int
    sample_ids: tuple[str, ...]
    ranks: list[int] = field(default_factory=list)
    """Global ranks that computed it."""
    loss_sum: float = 0.0
    num_trained: int = 0
    bad_gradients: list[str] = field(default_factory=list)
    """Parameters whose gradient is not finite, in the model's order."""
    largest: list[tuple[str, float]] = field(default_factory=list)
    """(parameter, gradient norm of the summed loss on one rank), the largest first."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss_sum) and not self.bad_gradients

    def __str__(self) -> str:
        loss = self.loss_sum / max(self.num_trained, 1)
        text = f"microbatch {self.microbatch} of dp rank {self.dp_rank}: loss {loss:.6g} over {self.num_trained} tokens"
        if self.bad_gradients:
            text += f"; gradient not finite in {len(self.bad_gradients)} parameters, e.g. {self.bad_gradients[0]}"
        elif self.largest:
            text += "; largest gradients " + ", ".join(f"{name} {norm:.3g}" for name, norm in self.largest)
        return text + f"; samples {', '.join(self.sample_ids) or 'none'}"


@dataclass(frozen=True)
class Inspection:
    """What all ranks saw together; the same on every rank."""

    microbatches: list[MicrobatchView]
    """In the order in which they were computed."""
    bad_weights: list[str]
    """Parameters that are not finite themselves."""

    @property
    def first_bad(self) -> MicrobatchView | None:
        return next((one for one in self.microbatches if not one.is_finite), None)


def inspect_step(
    config: RunConfig,
    mesh: Mesh,
    device: torch.device,
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[PackedBatch],
) -> Inspection:
    """Run ``batches`` one by one. A collective over all ranks; the gradient buffers are empty afterwards."""
    text = config.model.text
    loss = loss_of(text, mesh)
    finish_param_gather(chunks)
    parameters = list(weights.global_parameters(chunk.module for chunk in chunks))
    own: list[MicrobatchView] = []
    packs = local_packs(text, mesh, [chunk.module for chunk in chunks], batches)
    for number, (batch, pack) in enumerate(zip(batches, packs, strict=True)):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        pack = pack.to(device)
        view = MicrobatchView(number, mesh.dp.rank, batch.sample_ids, [dist.get_rank()])
        if (sums := run_alone(chunks, pack, pack.num_stream_slots, loss)) is not None and mesh.tp.rank == 0:
            # Where multi-token prediction alone is not finite, its share of the objective is what there is to show.
            view.loss_sum = sums.loss if math.isfinite(sums.objective) else sums.objective
            view.num_trained = sums.count
        norms = {name: _gradient_norm(param) for name, param in parameters if param.requires_grad}
        view.bad_gradients = [name for name, norm in norms.items() if not math.isfinite(norm)]
        view.largest = sorted(norms.items(), key=lambda one: -one[1])[:_LARGEST_SHOWN]
        own.append(view)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    bad_weights = [name for name, param in parameters if not bool(param.isfinite().all())]
    gathered = gather_objects((own, bad_weights), world())
    views = [view for theirs, _ in gathered for view in theirs]
    return Inspection(_joined(views), list(dict.fromkeys(name for _, names in gathered for name in names)))


def _gradient_norm(param: Parameter) -> float:
    gradient = param.main_grad  # type: ignore[attr-defined]
    return float(gradient.float().norm()) if bool(gradient.isfinite().all()) else math.nan


def _joined(views: Sequence[MicrobatchView]) -> list[MicrobatchView]:
    """One view of each microbatch, from those of all its tp, cp and pp ranks."""
    joined: dict[tuple[int, int], MicrobatchView] = {}
    for view in sorted(views, key=lambda one: (one.microbatch, one.dp_rank)):
        whole = joined.setdefault(
            (view.microbatch, view.dp_rank), MicrobatchView(view.microbatch, view.dp_rank, view.sample_ids)
        )
        whole.ranks += view.ranks
        whole.loss_sum += view.loss_sum
        whole.num_trained += view.num_trained
        whole.bad_gradients += [name for name in view.bad_gradients if name not in whole.bad_gradients]
        norms = dict(whole.largest)
        norms |= {name: max(norm, norms.get(name, 0.0)) for name, norm in view.largest}
        whole.largest = sorted(norms.items(), key=lambda one: -one[1])[:_LARGEST_SHOWN]
    return list(joined.values())
