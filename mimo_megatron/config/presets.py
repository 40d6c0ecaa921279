"""Models by name. Sources: MiMo-VL report (arXiv 2506.03569) Table 4, MiMo-7B report (arXiv 2505.07608) section 2.3,
the public Qwen2.5-VL configurations, and the parameter counts they imply (checked in tests/unit/test_presets.py)."""

from typing import Any

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.errors import ConfigError

_MIMO_TEXT: dict[str, Any] = dict(
    num_layers=36, width=4096, num_heads=32, num_kv_heads=8, head_width=128, ffn_width=11008, vocab_size=151_680,
    rope_theta=640_000.0, mrope_section=(16, 24, 24), norm_eps=1e-5, max_positions=128_000,
)  # fmt: skip
_QWEN_7B_TEXT: dict[str, Any] = dict(
    num_layers=28, width=3584, num_heads=28, num_kv_heads=4, head_width=128, ffn_width=18944, vocab_size=152_064,
    rope_theta=1_000_000.0, mrope_section=(16, 24, 24), norm_eps=1e-6, max_positions=128_000,
)  # fmt: skip
_QWEN_VIT: dict[str, Any] = dict(depth=32, width=1280, num_heads=16, full_attention_layers=(7, 15, 23, 31))

# The tiny twins keep every architectural feature. Rotary frequencies are chosen for grids of a few tokens: at a base of
# 640,000 and a head of 32 the height and width axes would turn by less than 0.3 rad over a whole tiny image. Answers
# are given by plain transformers, so text counts on after a video as it does there.
_TINY_TEXT: dict[str, Any] = dict(
    num_layers=4, width=128, num_heads=4, num_kv_heads=2, head_width=32, ffn_width=384, vocab_size=512,
    rope_theta=20.0, mrope_section=(2, 7, 7), norm_eps=1e-5, max_positions=4096,
)  # fmt: skip
_TINY_VIT: dict[str, Any] = dict(
    depth=4, width=128, num_heads=4, ffn_width=344, full_attention_layers=(1, 3), video_advance="frame"
)
_TINY_TOKENS: dict[str, int] = dict(
    pad=0, turn_start=1, turn_end=2, vision_start=3, vision_end=4, image_pad=5, video_pad=6
)

PRESETS: dict[str, dict[str, Any]] = {
    "mimo-vl-7b": dict(text=_MIMO_TEXT, vision={**_QWEN_VIT, "ffn_width": 3456}),
    "qwen2.5-vl-7b": dict(text=_QWEN_7B_TEXT, vision={**_QWEN_VIT, "ffn_width": 3420}),
    "mimo-7b-base": dict(text={**_MIMO_TEXT, "num_mtp_layers": 1, "max_positions": 32_768}, vision=None),
    "tiny-vl": dict(text=_TINY_TEXT, vision=_TINY_VIT, tokens=_TINY_TOKENS),
    "tiny-base": dict(text={**_TINY_TEXT, "num_mtp_layers": 1}, vision=None, tokens=_TINY_TOKENS),
}


def preset(name: str) -> ModelConfig:
    """The model of that name. ``ConfigError`` lists the known names."""
    if name not in PRESETS:
        raise ConfigError(f"model.preset: no preset {name!r}; there are {', '.join(PRESETS)}")
    return ModelConfig(name=name, **PRESETS[name])
