"""The converter's verbs on tiny folders: bit-exact round trips, and every kind of wrong input stopped by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, load

from mimo_megatron.config.manifest import MANIFEST_FILE, seal
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.convert.checkpoint_io import CheckpointReader
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import hf_config
from mimo_megatron.convert.hf_io import INDEX_FILE
from mimo_megatron.convert.storage import same_bits
from mimo_megatron.convert.verbs import assemble, from_hf, seal_checkpoint, to_hf, verify
from mimo_megatron.errors import CheckpointError, DamagedCheckpointError
from tests.convert_fixtures import load_hf, small_model, write_random_hf

MODELS = {
    "vision-language": small_model(),
    "vision-language-tied": small_model(tie_embeddings=True),
    "text-with-prediction-layer": small_model("tiny-base"),
    "text-tied": small_model("tiny-base", num_mtp_layers=0, tie_embeddings=True),
}


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Put other tensors into a Hugging Face folder (None: take it out), as one file."""
    tensors = {**load_hf(folder), **change}
    for path in (*folder.glob("*.safetensors"), folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    save_file({name: one for name, one in tensors.items() if one is not None}, folder / "model.safetensors")


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = load_hf(a), load_hf(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not same_bits(first[name], second[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_gives_every_tensor_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[name]
    hf = write_random_hf(tmp_path / "hf", model, dtype)
    assert from_hf(hf, tmp_path / "ckpt") == model
    assert to_hf(tmp_path / "ckpt", tmp_path / "back") == model
    assert_same_tensors(hf, tmp_path / "back")
    assert json.loads((hf / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    result = verify(tmp_path / "ckpt", hf)
    assert result.is_equal and result.num_tensors == len(load_hf(hf))
    assert result.num_bytes == sum(one.nbytes for one in load_hf(hf).values())


def test_torchs_own_reader_finds_the_tensors_that_ours_finds(tmp_path: Path) -> None:
    from_hf(write_random_hf(tmp_path / "hf", small_model()), tmp_path / "ckpt")
    reader = CheckpointReader(tmp_path / "ckpt")
    theirs = {key: torch.empty(one.shape, dtype=one.dtype) for key, one in reader.tensors.items()}
    load(theirs, storage_reader=FileSystemReader(tmp_path / "ckpt"), no_dist=True)
    assert all(same_bits(reader.read(key), tensor) for key, tensor in theirs.items())


def test_a_dtype_converts_every_tensor(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model())
    from_hf(hf, tmp_path / "ckpt", torch.bfloat16)
    to_hf(tmp_path / "ckpt", tmp_path / "bf16")
    want, got = load_hf(hf), load_hf(tmp_path / "bf16")
    assert all(same_bits(got[name], want[name].bfloat16()) for name in want)
    to_hf(tmp_path / "ckpt", tmp_path / "fp32", torch.float32)
    assert all(one.dtype == torch.float32 for one in load_hf(tmp_path / "fp32").values())
    assert json.loads((tmp_path / "fp32/config.json").read_text())["torch_dtype"] == "float32"
    assert len(verify(tmp_path / "ckpt", hf).mismatches) == len(want)


def test_one_changed_bit_is_found_and_named(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model())
    from_hf(hf, tmp_path / "ckpt")
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = load_hf(hf)[name]
    weight.view(torch.int32)[3, 5] ^= 1
    rewrite(hf, {name: weight})
    result = verify(tmp_path / "ckpt", hf)
    assert result.mismatches == (name,) and name in str(result)


FAULTS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": ({"model.layers.1.mlp.up_proj.weight": None}, "1 missing: model.layers.1.mlp.up_proj.weight"),
    "unexpected": ({"model.layers.2.extra": torch.ones(2)}, r"1 unexpected: model.layers.2.extra \[2\]"),
    "shape": (
        {"visual.merger.ln_q.weight": torch.ones(47)},
        r"1 of another shape: visual.merger.ln_q.weight \[47\], expected \[48\]",
    ),
    "dtype": (
        {"model.norm.weight": torch.ones(96, dtype=torch.float16)},
        "1 of another dtype: model.norm.weight torch.float16, expected torch.float32",
    ),
    "integers": (
        {"model.norm.weight": torch.ones(96, dtype=torch.int8)},
        "1 of another dtype: model.norm.weight torch.int8",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_wrong_tensors_is_refused_by_name_and_leaves_nothing(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    hf = write_random_hf(tmp_path / "hf", small_model())
    rewrite(hf, change)
    with pytest.raises(CheckpointError, match=message):
        from_hf(hf, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_mixed_dtypes_are_accepted_once_a_dtype_is_given(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model())
    rewrite(hf, {"model.norm.weight": torch.ones(96, dtype=torch.float16)})
    from_hf(hf, tmp_path / "ckpt", torch.float32)
    assert torch.equal(CheckpointReader(tmp_path / "ckpt").read("text.decoder.final_layernorm.weight"), torch.ones(96))


def test_many_missing_tensors_are_cut_to_ten_names(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model())
    rewrite(hf, {name: None for name in load_hf(hf) if name.startswith("visual.blocks.0.")})
    with pytest.raises(CheckpointError, match=r"12 missing: .*; and 2 more"):
        from_hf(hf, tmp_path / "ckpt")


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model())
    from_hf(hf, tmp_path / "ckpt")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "ckpt").iterdir())
    for verb in (lambda: from_hf(hf, tmp_path / "ckpt"), lambda: to_hf(tmp_path / "ckpt", hf)):
        with pytest.raises(CheckpointError, match="already exists; remove it"):
            verb()
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "ckpt").iterdir()) == before


def test_a_fault_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    from_hf(write_random_hf(tmp_path / "hf", small_model()), tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        to_hf(tmp_path / "ckpt", tmp_path / "back", tokenizer_from=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


def test_the_tokenizer_and_the_pixel_limits_go_round_with_the_weights(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (hf / name).write_text(json.dumps({"name": name}))
    settings = json.loads((hf / "preprocessor_config.json").read_text())
    (hf / "preprocessor_config.json").write_text(json.dumps({**settings, "max_pixels": 1_000_000}))
    from_hf(hf, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    back = {path.name: path.read_text() for path in (tmp_path / "back").glob("*.js*n*")}
    assert back.keys() >= {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "back/chat_template.jinja").read_text() == '{"name": "chat_template.jinja"}'
    assert json.loads(back["preprocessor_config.json"])["max_pixels"] == 1_000_000


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model())
    (tmp_path / "ckpt.tmp").mkdir()
    (tmp_path / "ckpt.tmp/half").write_text("")
    from_hf(hf, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt.tmp").exists() and not (tmp_path / "ckpt/half").exists()


def test_a_repeated_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    hf = write_random_hf(tmp_path / "hf", small_model(tie_embeddings=True))
    embedding = load_hf(hf)["model.embed_tokens.weight"]
    rewrite(hf, {"lm_head.weight": embedding.clone()})
    from_hf(hf, tmp_path / "ckpt")
    assert "text.output_layer.weight" not in CheckpointReader(tmp_path / "ckpt").tensors
    rewrite(hf, {"lm_head.weight": embedding.clone().zero_()})
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        from_hf(hf, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def with_torn_data(ckpt: Path) -> None:
    data = next(ckpt.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def edit_description(ckpt: Path, **change: Any) -> None:
    description = json.loads((ckpt / "model.json").read_text())
    (ckpt / "model.json").write_text(json.dumps({**description, **change}))


TORN = {
    "no description": (lambda ckpt: (ckpt / "model.json").unlink(), "is not a checkpoint: it has no model.json"),
    "newer format": (lambda ckpt: edit_description(ckpt, format=2), "format 2, this version reads 1"),
    "no model": (lambda ckpt: edit_description(ckpt, model={}), "does not describe a model"),
    "unfinished": (lambda ckpt: (ckpt / ".metadata").unlink(), "not a finished checkpoint"),
    "torn index": (lambda ckpt: (ckpt / ".metadata").write_bytes(b"\x80\x04"), "metadata is torn"),
    "torn data": (with_torn_data, r"is torn: text\..* should lie in bytes"),
    "no data": (lambda ckpt: next(ckpt.glob("*.distcp")).unlink(), "which has 0"),
    "other model": (
        lambda ckpt: edit_description(ckpt, model=small_model(ffn_width=64).model_dump(mode="json")),
        r"of another shape: text\.decoder\.layers\.0\.mlp\.linear_fc1\.weight \[160, 96\], expected \[128, 96\]",
    ),
}


@pytest.mark.parametrize("fault", TORN)
def test_a_checkpoint_that_is_not_whole_is_refused(fault: str, tmp_path: Path) -> None:
    from_hf(write_random_hf(tmp_path / "hf", small_model("tiny-base")), tmp_path / "ckpt")
    damage, message = TORN[fault]
    damage(tmp_path / "ckpt")
    with pytest.raises(DamagedCheckpointError):
        to_hf(tmp_path / "ckpt", tmp_path / "back")
    seal(tmp_path / "ckpt")  # past the checksums, the contents are still looked at
    with pytest.raises(CheckpointError, match=message):
        to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_sealing_declares_an_older_checkpoint_good_but_not_a_torn_or_sealed_one(tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    from_hf(write_random_hf(tmp_path / "hf", small_model("tiny-base")), ckpt)
    with pytest.raises(CheckpointError, match="sealed already"):
        seal_checkpoint(ckpt)
    (ckpt / MANIFEST_FILE).unlink()
    with pytest.raises(DamagedCheckpointError, match="mimo-megatron convert seal"):
        to_hf(ckpt, tmp_path / "back")
    seal_checkpoint(ckpt)
    to_hf(ckpt, tmp_path / "back")
    (ckpt / MANIFEST_FILE).unlink()
    with_torn_data(ckpt)
    with pytest.raises(CheckpointError, match="is torn"):
        seal_checkpoint(ckpt)
    assert not (ckpt / MANIFEST_FILE).exists()


def test_a_folder_of_another_model_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    from_hf(write_random_hf(tmp_path / "hf", small_model()), tmp_path / "ckpt")
    other = write_random_hf(tmp_path / "other", small_model(ffn_width=64))
    with pytest.raises(CheckpointError, match=r"model\.text\.ffn_width: found 64, wanted 80"):
        verify(tmp_path / "ckpt", other)


def assembled_from(tmp_path: Path, seed: int, **keywords: Any) -> tuple[ModelConfig, Path]:
    text = small_model("tiny-base")
    vision = small_model(width=48, num_heads=3, num_kv_heads=1, vocab_size=300)
    for name, model, dtype in (("text", text, torch.bfloat16), ("vision", vision, torch.float32)):
        if not (tmp_path / name).exists():
            write_random_hf(tmp_path / name, model, dtype, seed=len(name))
    out = tmp_path / f"start-{seed}"
    return assemble(tmp_path / "text", tmp_path / "vision", out, seed, **keywords), out


def test_the_start_point_is_the_text_the_encoder_and_a_random_projector(tmp_path: Path) -> None:
    model, ckpt = assembled_from(tmp_path, 3, dtype=torch.float32, name="start")
    text, vision = small_model("tiny-base"), small_model(width=48, num_heads=3, num_kv_heads=1)
    assert model.text == text.text.model_copy(update={"num_mtp_layers": 0}) and model.vision == vision.vision
    to_hf(ckpt, tmp_path / "out")
    got, from_text, from_vision = (load_hf(tmp_path / name) for name in ("out", "text", "vision"))
    for name, tensor in got.items():
        if name.startswith("visual.merger."):
            continue
        source = from_vision if name.startswith("visual.") else from_text
        assert same_bits(tensor, source[name].float()), name
    assert not [name for name in got if "mtp" in name]
    assert tuple(got["visual.merger.mlp.2.weight"].shape) == (96, 192)
    for name in ("visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"):
        assert abs(got[name].std().item() - 0.02) < 0.001 and abs(got[name].mean().item()) < 0.001
    assert torch.equal(got["visual.merger.ln_q.weight"], torch.ones(48))
    assert not got["visual.merger.mlp.0.bias"].any() and not got["visual.merger.mlp.2.bias"].any()


def test_the_random_projector_is_a_function_of_the_seed(tmp_path: Path) -> None:
    projectors = []
    for seed in (3, 4):
        reader = CheckpointReader(assembled_from(tmp_path, seed, dtype=torch.float32)[1])
        projectors.append(reader.read("projector.fc1.weight").clone())
    shutil.rmtree(tmp_path / "start-3")
    again = CheckpointReader(assembled_from(tmp_path, 3, dtype=torch.float32)[1])
    assert torch.equal(again.read("projector.fc1.weight"), projectors[0])
    assert not torch.equal(projectors[0], projectors[1])


def test_parts_in_two_dtypes_need_a_dtype(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text is in torch\.bfloat16, .*vision in torch\.float32; give a dtype"):
        assembled_from(tmp_path, 3)


def test_an_encoder_is_not_taken_from_a_text_model(tmp_path: Path) -> None:
    text = write_random_hf(tmp_path / "text", small_model("tiny-base"))
    with pytest.raises(CheckpointError, match="it has no vision encoder"):
        assemble(text, text, tmp_path / "out", 1)


def test_the_encoders_folder_needs_no_text_and_no_projector(tmp_path: Path) -> None:
    text = write_random_hf(tmp_path / "text", small_model("tiny-base"))
    vision = write_random_hf(tmp_path / "vision", small_model())
    rewrite(vision, {name: None for name in load_hf(vision) if not name.startswith("visual.blocks.")
                     and name != "visual.patch_embed.proj.weight"})  # fmt: skip
    model = assemble(text, vision, tmp_path / "out", 1)
    assert CheckpointReader(tmp_path / "out").tensors.keys() == {rule.ours.name for rule in rules_for(model)}
    rewrite(vision, {"visual.blocks.1.norm1.weight": None})
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.blocks\.1\.norm1\.weight"):
        assemble(text, vision, tmp_path / "out2", 1)


def test_a_model_without_a_hugging_face_form_is_not_exported(tmp_path: Path) -> None:
    from_hf(write_random_hf(tmp_path / "hf", small_model()), tmp_path / "ckpt")
    model = small_model()
    assert model.vision is not None
    odd = model.model_copy(update={"vision": model.vision.model_copy(update={"norm_eps": 1e-5})})
    with pytest.raises(CheckpointError, match="has no Hugging Face form"):
        hf_config(odd, torch.float32)
    edit_description(tmp_path / "ckpt", model=odd.model_dump(mode="json"))
    seal(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="has no Hugging Face form"):
        to_hf(tmp_path / "ckpt", tmp_path / "back")


MEASURE = """
import re, sys, torch
from pathlib import Path
from mimo_megatron.convert.verbs import from_hf, to_hf
def resident(field):  # getrusage's peak would be that of the process that started this one
    return int(re.search(field + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
before = resident("VmRSS")
from_hf(Path(sys.argv[1]), Path(sys.argv[2]))
to_hf(Path(sys.argv[2]), Path(sys.argv[3]))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is read from /proc")
def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(tmp_path: Path) -> None:
    model = small_model(
        width=1024, num_heads=16, num_kv_heads=4, head_width=64, mrope_section=(8, 12, 12), ffn_width=4096, num_layers=6
    )
    hf = write_random_hf(tmp_path / "hf", model, torch.bfloat16, shard_bytes=60_000_000)
    largest = max(rule.ours.numel for rule in rules_for(model)) * 2
    model_bytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(hf), str(tmp_path / "ckpt"), str(tmp_path / "back")]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert model_bytes > 10 * largest
    assert growth <= 4 * largest  # measured: 2.6 times
