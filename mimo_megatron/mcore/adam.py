"""Which AdamW updates the parameters - torch's, Transformer Engine's or apex's - and where each keeps what it must
remember.

All three keep ``exp_avg`` and ``exp_avg_sq`` beside each parameter. The number of updates, by which both are corrected,
is for torch a tensor beside each parameter, for the two ``FusedAdam`` one number in each parameter group: an int, or a
tensor where it is capturable (transformer_engine/pytorch/optimizers/fused_adam.py, apex/optimizers/fused_adam.py).
Their versions differ in whether groups that are empty on this rank count on, so those with parameters are asked.

Megatron takes the first of Transformer Engine's, apex's and torch's that can be imported. ``use`` follows the recipe.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from mimo_megatron import log, platform
from mimo_megatron.config.run import AdamName, OptimizerConfig
from mimo_megatron.errors import ConfigError

_HOMES: dict[AdamName, str] = {
    "transformer-engine": "transformer_engine.pytorch.optimizers",
    "apex": "apex.optimizers",
    "torch": "torch.optim",
}
"""Where each is imported from, in megatron's order (optimizer/__init__.py:12)."""


def runs_fused_kernels() -> bool:
    """Whether one kernel can update many parameters here. The CPU keeps torch's plain AdamW."""
    return not platform.current().is_cpu


def chosen(settings: OptimizerConfig) -> AdamName:
    """What the recipe names, or with ``auto`` the first that can be used here. ``ConfigError`` where it cannot."""
    if settings.implementation == "auto":
        return next(name for name in _HOMES if not _hindrance(name))
    if reason := _hindrance(settings.implementation):
        raise ConfigError(
            f"train.optimizer.implementation={settings.implementation} cannot be used: {reason}; "
            "or set train.optimizer.implementation=auto"
        )
    return settings.implementation


def _hindrance(name: AdamName) -> str:
    """Empty where it can be used."""
    if name == "torch":
        return ""
    if not runs_fused_kernels():
        return "its kernels need a GPU"
    try:
        _fused_adam(name)
    except (ImportError, AttributeError) as error:
        return f"{_HOMES[name]}.FusedAdam cannot be imported ({error}): install a build for torch {torch.__version__}"
    return ""


def _fused_adam(name: AdamName) -> type[Optimizer]:
    return importlib.import_module(_HOMES[name]).FusedAdam


def use(own: DistributedOptimizer, settings: OptimizerConfig) -> None:
    """Make ``own`` update by the recipe's implementation, over the same groups of this rank's shards; before the first
    step, since nothing is carried over. Every rank must call it."""
    name, before = chosen(settings), own.optimizer
    log.once(f"optimizer: AdamW of {name}{', fused' if runs_fused_kernels() else ''}")
    groups = [{key: group[key] for key in group if key not in before.defaults} for group in own.param_groups]
    # Constructors want leaves, and megatron's fp32 shards are views. They also want as many parameters as there will
    # be: some versions of apex keep a list beside each group's, and update as many as it is long.
    leaves = [group | {"params": [param.detach() for param in group["params"]]} for group in groups]
    own.optimizer = make(name, leaves, before.defaults["lr"], settings)
    for new, group in zip(own.optimizer.param_groups, groups, strict=True):
        new["params"] = group["params"]


def make(name: AdamName, groups: list[dict[str, Any]], lr: float, settings: OptimizerConfig) -> Optimizer:
    """That implementation, over parameter groups that may bring their own rates."""
    kind: Callable[..., Optimizer] = torch.optim.AdamW if name == "torch" else _fused_adam(name)
    options: dict[str, bool] = {"fused": runs_fused_kernels()} if name == "torch" else {"adam_w_mode": True}
    decay = settings.weight_decay
    return kind(groups, lr=lr, betas=settings.betas, eps=settings.eps, weight_decay=decay, **options)


def allocate(optimizer: Optimizer) -> None:
    """Give every parameter its moments, of zeros, before the first step, so that they can be loaded into."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if _counts_beside_parameters(optimizer):
                # The fused kernel reads its counter where the parameter is.
                device = param.device if group["fused"] or group["capturable"] else None
                state["step"] = torch.tensor(0.0, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        if not _counts_beside_parameters(optimizer) and group["params"]:
            is_capturable: bool = optimizer.capturable  # type: ignore[attr-defined]
            device = group["params"][0].device
            group["step"] = torch.zeros(1, dtype=torch.int, device=device) if is_capturable else 0


def step_count(optimizer: Optimizer) -> int:
    """Updates so far: the same for all parameters, since every step updates them all."""
    if _counts_beside_parameters(optimizer):
        return int(next(iter(optimizer.state.values()))["step"])
    counts = {int(group["step"]) for group in optimizer.param_groups if group["params"]}
    assert len(counts) == 1, f"groups of one optimizer have made {sorted(counts)} updates"
    return counts.pop()


def set_step_count(optimizer: Optimizer, count: int) -> None:
    """Go on as after ``count`` updates."""
    if _counts_beside_parameters(optimizer):
        for state in optimizer.state.values():
            state["step"].fill_(count)
        return
    for group in optimizer.param_groups:
        if isinstance(group.get("step"), Tensor):
            group["step"].fill_(count)
        else:
            group["step"] = count


def tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every tensor that a step changes."""
    for group in optimizer.param_groups:
        yield from group["params"]
        if isinstance(group.get("step"), Tensor):
            yield group["step"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@contextlib.contextmanager
def counters_set_aside(optimizer: Optimizer) -> Iterator[None]:
    """Take counters beside parameters out of the state, which megatron then handles, and put them back."""
    counters = {param: state.pop("step") for param, state in optimizer.state.items() if "step" in state}
    try:
        yield
    finally:
        for param, counter in counters.items():
            optimizer.state[param]["step"] = counter


def _counts_beside_parameters(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.AdamW)
