"""Layer specs: Transformer Engine's layers where it is importable, megatron's own else; our core attention in both."""

import importlib.util
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import get_mtp_layer_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mimo_megatron import platform
from mimo_megatron.mcore.attention import PackedCoreAttention
from mimo_megatron.ops import rms_norm, swiglu


class RMSNorm(torch.nn.Module):
    """``ops.rms_norm`` with megatron's constructor.

    Marks its weight for megatron's gradient sum under sequence parallelism, which torch's own norm does not.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(MegatronModule):
    """``ops.swiglu`` where megatron's spec takes an activation: on the CPU (see ``transformer_config``)."""

    def forward(self, x_2F: Tensor) -> Tensor:
        return swiglu(x_2F)


def layer_backend() -> Literal["transformer-engine", "local"]:
    """Which layers are used on this machine. Transformer Engine needs CUDA."""
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    return "transformer-engine" if has_engine and not platform.current().is_cpu else "local"


def layer_spec() -> ModuleSpec:
    """The spec of one decoder layer with packed attention."""
    if layer_backend() == "transformer-engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.mlp.submodules.activation_func = SwiGLU
    spec.submodules.self_attention.submodules.core_attention = PackedCoreAttention
    return spec


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules | ModuleSpec:
    """The spec of one stage's decoder layers and of the final norm."""
    spec = layer_spec()
    if layer_backend() == "transformer-engine":
        return spec
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


def prediction_layer_spec() -> ModuleSpec:
    """The spec of one multi-token-prediction layer."""
    uses_engine = layer_backend() == "transformer-engine"
    spec = get_mtp_layer_spec(layer_spec(), use_transformer_engine=uses_engine)
    if not uses_engine:
        spec.submodules.enorm = spec.submodules.hnorm = spec.submodules.layer_norm = RMSNorm
    return spec
