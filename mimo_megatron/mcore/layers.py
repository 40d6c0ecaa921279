"""Layer specs: Transformer Engine's layers where it is importable, megatron's own else; our core attention in both.

With FP8, the layers follow from the engine that multiplies (``fp8_engine``).
"""

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
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from mimo_megatron import platform
from mimo_megatron.config.fp8 import Fp8Config, Fp8Engine
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore.attention import PackedCoreAttention
from mimo_megatron.mcore.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, ProductName, rounding_name
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


def fp8_engine(fp8: Fp8Config) -> Fp8Engine:
    """What multiplies the decoder's FP8 operands on this machine: the recipe's choice; with ``auto`` on the CPU the
    twin, on a GPU the first of the others that can.

    ``ConfigError`` where the choice cannot, or none can.
    """
    reasons = {"transformer-engine": _why_not_transformer_engine(fp8), "scaled_mm": _why_not_scaled_mm(fp8), "twin": ""}
    if fp8.engine != "auto":
        if reason := reasons[fp8.engine]:
            raise ConfigError(f"train.fp8.engine={fp8.engine} cannot be used: {reason}; or set train.fp8.engine=auto")
        return fp8.engine
    if platform.current().is_cpu:
        return "twin"
    for engine in ("transformer-engine", "scaled_mm"):
        if not reasons[engine]:
            return engine
    raise ConfigError(
        f"train.fp8 cannot run here: {reasons['transformer-engine']}; {reasons['scaled_mm']}. Leave train.fp8 out, or "
        "set train.fp8.engine=twin, which is slower than no FP8"
    )


def encoder_product(fp8: Fp8Config) -> ProductName:
    """What multiplies those of encoder and projector, whose layers are never Transformer Engine's: the twin where the
    recipe asks for it, or with ``auto`` on the CPU; else PyTorch's product.

    ``ConfigError`` where that cannot.
    """
    if fp8.engine == "twin" or (fp8.engine == "auto" and platform.current().is_cpu):
        return "twin"
    if reason := _why_not_scaled_mm(fp8):
        raise ConfigError(
            f"train.fp8.parts has {' and '.join(fp8.encoder_parts)}, which PyTorch's FP8 product multiplies: {reason}; "
            "set train.fp8.parts=[text], or train.fp8.engine=twin, which is slower than no FP8"
        )
    return "scaled_mm"


def fp8_by_part(fp8: Fp8Config) -> str:
    """What multiplies each part, and what rounds for it, on this machine: of the log."""
    found = []
    for part in fp8.parts:
        engine = fp8_engine(fp8) if part == "text" else encoder_product(fp8)
        rounding = f", rounded by {rounding_name(fp8, engine)}" if engine == "scaled_mm" else ""
        found.append(f"{part} by {engine}{rounding}")
    return "; ".join(found)


def _why_not_transformer_engine(fp8: Fp8Config) -> str:
    """Empty where it can be used."""
    if layer_backend() != "transformer-engine":
        return "Transformer Engine is not installed, or there is no GPU"
    if fp8.scaling == "delayed" and fp8.first_layers + fp8.last_layers:
        return (
            "megatron has Transformer Engine's delayed scaling in all layers or none: set train.fp8.first_layers=0 and "
            "last_layers=0, or scaling=current"
        )
    if fp8.rounding != "auto" and not fp8.encoder_parts:
        return "train.fp8.rounding is given, which is that of scaled_mm"
    return ""


def _why_not_scaled_mm(fp8: Fp8Config) -> str:
    """Empty where it can be used."""
    if not platform.has_fp8_products():
        return "this GPU has no FP8 products, as Ada, Hopper and later have"
    return "torch._scaled_mm has one scale for a tensor, and scaling is blockwise" if fp8.scaling == "blockwise" else ""


def uses_engine(fp8: Fp8Config | None) -> bool:
    """Whether the decoder's layers are Transformer Engine's."""
    if layer_backend() != "transformer-engine":
        return False
    return fp8 is None or fp8_engine(fp8) == "transformer-engine"


def layer_spec(fp8: Fp8Config | None = None) -> ModuleSpec:
    """The spec of one decoder layer with packed attention."""
    if uses_engine(fp8):
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.mlp.submodules.activation_func = SwiGLU
    spec.submodules.self_attention.submodules.core_attention = PackedCoreAttention
    return spec


def _with_fp8_products(spec: ModuleSpec, fp8: Fp8Config) -> ModuleSpec:
    """``spec`` of megatron's own layer, its four linear layers in FP8."""
    params = {"fp8": fp8, "product": fp8_engine(fp8)}
    column, row = ModuleSpec(Fp8ColumnParallelLinear, params), ModuleSpec(Fp8RowParallelLinear, params)
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.linear_qkv, attention.linear_proj = column, row
    mlp.linear_fc1, mlp.linear_fc2 = column, row
    return spec


def block_spec(
    config: TransformerConfig, vp_stage: int | None, fp8: Fp8Config | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """The spec of one stage's decoder layers and of the final norm."""
    if uses_engine(fp8):
        return layer_spec(fp8)
    first, num_layers = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage)
    specs = [
        _with_fp8_products(layer_spec(fp8), fp8) if fp8 and fp8.covers(layer, config.num_layers) else layer_spec(fp8)
        for layer in range(first, first + num_layers)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def prediction_layer_spec() -> ModuleSpec:
    """The spec of one multi-token-prediction layer, never in FP8."""
    is_engines = layer_backend() == "transformer-engine"
    spec = get_mtp_layer_spec(layer_spec(), use_transformer_engine=is_engines)
    if not is_engines:
        spec.submodules.enorm = spec.submodules.hnorm = spec.submodules.layer_norm = RMSNorm
    return spec
