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
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.storage import same_bits
from mimo_megatron.convert.verbs import to_hf
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import ConfigError, SyncError
from mimo_megatron.mcore import checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import VisionLanguageModel, build_chunks
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.rl.sync.buckets import Manifest
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.rl.sync.receiver import Receiver
from mimo_megatron.train.step import build_trainer, train_step
from tests.convert_fixtures import load_hf, small_model
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config
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


CASES = [(name, torch.float32) for name in LAYOUTS] + [("one", torch.bfloat16), ("tp2-pp2", torch.bfloat16)]


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_every_rank_receives_what_the_converter_writes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    size, layout, model = LAYOUTS[name]
    ranks = run_ranks(publish, size, layout, model, dtype, str(tmp_path / "ckpt"))
    to_hf(tmp_path / "ckpt", tmp_path / "hf")
    exported = without_prediction_layers(load_hf(tmp_path / "hf"))
    changed = {tensor_name: tensor * -2 for tensor_name, tensor in exported.items()}
    for manifest, first, second in ranks:
        assert manifest == ranks[0][0]
        assert differing(first, exported) == []
        assert differing(second, changed) == []


def join_like_any_other(name: str, parts: Any, param: Tensor, whole: Tensor) -> Tensor:
    return whole.copy_(torch.cat(list(parts), param.partition_dim))  # type: ignore[attr-defined]


def test_a_planted_fault_in_joining_shards_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gate and up taken for one matrix: every checksum is right, and only the converter's answer tells."""
    size, layout, model = LAYOUTS["tp2"]
    _, right, _ = run_ranks(publish, size, layout, model, torch.float32, str(tmp_path / "right"))[0]
    monkeypatch.setattr(weights, "join", join_like_any_other)
    _, wrong, _ = run_ranks(publish, size, layout, model, torch.float32, str(tmp_path / "wrong"))[0]
    assert {name.split(".")[-2] for name in differing(wrong, right)} == {"gate_proj", "up_proj"}


def cuts(address: RankAddress, layout: dict[str, Any], model: ModelConfig, size: int) -> list[tuple[int, list[str]]]:
    with megatron(ParallelConfig(**layout), address) as mesh:
        publisher = Publisher(built(model, layout, mesh, torch.float32), model, mesh, size)
        found = [(one.data.numel(), [packed.entry.name for packed in one.tensors]) for one in publisher.buckets(1)]
        assert publisher.largest_bucket_bytes == max(num_bytes for num_bytes, _ in found)
        return found


def test_order_and_cutting_depend_on_model_and_bucket_size_alone() -> None:
    answers = [
        cut
        for name in ("one", "tp2-pp2", "pp2-vpp2")
        for cut in run_ranks(cuts, LAYOUTS[name][0], LAYOUTS[name][1], FOUR_LAYERS, BUCKET_BYTES)
    ]
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) > 10
    too_large = [names for num_bytes, names in answers[0] if num_bytes > BUCKET_BYTES]
    assert ["model.embed_tokens.weight"] in too_large
    assert all(len({name.rsplit(".", 2)[0] for name in names}) == 1 for names in too_large)  # of one rule
    (whole,) = run_ranks(cuts, 1, {}, FOUR_LAYERS, 1 << 30)
    assert len(whole) == 1 and whole[0][1] == [name for _, names in answers[0] for name in names]


def measured_publish(address: RankAddress, layout: dict[str, Any], model: ModelConfig) -> tuple[int, int, int, int]:
    """(bytes of tensors that publishing made at its peak, largest bucket, largest tensor of a rule, whole model)."""
    with megatron(ParallelConfig(**layout), address) as mesh:
        chunks = built(model, layout, mesh, torch.float32)
        publisher = Publisher(chunks, model, mesh, BUCKET_BYTES)
        with TensorMeter() as meter:
            meter.count(*(param for chunk in chunks for param in chunk.parameters()))
            own = meter.live
            for _bucket in publisher.buckets(1):
                pass
        whole = sum(entry.num_bytes for entry in publisher.manifest(1).tensors)
        largest = max(rule.ours.numel * 4 for rule in rules_for(model))
        return meter.peak - own, publisher.largest_bucket_bytes, largest, whole


@pytest.mark.parametrize("name", ["one", "tp2", "tp2-pp2"])
def test_publishing_takes_two_buckets_and_the_largest_tensor_at_most(name: str) -> None:
    """A bucket, one of gathered shards, this rank's shards of one (1 / tp), and the largest tensor joined."""
    size, layout, model = LAYOUTS[name]
    for peak, bucket, largest, whole in run_ranks(measured_publish, size, layout, model):
        tp = layout.get("tp", 1)
        small = 16 * 1024  # checksums, notes of who owns what, rounding to 64 bytes
        assert bucket <= peak <= (bucket if tp == 1 else 2 * bucket + bucket // tp + largest) + small
        assert peak < whole / 2


def publish_to_first(address: RankAddress, layout: dict[str, Any], model: ModelConfig) -> dict[str, Tensor]:
    with megatron(ParallelConfig(**layout), address) as mesh:
        publisher = Publisher(built(model, layout, mesh, torch.float32), model, mesh, BUCKET_BYTES, readers="first")
        if address.rank == 0:
            return received(publisher, 1)
        assert list(publisher.buckets(1)) == []
        return {}


@pytest.mark.parametrize("name", ["tp2-pp2", "cp2-dp2"])
def test_where_only_the_first_rank_reads_the_others_only_take_part(name: str, tmp_path: Path) -> None:
    size, layout, model = LAYOUTS[name]
    first, *others = run_ranks(publish_to_first, size, layout, model)
    assert others == [{}] * 3
    (_, wanted, _) = run_ranks(publish, size, layout, model, torch.float32, str(tmp_path / "ckpt"))[0]
    assert differing(first, wanted) == []


def step_between(address: RankAddress, layout: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names that one optimizer step changed, of the parameters and of what is published."""
    config = run_config(FOUR_LAYERS, parallel=ParallelConfig(**layout), precision="bf16")
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        publisher = Publisher(trainer.bare_chunks, config.model, mesh, BUCKET_BYTES)
        receiver = Receiver({entry.name: entry for entry in publisher.manifest(0).tensors})
        before = received(publisher, 0, receiver)
        batches = [collate(pack, config.model, 96) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
        train_step(trainer, batches, 1, 1.0)
        after = received(publisher, 1, receiver)
        now = dict(weights.global_parameters(trainer.bare_chunks))
        stale = [
            spec.name
            for rule in rules_for(config.model)
            for spec, tensor in zip(rule.hf, rule.to_hf(now[rule.ours.name].detach()), strict=True)
            if not same_bits(after[spec.name], tensor)
        ]
        return differing(after, before), stale


def test_an_optimizer_step_is_published() -> None:
    """With the optimizer's own buffers under the parameters, whose shares the dp ranks exchange after the step."""
    for changed, stale in run_ranks(step_between, 2, {}):
        assert len(changed) > 50
        assert stale == []


def refusals(address: RankAddress, model: ModelConfig, other: ModelConfig) -> list[str]:
    with megatron(ParallelConfig(pp=2), address) as mesh:
        said = []
        for built_as, told in ((model, other), (other, model)):
            with pytest.raises(SyncError) as caught:
                Publisher(built(built_as, dict(pp=2), mesh, torch.float32), told, mesh)
            said.append(str(caught.value))
        return said


def test_every_rank_refuses_parameters_that_the_model_does_not_have() -> None:
    first, last = run_ranks(refusals, 2, FOUR_LAYERS, FOUR_LAYERS.model_copy(update={"vision": None}))
    assert "vision.patch_embed.weight" in first[0] and "no such tensor" in first[0]
    assert "by another pipeline rank" in last[0]
    assert all("no pipeline rank holds vision.patch_embed.weight" in said[1] for said in (first, last))


def refusal_of_reward_model(address: RankAddress) -> str:
    model = small_model(head="reward")
    with megatron(ParallelConfig(), address) as mesh, pytest.raises(ConfigError) as refusal:
        Publisher(built(model, {}, mesh, torch.float32), model, mesh)
    return str(refusal.value)


def test_a_reward_model_is_not_published() -> None:
    (refusal,) = run_ranks(refusal_of_reward_model, 1)
    assert "reward model" in refusal
