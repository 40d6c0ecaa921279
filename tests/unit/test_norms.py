"""With megatron's own layers every norm of the decoder is ours, also where apex's would be taken."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.models import backends
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import transformer_block

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.layers import RMSNorm, block_spec, layer_backend, prediction_layer_spec
from mimo_megatron.mcore.text import Numerics, transformer_config
from tests.harness import run_ranks
from tests.samples import tiny_model

pytestmark = pytest.mark.skipif(layer_backend() != "local", reason="Transformer Engine's layers have its norms")


class OfApex(torch.nn.Module):
    """Stands where megatron puts apex's FusedLayerNorm, which has no RMSNorm (fusions/fused_layer_norm.py:68)."""


@pytest.fixture(autouse=True)
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "LNImpl", OfApex)
    monkeypatch.setattr(gpt_layer_specs, "LNImpl", OfApex)
    monkeypatch.setattr(transformer_block, "LayerNormImpl", OfApex)


def classes(spec: Any) -> Iterator[type]:
    """Every class that is named in ``spec``, at any depth."""
    if isinstance(spec, type):
        yield spec
    elif isinstance(spec, list | tuple):
        for one in spec:
            yield from classes(one)
    elif dataclasses.is_dataclass(spec):
        for one in vars(spec).values():
            yield from classes(one)


def norms(address: RankAddress) -> list[set[str]]:
    """Of a stage's layers with the norm at their end, and of a prediction layer."""
    parallel = ParallelConfig()
    with megatron(parallel, address):
        specs = block_spec(transformer_config(tiny_model().text, parallel, Numerics()), None), prediction_layer_spec()
    return [{f"{one.__module__}.{one.__name__}" for one in classes(spec) if is_norm(one)} for spec in specs]


def is_norm(one: type) -> bool:
    return "Norm" in one.__name__ or one is OfApex


def test_every_norm_is_ours_whether_or_not_apex_is_there() -> None:
    ours = f"{RMSNorm.__module__}.{RMSNorm.__name__}"
    assert run_ranks(norms, 1) == [[{ours}, {ours}]]


def test_megatrons_own_prediction_layer_would_have_apexs() -> None:
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    assert OfApex in list(classes(spec))
