"""Weight sync in every kind of layout: every rank receives, bit for bit, what the converter writes of the same weights.

The oracle is the converter itself: the layout's checkpoint, exported to a Hugging Face folder.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.convert.storage import same_bits
from mimo_megatron.convert.verbs import to_hf
from mimo_megatron.errors import ConfigError, SyncError
from mimo_megatron.mcore import checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import VisionLanguageModel, build_chunks
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.rl.sync.buckets import ALIGNMENT, Manifest, TensorEntry
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.rl.sync.receiver import Receiver
from tests.convert_fixtures import load_hf, small_model
from tests.harness import run_ranks
from tests.tensor_meter import TensorMeter

BUCKET_BYTES = 40_000
"""About a layer's larger tensors; the embedding alone is larger."""
FOUR_LAYERS = small_model(num_layers=4)
LAYOUTS: dict[str, tuple[int, dict[str, Any], ModelConfig]] = {
    "one": (1, {}, FOUR_LAYERS),
    "tp2": (2, dict(tp=2), FOUR_LAYERS),
    "tp2-sequence-parallel": (2, dict(tp=2, sequence_parallel=True), FOUR_LAYERS),
    "pp2": (2, dict(pp=2), FOUR_LAYERS),
    "pp2-uneven": (2, dict(pp=2, stage_layers=(1, 3)), FOUR_LAYERS),
    "pp2-vpp2": (2, dict(pp=2, vpp=2), FOUR_LAYERS),
    "tp2-pp2": (4, dict(tp=2, pp=2), FOUR_LAYERS),
    "cp2-dp2": (4, dict(cp=2), FOUR_LAYERS),
    "tp2-balanced-vision": (2, dict(tp=2, vision_placement="balanced"), FOUR_LAYERS),
    "pp2-tied-head": (2, dict(pp=2), small_model(tie_embeddings=True)),
    "tp2-pp2-prediction-layer": (4, dict(tp=2, pp=2), small_model("tiny-base")),
}


def built(model: ModelConfig, layout: dict[str, Any], mesh: Mesh, dtype: torch.dtype) -> list[VisionLanguageModel]:
    """A model that holds other numbers in every element, norms and biases too."""
    chunks = build_chunks(model, ParallelConfig(**layout), Numerics(dtype), mesh)
    for name, param in weights.global_parameters(chunks):
        draw = torch.Generator().manual_seed(len(name) + 1000 * sum(map(ord, name)))
        whole = torch.randn(weights.whole_shape(param, mesh.tp), generator=draw).to(dtype)
        param.data.copy_(weights.shard(name, whole, param, mesh.tp))
    return chunks


def received(publisher: Publisher, version: int, receiver: Receiver | None = None) -> dict[str, Tensor]:
    """What an engine on this rank has after the update."""
    manifest = publisher.manifest(version)
    receiver = receiver or Receiver({entry.name: entry for entry in manifest.tensors})
    receiver.begin(manifest)
    held = {}
    for bucket in publisher.buckets(version):
        held |= {name: tensor.clone() for name, tensor in receiver.take(bucket)}
    receiver.finish(held.__getitem__)
    return held


def publish(
    address: RankAddress, layout: dict[str, Any], model: ModelConfig, dtype: torch.dtype, ckpt: str
) -> tuple[Manifest, dict[str, Tensor], dict[str, Tensor]]:
    """What this rank received before and after all parameters changed; saves those from before."""
    with megatron(ParallelConfig(**layout), address) as mesh:
        chunks = built(model, layout, mesh, dtype)
        publisher = Publisher(chunks, model, mesh, BUCKET_BYTES)
        first = received(publisher, 1)
        checkpoint.save(Path(ckpt), model, chunks)
        for _, param in weights.global_parameters(chunks):
            param.data.mul_(-2)  # in place, as an optimizer does; exact
        return publisher.manifest(1), first, received(publisher, 2)


def without_prediction_layers(exported: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in exported.items() if ".mtp_layers." not in name}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not same_bits(found[name], wanted[name])]


MANIFESTS: dict[str, Manifest] = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_receives_what_the_converter_writes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    size, layout, model = LAYOUTS[name]
    if dtype is torch.bfloat16 and name not in ("one", "tp2-pp2"):
        pytest.skip("dtypes take the same way in every layout; two are enough")
    ranks = run_ranks(publish, size, layout, model, dtype, str(tmp_path / "ckpt"))
    to_hf(tmp_path / "ckpt", tmp_path / "hf")
    exported = without_prediction_layers(load_hf(tmp_path / "hf"))
    changed = {tensor_name: tensor * -2 for tensor_name, tensor in exported.items()}
    for manifest, first, second in ranks:
        assert manifest == ranks[0][0]
        assert differing(first, exported) == []
        assert differing(second, changed) == []
