"""The presets have the parameters that the reports imply, counted on the built model (meta device, no memory)."""

import pytest
import torch

from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import VisionLanguageModel
from tests.harness import run_ranks


def count(address: RankAddress, name: str) -> dict[str, int]:
    """Parameters by part of the model."""
    with megatron(ParallelConfig(), address) as mesh, torch.device("meta"):
        model = VisionLanguageModel(preset(name), ParallelConfig(), Numerics(torch.bfloat16), mesh)
        parts: dict[str, int] = {}
        for key, param in model.named_parameters():
            part = "mtp" if key.startswith("text.mtp.") else key.split(".")[0]
            parts[part] = parts.get(part, 0) + param.numel()
        return parts


@pytest.mark.parametrize(
    "name, millions",
    [
        ("mimo-vl-7b", {"text": 7622.6, "vision": 636.4, "projector": 47.2}),
        ("qwen2.5-vl-7b", {"text": 7615.6, "vision": 632.0, "projector": 44.6}),
        ("mimo-7b-base", {"text": 7622.6, "mtp": 210.8}),
    ],
)
def test_preset_has_the_published_parameter_count(name, millions):
    got = {part: round(total / 1e6, 1) for part, total in run_ranks(count, 1, name)[0].items()}
    assert got == millions


def test_mimo_vl_7b_has_8306_million_parameters():
    assert round(sum(run_ranks(count, 1, "mimo-vl-7b")[0].values()) / 1e6, 1) == 8306.2


def test_mimo_7b_base_has_the_count_of_the_released_model():
    """7,833,409,536 with its MTP layer, read from a dump of the released weights."""
    assert sum(run_ranks(count, 1, "mimo-7b-base")[0].values()) == 7_833_409_536
