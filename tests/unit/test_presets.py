"""Presets load, have the published sizes and the properties that follow from them."""

import pytest

from mimo_megatron.config.model import ModelConfig, VisionConfig
from mimo_megatron.config.presets import PRESETS, preset
from mimo_megatron.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_under_its_name(name: str) -> None:
    model = preset(name)
    assert model.name == name
    assert ModelConfig.model_validate_json(model.model_dump_json()) == model


def test_an_unknown_preset_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'gpt'; there are mimo-vl-7b, qwen2\.5-vl-7b"):
        preset("gpt")


def test_mimo_vl_7b_has_the_reports_sizes() -> None:
    model = preset("mimo-vl-7b")
    text, vision = model.text, model.vision
    assert vision is not None
    assert (text.num_layers, text.width, text.num_heads, text.num_kv_heads, text.ffn_width) == (36, 4096, 32, 8, 11008)
    assert (text.head_width, text.vocab_size, text.rope_theta, text.mrope_section) == (
        128,
        151_680,
        640_000.0,
        (16, 24, 24),
    )
    assert (vision.depth, vision.width, vision.num_heads, vision.ffn_width) == (32, 1280, 16, 3456)
    assert (vision.head_width, vision.patch_bytes, vision.merge_factor, vision.pixel_multiple) == (80, 1176, 4, 28)
    assert not text.tie_embeddings and text.num_mtp_layers == 0


def test_its_vision_encoder_is_wider_than_that_of_qwen_7b() -> None:
    mimo, qwen = (preset(name).vision for name in ("mimo-vl-7b", "qwen2.5-vl-7b"))
    assert mimo is not None and qwen is not None
    assert {key for key, value in mimo if value != getattr(qwen, key)} == {"ffn_width"}
    assert qwen.ffn_width == 3420


def test_mimo_7b_base_is_the_text_part_with_one_mtp_layer() -> None:
    base, whole = preset("mimo-7b-base"), preset("mimo-vl-7b")
    assert base.vision is None
    assert {key for key, value in base.text if value != getattr(whole.text, key)} == {"num_mtp_layers", "max_positions"}
    assert base.text.num_mtp_layers == 1


def test_the_tiny_twins_keep_every_feature() -> None:
    tiny = preset("tiny-vl")
    assert tiny.vision is not None
    windows = set(range(tiny.vision.depth)) - set(tiny.vision.full_attention_layers)
    assert windows and tiny.vision.full_attention_layers  # both kinds of attention
    assert 1 < tiny.text.num_kv_heads < tiny.text.num_heads  # grouped queries, divisible over 2 ranks
    assert all(tiny.text.mrope_section)
    assert preset("tiny-base").text.num_mtp_layers == 1


@pytest.mark.parametrize("name", PRESETS)
def test_special_tokens_are_distinct(name: str) -> None:
    tokens = preset(name).tokens.model_dump()
    assert len(set(tokens.values())) == len(tokens)


def test_sizes_that_do_not_fit_are_refused() -> None:
    good = preset("tiny-vl").vision
    assert good is not None
    for change, words in (
        ({"num_heads": 3}, "whole multiple of 4"),
        ({"window_size": 100}, "must be a multiple of 28"),
        ({"window_size": 0}, "must be a multiple of 28, above 0"),
        ({"in_channels": 1}, "must be 3: images are read as RGB"),
        ({"full_attention_layers": [4]}, "exceed depth 4"),
    ):
        with pytest.raises(ValueError, match=words):
            VisionConfig(**{**good.model_dump(), **change})  # type: ignore[arg-type]
