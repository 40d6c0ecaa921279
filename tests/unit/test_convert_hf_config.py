"""config.json both ways, checked against transformers' own configuration classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, GenerationConfig, Qwen2VLImageProcessorPil

from mimo_megatron.config.model import TOKEN_NAMES, ModelConfig
from mimo_megatron.config.presets import PRESETS, preset
from mimo_megatron.config.processor import copy_tokenizer
from mimo_megatron.convert.hf_config import (
    OWN_KEY,
    encoding_of,
    hf_config,
    model_from_hf_config,
    model_of,
    write_hf_companions,
)
from mimo_megatron.errors import CheckpointError

# The layout of released Qwen2.5-VL folders: text keys flat, rope under its old names, `in_chans`.
RELEASED: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_act": "silu",
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 128000, "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 640000, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151680,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3456, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 4096, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
MIMO_BASE: dict[str, Any] = {
    "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_theta": 640000,
    "tie_word_embeddings": False, "vocab_size": 151680, "use_sliding_window": False, "rope_scaling": None,
}  # fmt: skip


def changed(model: ModelConfig, part: str, **fields: Any) -> ModelConfig:
    return model.model_copy(update={part: getattr(model, part).model_copy(update=fields)})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_way_through_config_json(name: str) -> None:
    model = preset(name)
    assert model_from_hf_config(hf_config(model, torch.bfloat16), "folder") == model


def test_tied_embeddings_survive() -> None:
    model = changed(preset("tiny-vl"), "text", tie_embeddings=True)
    assert model_from_hf_config(hf_config(model, torch.bfloat16), "folder") == model


def test_the_released_flat_layout_is_mimo_vl() -> None:
    assert model_from_hf_config(RELEASED, "mimo-vl-7b") == preset("mimo-vl-7b")


def test_the_released_base_model_is_mimo_7b_base() -> None:
    assert model_from_hf_config(MIMO_BASE, "mimo-7b-base") == preset("mimo-7b-base")


@pytest.mark.parametrize("name", ["mimo-vl-7b", "qwen2.5-vl-7b", "tiny-vl"])
def test_what_transformers_understands_and_saves_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    model = preset(name)
    write_hf_companions(tmp_path, model, torch.bfloat16)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert theirs.text_config.rope_parameters["rope_theta"] == model.text.rope_theta
    assert theirs.text_config.rope_parameters["mrope_section"] == list(model.text.mrope_section)
    assert model_from_hf_config(theirs.to_dict(), name) == model
    without_our_key = {key: value for key, value in theirs.to_dict().items() if key != "mimo_megatron"}
    if name != "tiny-vl":  # whose turn_start token only our key can tell
        assert model_from_hf_config(without_our_key, name) == model


def test_a_text_model_without_prediction_layers_is_a_qwen2(tmp_path: Path) -> None:
    model = changed(preset("tiny-base"), "text", num_mtp_layers=0)
    write_hf_companions(tmp_path, model, torch.float32)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == "qwen2" and theirs.rope_parameters["rope_theta"] == model.text.rope_theta
    assert model_from_hf_config(theirs.to_dict(), "folder") == model
    assert not (tmp_path / "preprocessor_config.json").exists()


def test_the_image_processor_and_generation_settings_are_read_by_transformers(tmp_path: Path) -> None:
    write_hf_companions(tmp_path, preset("mimo-vl-7b"), torch.bfloat16)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__.startswith("Qwen2VLImageProcessor")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12_845_056)
    assert (processor.patch_size, processor.temporal_patch_size, processor.merge_size) == (14, 2, 2)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [151645, 151643]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"num_attention_heads": 31}, "text.num_heads|mrope_section"),
        ({"vision_config": {**RELEASED["vision_config"], "out_hidden_size": 3584}}, "out_hidden_size 3584"),
        ({"vision_config": {**RELEASED["vision_config"], "hidden_act": "gelu"}}, "vision_config.hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "positions of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "positions of type 'dynamic'"),
    ],
)
def test_a_model_that_is_not_ours_is_refused_by_the_key_that_differs(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        model_from_hf_config({**RELEASED, **change}, "folder")


def test_tokens_that_config_json_does_not_name_are_those_of_the_folders_tokenizer(tmp_path: Path) -> None:
    model = preset("tiny-vl")
    theirs = {key: value for key, value in hf_config(model, torch.float32).items() if key != OWN_KEY}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(
        CheckpointError, match=r"run: model.tokens.turn_start = 151644 is outside .*; put a tokenizer.json"
    ):
        model_of(tmp_path)
    added = [{"id": getattr(model.tokens, field), "content": name} for field, name in TOKEN_NAMES.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert model_of(tmp_path).tokens == model.tokens
    (tmp_path / "config.json").write_text(json.dumps({**theirs, "image_token_id": 99}))
    assert model_of(tmp_path).tokens.image_pad == 99, "config.json comes first"


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 7 * 784, "max_pixels": 100 * 784}])
def test_pixel_limits_are_those_that_transformers_goes_by(limits: dict[str, int], tmp_path: Path) -> None:
    """It writes them as the edges of ``size``, which are areas."""
    theirs = Qwen2VLImageProcessorPil(**limits)
    theirs.save_pretrained(tmp_path)
    encoding = encoding_of(tmp_path)
    assert (encoding.min_pixels, encoding.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])


def test_older_keys_of_pixel_limits_win_over_size_as_in_transformers(tmp_path: Path) -> None:
    size = {"shortest_edge": 784, "longest_edge": 78_400}
    written = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 1568, "max_pixels": None, "size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    theirs, ours = AutoImageProcessor.from_pretrained(tmp_path).size, encoding_of(tmp_path)
    assert (ours.min_pixels, ours.max_pixels) == (theirs["shortest_edge"], theirs["longest_edge"]) == (1568, 78_400)


def test_limits_that_are_no_numbers_are_refused_by_the_file(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": "few"}')
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json does not say how images are resized"):
        encoding_of(tmp_path)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(CheckpointError, match="lacks the key 'rms_norm_eps'"):
        model_from_hf_config({key: value for key, value in RELEASED.items() if key != "rms_norm_eps"}, "folder")


@pytest.mark.parametrize(
    "part, fields, named",
    [
        ("vision", {"norm_eps": 1e-5}, "vision.norm_eps"),
        ("vision", {"tokens_per_second": 1.5}, "tokens_per_second 1.5"),
        ("text", {"num_mtp_layers": 1}, "num_mtp_layers is 1"),
        ("text", {"num_heads": 8}, "head_width 32 x num_heads 8 != width 128"),
    ],
)
def test_a_model_that_hugging_face_cannot_run_is_not_exported(part: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        hf_config(changed(preset("tiny-vl"), part, **fields), torch.float32)


def test_the_tokenizer_and_chat_template_are_copied(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (source / name).write_text(name)
    copy_tokenizer(source, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["chat_template.jinja", "tokenizer.json"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        copy_tokenizer(tmp_path, tmp_path / "out")
