"""Tiny models as Hugging Face folders with random weights, for the converter's tests."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import write_hf_companions
from mimo_megatron.convert.hf_io import SafetensorsWriter


def small_model(name: str = "tiny-vl", **text_fields: Any) -> ModelConfig:
    """A preset cut to two layers of each kind; query heads 3 to a key-value head, so that no two sizes agree."""
    model = preset(name)
    text = {"num_layers": 2, "num_heads": 6, "head_width": 16, "width": 96, "ffn_width": 80, "mrope_section": (2, 3, 3)}
    vision = model.vision and model.vision.model_copy(
        update={"depth": 2, "width": 48, "num_heads": 2, "ffn_width": 56, "full_attention_layers": (1,)}
    )
    return model.model_copy(update={"text": model.text.model_copy(update={**text, **text_fields}), "vision": vision})


def write_random_hf(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 50_000,
    seed: int = 0,
) -> Path:
    """``folder``, now a Hugging Face folder whose tensors hold random bits, NaNs among them."""
    folder.mkdir(parents=True)
    write_hf_companions(folder, model, dtype)
    draw = torch.Generator().manual_seed(seed)
    specs = [spec for rule in rules_for(model) for spec in rule.hf]
    with SafetensorsWriter(folder, specs, dtype, shard_bytes) as writer:
        for spec in specs:
            bits = torch.randint(0, 256, (spec.numel * dtype.itemsize,), dtype=torch.uint8, generator=draw)
            writer.add(spec.name, bits.view(dtype).view(spec.shape))
    return folder


def load_hf(folder: Path) -> dict[str, Tensor]:
    """All tensors, as the safetensors package reads them."""
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
