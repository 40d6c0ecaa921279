"""Megatron's data-parallel wrapper and distributed optimizer, with one learning rate for each part of the model."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor
from torch.nn import Parameter

from mimo_megatron.config.run import ModuleName, TrainConfig
from mimo_megatron.mcore import adam, many_tensors
from mimo_megatron.mcore.module import MegatronModule, is_summed_over_tp
from mimo_megatron.mcore.overlap import NO_OVERLAP, GradReduction, Overlap, finish_param_gather

CONTENT: dict[str, Any] = {
    "non_homogeneous_layers": True,  # one tensor for each layer, named by its global number
    "distrib_optim_sharding_type": "fully_reshardable",
}
"""How megatron lays out a checkpoint of ours."""

BUCKET_ELEMENTS = 2**25
"""Of one sum over tp: 128 MB in fp32, copied once."""

MODULES: tuple[ModuleName, ...] = ("vision", "projector", "text")


def wrap(
    chunks: Sequence[MegatronModule], dtype_is_bf16: bool, overlap: Overlap = NO_OVERLAP
) -> list[DistributedDataParallel]:
    """``chunks`` with gradient buffers that are summed over dp x cp and sharded for the distributed optimizer.

    The wrapper sums and never averages: the schedule divides once by the global count of trained tokens.
    Gradients of bf16 parameters are accumulated in fp32.
    """
    wrapped = overlap.wrap(chunks, grad_reduce_in_fp32=dtype_is_bf16)
    reduction = GradReduction(wrapped) if overlap.grad_reduce else None
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = partial(_finalize, reduction)
        chunk.config.no_sync_func = reduction.no_sync if reduction else None
    return wrapped


def _finalize(
    reduction: GradReduction | None,
    wrapped: list[DistributedDataParallel],
    num_tokens: Tensor | None = None,
    **options: Any,
) -> None:
    """Megatron's sums and its division by the global count; then, for marked parameters, the sum over tp."""
    finish_param_gather(wrapped)  # of what no microbatch used
    if reduction:
        reduction.start_rest()
    finalize_model_grads(wrapped, num_tokens, **options)
    if reduction:
        reduction.reset()
    sum_marked_over_tp(wrapped)


def sum_marked_over_tp(chunks: Sequence[torch.nn.Module]) -> None:
    """Sum the gradients of the marked parameters over tp, in a few large pieces. Which parameters are marked and
    trained is the same on all tp ranks, so they run the same collectives. Every step once."""
    group = parallel_state.get_tensor_model_parallel_group()
    params: Iterator[Any] = (param for chunk in chunks for param in chunk.parameters())
    marked = [param.main_grad for param in params if param.requires_grad and is_summed_over_tp(param)]
    for grads in _buckets(marked):
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=group)
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, in runs of about ``BUCKET_ELEMENTS``."""
    bucket: list[Tensor] = []
    num_elements = 0
    for grad in grads:
        bucket.append(grad)
        num_elements += grad.numel()
        if num_elements >= BUCKET_ELEMENTS:
            yield bucket
            bucket, num_elements = [], 0
    if bucket:
        yield bucket


def build(wrapped: list[DistributedDataParallel], train: TrainConfig) -> MegatronOptimizer:
    """Megatron's optimizer over the trainable parameters. One-dimensional parameters get no weight decay.

    Every rank must call this, those whose stage is wholly frozen too.
    """
    many_tensors.install()
    settings = train.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=_highest_rate(train),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=train.precision == "bf16",
        use_distributed_optimizer=True,
        overlap_param_gather=train.overlap_param_gather,
    )
    overrides = {_part_key(name): ParamGroupOverride(max_lr=rate) for name, rate in learning_rates(train).items()}
    overrides[_flat_key()] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(config, wrapped, overrides, use_gloo_process_groups=False)
    for own in optimizer.chained_optimizers:
        adam.use(own, settings)
        adam.allocate(own.optimizer)
    return optimizer


def learning_rates(train: TrainConfig) -> dict[ModuleName, float]:
    """Peak learning rate of every part that is trained."""
    return {name: lr for name in MODULES if (lr := train.module(name).lr) is not None}


def set_rate(optimizer: MegatronOptimizer, train: TrainConfig, factor: float) -> None:
    """Every group's learning rate becomes its part's peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor
        group["weight_decay"] = train.optimizer.weight_decay * group["wd_mult"]


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Of all ranks' gradients, before they are clipped. Every rank calls it; the host waits for the number."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(optimizer: MegatronOptimizer, norm: float) -> None:
    """Megatron's clipping and update. ``norm`` is ``gradient_norm``'s, which megatron would take and wait for again."""
    optimizer.get_grad_norm = lambda: norm
    try:
        optimizer.step()
    finally:
        del optimizer.get_grad_norm


def sharded_state(optimizer: MegatronOptimizer, weights: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Megatron's sharded form of this rank's optimizer state: whole tensors by name, and the step count.

    Empty where the stages are frozen. ``weights`` is their sharded state. Parameter groups are not part of
    it: megatron tells them apart by (wd_mult, lr_mult) alone and would give all parts the last one's learning rate; the
    recipe sets them anew. Nor is the count of updates as the optimizer keeps it (``mcore/adam.py``): torch's, which is
    beside each parameter, megatron would load as one tensor shared by all.
    """
    own = _own_optimizer(optimizer)
    if own is None:
        return {}
    with adam.counters_set_aside(own.optimizer):
        tensors = own.sharded_param_state_fully_reshardable(weights, is_loading, metadata=CONTENT)
    return {"optimizer": {"tensors": tensors, "step": float(adam.step_count(own.optimizer))}}


def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Set this rank's optimizer state from what ``sharded_state`` described and megatron filled."""
    own = _own_optimizer(optimizer)
    if own is None:
        return
    with adam.counters_set_aside(own.optimizer):
        own.load_parameter_state_from_fully_reshardable(loaded["optimizer"]["tensors"])
    adam.set_step_count(own.optimizer, int(loaded["optimizer"]["step"]))


def live_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Every tensor that a step of ``optimizer`` changes."""
    for one in optimizer.chained_optimizers:
        yield from adam.tensors(one.optimizer)


def _own_optimizer(optimizer: MegatronOptimizer) -> DistributedOptimizer | None:
    """The one distributed optimizer of this rank; None where it has nothing to update."""
    (own,) = optimizer.chained_optimizers
    return own if any(group["params"] for group in own.optimizer.param_groups) else None


def _highest_rate(train: TrainConfig) -> float:
    return max(learning_rates(train).values())


def _part_key(part: str) -> ParamKey:
    def is_in_part(_param: Parameter, name: str) -> bool:
        return name.removeprefix("module.").startswith(f"{part}.")

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=part, fn=is_in_part))


def _flat_key() -> ParamKey:
    def is_flat(param: Parameter, _name: str) -> bool:
        return param.dim() == 1

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name="one-dimensional", fn=is_flat))
