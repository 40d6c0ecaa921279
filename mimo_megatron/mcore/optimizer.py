"""Megatron's data-parallel wrapper and distributed optimizer, with one learning rate for each part of the model."""


from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch.nn import Parameter

from mimo_megatron.config.run import ModuleName, TrainConfig
from mimo_megatron.mcore.module import MegatronModule

MODULES: tuple[ModuleName, ...] = ("vision", "projector", "text")


def wrap(model: MegatronModule, dtype_is_bf16: bool) -> DistributedDataParallel:
    """``model`` with gradient buffers that are summed over dp x cp and sharded for the distributed optimizer.

    The wrapper sums and never averages: the schedule divides once by the global count of trained tokens.
    Gradients of bf16 parameters are accumulated in fp32.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype_is_bf16, use_distributed_optimizer=True, overlap_grad_reduce=False
    )
    wrapped = DistributedDataParallel(config=model.config, ddp_config=ddp, module=model)
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build(wrapped: DistributedDataParallel, train: TrainConfig) -> MegatronOptimizer:
    """Megatron's optimizer over the trainable parameters. One-dimensional parameters get no weight decay.

    Every rank must call this, those whose stage is wholly frozen too.
    """
    settings = train.optimizer
    config = OptimizerConfig(
        optimizer="adam" if settings.name == "adamw" else "sgd",
        lr=_highest_rate(train),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        sgd_momentum=0.0,
        clip_grad=settings.clip_grad,
        bf16=train.precision == "bf16",
        use_distributed_optimizer=True,
    )
    overrides = {_part_key(name): ParamGroupOverride(max_lr=rate) for name, rate in learning_rates(train).items()}
    overrides[_flat_key()] = ParamGroupOverride(wd_mult=0.0)
    return get_megatron_optimizer(config, [wrapped], overrides, use_gloo_process_groups=False)


def learning_rates(train: TrainConfig) -> dict[ModuleName, float]:
    """Peak learning rate of every part that is trained."""
    return {name: lr for name in MODULES if (lr := train.module(name).lr) is not None}


def set_rate(optimizer: MegatronOptimizer, train: TrainConfig, factor: float) -> None:
    """Every group's learning rate becomes its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor
        group["weight_decay"] = train.optimizer.weight_decay * group["wd_mult"]


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
