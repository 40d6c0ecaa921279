"""The converter against the two programs it stands between: transformers' models and megatron's checkpoints.

Both are real here: transformers loads what is exported, megatron-core loads what is imported, strictly, in several
layouts, and what four ranks saved is exported as what one rank saved.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemReader
from torch.multiprocessing import ProcessRaisedException
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.convert import verbs
from mimo_megatron.convert.checkpoint_io import CheckpointReader
from mimo_megatron.convert.families import object_keys, rules_for
from mimo_megatron.convert.hf_config import hf_config
from mimo_megatron.convert.storage import same_bits
from mimo_megatron.convert.verbs import from_hf, to_hf, verify
from mimo_megatron.mcore import checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.optimizer import CONTENT
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.train.step import build_trainer
from tests.convert_fixtures import load_hf, small_model, write_random_hf
from tests.harness import run_ranks
from tests.samples import run_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp2": (2, dict(tp=2, sequence_parallel=True)),
    "pp2": (2, dict(pp=2)),
    "tp2-pp2": (4, dict(tp=2, pp=2)),
}


def transformers_folder(folder: Path, **text_fields: Any) -> Path:
    """A random model built, filled and saved by transformers alone."""
    config = Qwen2_5_VLConfig(**hf_config(small_model(**text_fields), torch.float32))
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_saves_is_imported_and_exported_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    hf = transformers_folder(tmp_path / "hf", tie_embeddings=tied)
    from_hf(hf, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert verify(tmp_path / "ckpt", hf).is_equal
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert {key: list(value) for key, value in loading.items() if value} == {}
    first = Qwen2_5_VLForConditionalGeneration.from_pretrained(hf)
    assert model.config.tie_word_embeddings == tied
    assert first.state_dict().keys() == model.state_dict().keys()
    assert all(same_bits(one, model.state_dict()[name]) for name, one in first.state_dict().items())


def test_what_is_exported_gives_transformers_the_same_logits(tmp_path: Path) -> None:
    hf = transformers_folder(tmp_path / "hf")
    from_hf(hf, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back", shard_bytes=100_000)
    tokens = small_model().tokens
    ids = torch.tensor([[20, tokens.vision_start, *[tokens.image_pad] * 6, tokens.vision_end, 30, 31]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == tokens.image_pad).int(),
        "pixel_values": torch.randn(24, 1176),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    logits = []
    for folder in (hf, tmp_path / "back"):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits) and logits[0].std() > 0


def test_a_text_model_without_prediction_layers_loads_as_qwen2(tmp_path: Path) -> None:
    from_hf(write_random_hf(tmp_path / "hf", small_model("tiny-base", num_mtp_layers=0)), tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    _, loading = Qwen2ForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert {key: list(value) for key, value in loading.items() if value} == {}


def load_strictly(address: RankAddress, layout: dict[str, Any], model: ModelConfig, ckpt: str) -> dict[str, Tensor]:
    """This rank's parameters, gathered over tp, after a load that tolerates no missing and no further key."""
    parallel = ParallelConfig(**layout)
    with megatron(parallel, address) as mesh:
        built = VisionLanguageModel(model, parallel, Numerics(torch.float32), mesh)
        for param in built.parameters():
            torch.nn.init.constant_(param, 7.0)
        wanted = built.sharded_state_dict(metadata=CONTENT)
        built.load_state_dict(dist_checkpointing.load(wanted, ckpt, strict="raise_all"), strict=True)
        return {
            name: weights.unshard(name, param.data, param, mesh.tp).clone()
            for name, param in weights.global_parameters([built])
        }


MODELS = {
    "vision-language": small_model(),
    "vision-language-tied": small_model(tie_embeddings=True),
    "text-with-prediction-layer": small_model("tiny-base"),
}
CASES = [(name, layout) for name in MODELS for layout in LAYOUTS if "tied" not in name or layout == "pp2"]


@pytest.mark.parametrize("name, layout", CASES)
def test_megatron_loads_an_imported_model_strictly_in_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    from_hf(write_random_hf(tmp_path / "hf", MODELS[name]), ckpt)
    reader = CheckpointReader(ckpt)
    world_size, fields = LAYOUTS[layout]
    loaded: dict[str, Tensor] = {}
    for held in run_ranks(load_strictly, world_size, fields, MODELS[name], str(ckpt)):
        for key, tensor in held.items():
            assert same_bits(loaded.setdefault(key, tensor), tensor), f"ranks disagree on {key}"
    assert loaded.keys() == reader.tensors.keys()
    assert [key for key in loaded if not same_bits(loaded[key], reader.read(key))] == []


def random_weights(address: RankAddress, layout: dict[str, Any], model: ModelConfig, ckpt: str) -> dict[str, Tensor]:
    """This rank's shards of them; saved with the optimizer, as training does, where ``ckpt`` is named."""
    config = run_config(model, parallel=ParallelConfig(**layout), precision="bf16")
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        if ckpt:
            checkpoint.save(Path(ckpt), model, trainer.bare_chunks, trainer.optimizer)
        return {name: param.data.clone() for name, param in weights.global_parameters(trainer.bare_chunks)}


@pytest.mark.slow
def test_what_four_ranks_saved_is_exported_as_the_weights_of_one_rank(tmp_path: Path) -> None:
    """Weights are a function of the seed alone, so one rank's are the whole of what four ranks saved."""
    model, (world_size, layout) = small_model(), LAYOUTS["tp2-pp2"]
    (whole,) = run_ranks(random_weights, 1, {}, model, "")
    run_ranks(random_weights, world_size, layout, model, str(tmp_path / "ckpt"))
    to_hf(tmp_path / "ckpt", tmp_path / "hf")
    got = load_hf(tmp_path / "hf")
    want = {
        spec.name: tensor
        for rule in rules_for(model)
        for spec, tensor in zip(rule.hf, rule.to_hf(whole[rule.ours.name]), strict=True)
    }
    assert got.keys() == want.keys() and got["lm_head.weight"].dtype == torch.bfloat16
    assert [name for name in want if not same_bits(got[name], want[name])] == []
    stored = FileSystemReader(tmp_path / "ckpt").read_metadata().state_dict_metadata
    assert len(stored["text.decoder.layers.1.mlp.linear_fc1.weight"].chunks) == 4  # gate and up, of two ranks
    assert any(key.startswith("optimizer.") for key in stored)
    objects = [key for key, entry in stored.items() if isinstance(entry, BytesStorageMetadata)]
    assert sorted(objects) == sorted(object_keys(model))


def test_a_strict_load_is_refused_without_megatrons_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "object_keys", lambda _: [])
    from_hf(write_random_hf(tmp_path / "hf", small_model()), tmp_path / "ckpt")
    with pytest.raises(ProcessRaisedException, match=r"linear_qkv\._extra_state"):
        run_ranks(load_strictly, 1, {}, small_model(), str(tmp_path / "ckpt"))


def test_training_loads_an_imported_model(tmp_path: Path) -> None:
    """Through the trainer's own door, which also asks for its state."""
    from_hf(write_random_hf(tmp_path / "hf", small_model()), tmp_path / "ckpt")
    assert run_ranks(load_as_training_does, 1, small_model(), str(tmp_path / "ckpt")) == [{}]


def load_as_training_does(address: RankAddress, model: ModelConfig, ckpt: str) -> dict[str, Any]:
    config = run_config(model)
    with megatron(config.parallel, address) as mesh:
        return checkpoint.load(Path(ckpt), model, build_trainer(config, mesh).bare_chunks)
