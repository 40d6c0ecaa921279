"""Stand-ins for the ``FusedAdam`` of Transformer Engine and of apex, neither of which runs without a GPU.

Written from what they document and what their sources show: the constructor, decoupled decay as ``adam_w_mode``, the
moments' names and dtype, the count of updates in the parameter group (a tensor where the optimizer is capturable), what
is done with empty groups, and the order of the kernel's arithmetic in fp32. The arithmetic is real; what is not here is
the fused kernel, so no speed and none of its rounding is proven.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mimo_megatron.mcore import adam


class TransformerEngineAdam(torch.optim.Optimizer):
    """Groups that are empty on this rank do not count on (TransformerEngine#1986)."""

    counts_empty_groups = False

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, amsgrad: bool = False, *, bias_correction: bool = True, adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:  # fmt: skip
        assert not amsgrad
        rate = torch.tensor(lr) if capturable else lr
        super().__init__(
            params, dict(lr=rate, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.adam_w_mode, self.capturable = int(adam_w_mode), capturable

    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["params"] or self.counts_empty_groups:
                self._count(group)
            for param in self._updated(group):
                if param.grad is not None:
                    self._update(param, group)

    def _count(self, group: dict[str, Any]) -> None:
        one: Any = torch.ones(1, dtype=torch.int) if self.capturable else 1
        if "step" in group:
            group["step"] += one
        else:
            group["step"] = one

    def _updated(self, group: dict[str, Any]) -> list[Tensor]:
        return group["params"]

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], param.grad
        assert grad is not None and param.dtype == torch.float32
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(param, dtype=torch.float32) for _ in range(2))
        beta1, beta2, count, decay = *group["betas"], int(group["step"]), group["weight_decay"]
        first, second = (1 - beta1**count, 1 - beta2**count) if group["bias_correction"] else (1.0, 1.0)
        if not self.adam_w_mode:
            grad = grad + decay * param
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).add_(grad * grad, alpha=1 - beta2)
        update = (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])
        if self.adam_w_mode:
            update = update + decay * param
        param.sub_(group["lr"] * update)


class ApexAdam(TransformerEngineAdam):
    """Empty groups count on, and only as many parameters of a group are updated as it had at construction: apex keeps
    a list of master weights beside them, of None without any."""

    counts_empty_groups = True

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.masters = [[None for _ in group["params"]] for group in self.param_groups]

    def _updated(self, group: dict[str, Any]) -> list[Tensor]:
        place = next(place for place, one in enumerate(self.param_groups) if one is group)
        return [param for param, _ in zip(group["params"], self.masters[place], strict=False)]


PACKAGES = {"transformer_engine.pytorch.optimizers": TransformerEngineAdam, "apex.optimizers": ApexAdam}


@contextmanager
def installed(*packages: str) -> Iterator[None]:
    """As on a GPU where these of ``PACKAGES``, and no others, can be imported. torch's AdamW is fused there."""
    modules: dict[str, Any] = {}
    for name, stand_in in PACKAGES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            modules[path] = types.ModuleType(path) if name in packages else None
            if name in packages:
                modules[path].__spec__ = ModuleSpec(path, None)
        if name in packages:
            modules[name].FusedAdam = stand_in
    with patch.dict(sys.modules, modules), patch.object(adam, "runs_fused_kernels", lambda: True):
        yield
