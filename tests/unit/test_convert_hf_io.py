"""Safetensors folders as they arrive: newer names, torn files, missing shards, odd dtypes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimo_megatron.convert.hf_io import INDEX_FILE, SINGLE_FILE, SafetensorsFolder, SafetensorsWriter
from mimo_megatron.convert.rules import Spec
from mimo_megatron.errors import CheckpointError


def write_two_shards(folder: Path) -> None:
    specs = [Spec("a", (4, 4)), Spec("b", (4, 4))]
    with SafetensorsWriter(folder, specs, torch.float32, shard_bytes=64) as writer:
        for i, spec in enumerate(specs):
            writer.add(spec.name, torch.full(spec.shape, float(i)))


def test_files_of_the_safetensors_package_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(2.0), "d": torch.empty(0, 3)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    folder = SafetensorsFolder(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(folder.read(name), tensor) and folder.tensors[name].shape == tuple(tensor.shape)


def test_names_of_transformers_5_are_read_as_the_released_ones(tmp_path: Path) -> None:
    names = ["model.visual.patch_embed.proj.weight", "model.language_model.norm.weight", "lm_head.weight"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / SINGLE_FILE)
    assert SafetensorsFolder(tmp_path).tensors.keys() == {
        "visual.patch_embed.proj.weight", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    save_file({name: torch.ones(2) for name in ("model.norm.weight", "model.language_model.norm.weight")},
              tmp_path / SINGLE_FILE)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is there twice"):
        SafetensorsFolder(tmp_path)


def test_several_files_get_an_index_with_their_total(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    assert index["metadata"]["total_size"] == 128


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file .*model-00002-of-00002\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file .*model\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="promises c here"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("kept", [3, 40, -1], ids=["in-the-length", "in-the-header", "in-the-last-tensor"])
def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path: Path, kept: int) -> None:
    save_file({"a": torch.randn(3, 5)}, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (torn|not a safetensors file)"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_out_of_turn_is_our_own_mistake(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, [Spec("a", (2,)), Spec("b", (2,))], torch.float32, 100)
    with pytest.raises(AssertionError):
        writer.add("b", torch.ones(2))


def test_reading_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / SINGLE_FILE)
    SafetensorsFolder(tmp_path).read("a").zero_()
    assert torch.equal(SafetensorsFolder(tmp_path).read("a"), torch.ones(4))
