"""``config.json`` and its neighbours, both ways: Hugging Face's description of a model and our ``ModelConfig``.

Written: Qwen2.5-VL where there is a vision encoder, ``mimo`` where there are multi-token-prediction layers, Qwen2 else.
What Hugging Face's keys cannot say (a name, the turn_start token) travels under one key of ours, which others ignore.
Invariant: ``model_from_hf_config(hf_config(model)) == model`` for every model that Hugging Face's classes can run;
another model is refused with the fields that stand in the way.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mimo_megatron.config.model import TOKEN_NAMES, ModelConfig, SpecialTokens, TextConfig, VisionConfig
from mimo_megatron.config.processor import copy_tokenizer
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.convert.hf_io import read_json, write_json
from mimo_megatron.errors import CheckpointError

OWN_KEY = "mimo_megatron"
_PREPROCESSOR = "preprocessor_config.json"
_LIMIT_EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
_MODEL_TYPES = ("qwen2_5_vl", "mimo", "qwen2")
_ROPE_TYPES = ("default", "mrope")
"""Of rotary positions that are not stretched: Qwen2.5-VL's files have said either."""
_FIXED_VISION = {"norm_eps": 1e-6, "rope_theta": 10_000.0}
"""What Hugging Face's Qwen2.5-VL encoder has in its code, not in its configuration."""
_TOKEN_KEYS = {
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
    "image_pad": "image_token_id",
    "video_pad": "video_token_id",
    "pad": "pad_token_id",
}
_REWARD_CLASS = "ForSequenceClassification"
"""transformers has no such class of Qwen2.5-VL; vLLM makes one from the name."""
_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def check_exportable(model: ModelConfig) -> None:
    """Nothing, where Hugging Face's classes can run the model; else ``CheckpointError`` with what they lack."""
    text, vision = model.text, model.vision
    odd = []
    if text.head_width * text.num_heads != text.width:
        odd.append(f"text.head_width {text.head_width} x num_heads {text.num_heads} != width {text.width}")
    if vision is not None:
        if text.num_mtp_layers:
            odd.append(f"text.num_mtp_layers is {text.num_mtp_layers}, and Qwen2.5-VL has none")
        if not vision.tokens_per_second.is_integer():
            odd.append(f"vision.tokens_per_second {vision.tokens_per_second} is not a whole number")
        for key, value in _FIXED_VISION.items():
            if getattr(vision, key) != value:
                odd.append(f"vision.{key} is {getattr(vision, key)}, and Qwen2.5-VL's code has {value}")
    if odd:
        raise CheckpointError(f"model {model.name!r} has no Hugging Face form: {'; '.join(odd)}")


def hf_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of ``config.json``."""
    check_exportable(model)
    own = {
        "name": model.name,
        "tokens": model.tokens.model_dump(),
        "mrope_section": model.text.mrope_section,
        "mtp_loss_weight": model.text.mtp_loss_weight,
    }
    if model.vision is not None:
        own["video_advance"] = model.vision.video_advance
    common = {"tie_word_embeddings": model.text.tie_embeddings, "torch_dtype": str(dtype).removeprefix("torch.")}
    is_reward = model.text.head == "reward"
    if is_reward:
        common |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    text = _hf_text(model)
    if model.vision is None:
        kind = {"architectures": ["Qwen2" + (_REWARD_CLASS if is_reward else "ForCausalLM")], "model_type": "qwen2"}
        if model.text.num_mtp_layers:
            kind = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
            text["num_nextn_predict_layers"] = model.text.num_mtp_layers
        return {**kind, **text, **common, OWN_KEY: own}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": model.text.mrope_section}
    tokens = {key: getattr(model.tokens, name) for name, key in _TOKEN_KEYS.items() if name != "pad"}
    return {
        "architectures": ["Qwen2_5_VL" + (_REWARD_CLASS if is_reward else "ForConditionalGeneration")],
        "model_type": "qwen2_5_vl",
        "text_config": {"model_type": "qwen2_5_vl_text", **text, **common},
        "vision_config": _hf_vision(model.vision, model.text.width),
        **tokens,
        **common,
        OWN_KEY: own,
    }


def model_of(hf_dir: Path) -> ModelConfig:
    """Which model a Hugging Face folder holds, by its ``config.json`` and, for tokens, its ``tokenizer.json``."""
    return model_from_hf_config(read_json(hf_dir / "config.json"), hf_dir.name, _named_tokens(hf_dir))


def _named_tokens(hf_dir: Path) -> dict[str, int]:
    """The special tokens that the folder's tokenizer names as Qwen does; none where there is no ``tokenizer.json``."""
    path = hf_dir / "tokenizer.json"
    added = read_json(path).get("added_tokens", []) if path.is_file() else []
    ids = {token["content"]: token["id"] for token in added}
    return {field: ids[name] for field, name in TOKEN_NAMES.items() if name in ids}


def model_from_hf_config(
    config: Mapping[str, Any], name: str, named_tokens: Mapping[str, int] = MappingProxyType({})
) -> ModelConfig:
    """The model of a ``config.json``; ``name`` where the file has none.

    Reads the nested layout and the flat one of released checkpoints. Tokens without a key there, as ``turn_start``, are
    those of ``named_tokens``, else those of Qwen2.5-VL's vocabulary. ``CheckpointError`` says what is not understood.
    """
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise CheckpointError(f"{name}: model_type {kind!r} is not one of {', '.join(_MODEL_TYPES)}")
    own = config.get(OWN_KEY, {})
    text = {**config, **config.get("text_config", {})}
    fixed = {"hidden_act": "silu", "use_sliding_window": False}
    odd = [f"{key} {text[key]!r}, expected {value!r}" for key, value in fixed.items() if text.get(key, value) != value]
    odd += [f"rotary positions of type {one!r}, expected default" for one in _rope_types(text) - {*_ROPE_TYPES}]
    act = config.get("vision_config", {}).get("hidden_act", "silu")
    odd += [f"vision_config.hidden_act {act!r}, expected 'silu'"] if act != "silu" else []
    if odd:
        raise CheckpointError(f"{name}: this model cannot be trained here: {'; '.join(odd)}")
    try:
        vision = _vision_config(config["vision_config"], own) if kind == "qwen2_5_vl" else None
        tokens = {ours: text[key] for ours, key in _TOKEN_KEYS.items() if isinstance(text.get(key), int)}
        model = ModelConfig(
            name=own.get("name", name),
            text=_text_config(config, text, own),
            vision=vision,
            tokens=SpecialTokens(**{**named_tokens, **own.get("tokens", {}), **tokens}),
        )
    except KeyError as fault:
        raise CheckpointError(f"{name}: config.json lacks the key {fault}") from fault
    except ValidationError as fault:
        problems = "; ".join(map(_problem, fault.errors()))
        raise CheckpointError(f"{name}: config.json does not describe a model that can run: {problems}") from fault
    if vision is not None:
        out_width = config["vision_config"].get("out_hidden_size", model.text.width)
        if out_width != model.text.width:
            raise CheckpointError(
                f"{name}: vision_config.out_hidden_size {out_width} != the text model's hidden_size {model.text.width}"
            )
    return model


def _problem(detail: ErrorDetails) -> str:
    """One of pydantic's errors; our own validators say the key themselves."""
    where = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith("model.tokens."):
        message += "; put a tokenizer.json that names the token beside config.json"
    return f"{where}: {message}" if where else message


def write_hf_companions(
    folder: Path, model: ModelConfig, dtype: torch.dtype, encoding: EncodingConfig | None = None
) -> None:
    """Write config.json, generation_config.json and, with a vision encoder, preprocessor_config.json.

    With ``encoding``, the tokenizer is copied too, and its pixel limits are written; else MiMo-VL's limits.
    """
    tokens = model.tokens
    write_json(folder / "config.json", hf_config(model, dtype))
    generation = {"bos_token_id": tokens.pad, "pad_token_id": tokens.pad, "eos_token_id": list(tokens.ends)}
    write_json(folder / "generation_config.json", generation)
    if encoding is not None:
        copy_tokenizer(encoding.tokenizer, folder)
    if model.vision is not None:
        fields = EncodingConfig.model_fields
        processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": encoding.min_pixels if encoding else fields["min_pixels"].default,
            "max_pixels": encoding.max_pixels if encoding else fields["max_pixels"].default,
            "patch_size": model.vision.patch_size,
            "temporal_patch_size": model.vision.temporal_patch_size,
            "merge_size": model.vision.spatial_merge_size,
            "image_mean": list(_PIXEL_MEAN),
            "image_std": list(_PIXEL_STD),
        }
        if encoding is not None:
            processor[OWN_KEY] = {"video": encoding.video.model_dump()}
        write_json(folder / _PREPROCESSOR, processor)


def encoding_of(hf_dir: Path) -> EncodingConfig:
    """How a Hugging Face folder's model reads its input: its tokenizer and its image processor's limits."""
    processor = read_json(hf_dir / _PREPROCESSOR) if (hf_dir / _PREPROCESSOR).is_file() else {}
    # transformers 5 writes the limits as areas of two "edges"; where a file has both, it goes by the older keys.
    size = processor.get("size") or {}
    given = {key: processor.get(key) or size.get(edge) for key, edge in _LIMIT_EDGES.items()}
    limits = {key: value for key, value in given.items() if value is not None}
    try:
        return EncodingConfig.model_validate({"tokenizer": hf_dir, **limits, **processor.get(OWN_KEY, {})})
    except ValidationError as fault:
        raise CheckpointError(f"{hf_dir / _PREPROCESSOR} does not say how images are resized: {fault}") from fault


def _hf_text(model: ModelConfig) -> dict[str, Any]:
    text = model.text
    return {
        "hidden_act": "silu",
        "hidden_size": text.width,
        "intermediate_size": text.ffn_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "vocab_size": text.vocab_size,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": text.max_positions,
        "use_sliding_window": False,
        "bos_token_id": model.tokens.pad,
        "eos_token_id": model.tokens.turn_end,
        "pad_token_id": model.tokens.pad,
    }


def _hf_vision(vision: VisionConfig, out_width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl_vision",
        "hidden_act": "silu",
        "depth": vision.depth,
        "hidden_size": vision.width,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.ffn_width,
        "in_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "window_size": vision.window_size,
        "fullatt_block_indexes": list(vision.full_attention_layers),
        "tokens_per_second": int(vision.tokens_per_second),
        "out_hidden_size": out_width,
    }


def _text_config(config: Mapping[str, Any], text: Mapping[str, Any], own: Mapping[str, Any]) -> TextConfig:
    rope = _rope(text)
    width, heads = text["hidden_size"], text["num_attention_heads"]
    is_reward = any(one.endswith(_REWARD_CLASS) for one in config.get("architectures") or ())
    head_width = text.get("head_dim") or width // heads
    # transformers wrote this key inside text_config before version 5, and beside it since; either may say so
    ties_embeddings = any(place.get("tie_word_embeddings", False) for place in (config, text))
    return TextConfig(
        num_layers=text["num_hidden_layers"],
        width=width,
        num_heads=heads,
        num_kv_heads=text["num_key_value_heads"],
        head_width=head_width,
        ffn_width=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        rope_theta=rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"],
        mrope_section=tuple(rope.get("mrope_section") or own.get("mrope_section") or _usual_section(head_width)),
        norm_eps=text["rms_norm_eps"],
        max_positions=text["max_position_embeddings"],
        head="reward" if is_reward else "vocabulary",
        tie_embeddings=ties_embeddings,
        num_mtp_layers=text.get("num_nextn_predict_layers", 0) if config["model_type"] == "mimo" else 0,
        **{key: own[key] for key in ("mtp_loss_weight",) if key in own},
    )


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a configuration says of rotary positions, by transformers 5's key or the older one."""
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _rope_types(text: Mapping[str, Any]) -> set[str]:
    """By which rule they are made, as the key or its older spelling says: ``yarn`` stretches them, say."""
    rope = _rope(text)
    return {rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}


def _usual_section(head_width: int) -> tuple[int, int, int]:
    """How Qwen2.5-VL shares the frequencies (16, 24 and 24 of 64), for a text model that never had three axes."""
    time = head_width // 8
    space = (head_width // 2 - time) // 2
    return (head_width // 2 - 2 * space, space, space)


def _vision_config(vision: Mapping[str, Any], own: Mapping[str, Any]) -> VisionConfig:
    optional = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "spatial_merge_size": "spatial_merge_size",
        "window_size": "window_size",
        "in_channels": "in_channels" if "in_channels" in vision else "in_chans",
    }
    return VisionConfig(
        depth=vision["depth"],
        width=vision["hidden_size"],
        num_heads=vision["num_heads"],
        ffn_width=vision["intermediate_size"],
        full_attention_layers=tuple(vision["fullatt_block_indexes"]),
        tokens_per_second=vision.get("tokens_per_second", 4.0),  # 4 is what transformers assumes
        **{ours: vision[key] for ours, key in optional.items() if key in vision},
        **{key: own[key] for key in ("video_advance",) if key in own},
        **_FIXED_VISION,
    )
