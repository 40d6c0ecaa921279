"""What a model is: the sizes that fix every parameter's shape, and the special token ids."""

from pydantic import Field, model_validator

from mimo_megatron.config.base import Strict


class VisionConfig(Strict):
    """A Qwen2.5-VL vision encoder: window attention, a few full-attention layers, 2-D rotary positions."""

    depth: int = Field(gt=0)
    width: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    ffn_width: int = Field(gt=0)
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    window_size: int = Field(112, description="Side of an attention window, in pixels.")
    full_attention_layers: tuple[int, ...]
    tokens_per_second: float = Field(2.0, description="Temporal positions per second of video.")
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_bytes(self) -> int:
        """C: values in one patch, both frames."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_factor(self) -> int:
        """Patches per merged vision token."""
        return self.spatial_merge_size**2

    @property
    def pixel_multiple(self) -> int:
        """Image sides are multiples of this."""
        return self.patch_size * self.spatial_merge_size

    @model_validator(mode="after")
    def _shapes_fit(self) -> "VisionConfig":
        if self.width % self.num_heads or self.head_width % 4:
            raise ValueError(
                f"vision.width ({self.width}) / num_heads ({self.num_heads}) must be a whole multiple of 4, "
                "for 2-D rotary positions"
            )
        if self.window_size % self.pixel_multiple:
            raise ValueError(f"vision.window_size ({self.window_size}) must be a multiple of {self.pixel_multiple}")
        if any(not 0 <= layer < self.depth for layer in self.full_attention_layers):
            raise ValueError(f"vision.full_attention_layers {self.full_attention_layers} exceed depth {self.depth}")
        return self


class TextConfig(Strict):
    """A Qwen2-style decoder: pre-norm RMSNorm, grouped-query attention with qkv bias, SwiGLU, 3-axis rotary positions."""

    num_layers: int = Field(gt=0)
    width: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_width: int = Field(gt=0)
    ffn_width: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    rope_theta: float
    mrope_section: tuple[int, int, int] = Field(
        description="Rotary frequencies given to time, height and width; their sum is head_width / 2."
    )
    norm_eps: float
    max_positions: int = 32_768
    tie_embeddings: bool = False
    num_mtp_layers: int = Field(0, description="Multi-token-prediction layers (MiMo-7B-Base has one).")
    mtp_loss_weight: float = 0.1

    @model_validator(mode="after")
    def _shapes_fit(self) -> "TextConfig":
        if sum(self.mrope_section) * 2 != self.head_width:
            raise ValueError(
                f"text.mrope_section {self.mrope_section} sums to {sum(self.mrope_section)}, "
                f"but head_width / 2 is {self.head_width / 2:g}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"text.num_heads ({self.num_heads}) % num_kv_heads ({self.num_kv_heads}) != 0")
        return self


class SpecialTokens(Strict):
    """Token ids with a meaning for the data path; defaults are those of the Qwen2.5-VL vocabulary."""

    vision_start: int = 151_652
    vision_end: int = 151_653
    image_pad: int = 151_655
    video_pad: int = 151_656
    pad: int = 151_643
    turn_start: int = 151_644
    turn_end: int = 151_645


class ModelConfig(Strict):
    """A vision-language model, or a text model where ``vision`` is null."""

    name: str
    text: TextConfig
    vision: VisionConfig | None
    tokens: SpecialTokens = SpecialTokens()

    @model_validator(mode="after")
    def _tokens_in_vocabulary(self) -> "ModelConfig":
        for name, value in self.tokens.model_dump().items():
            if not 0 <= value < self.text.vocab_size:
                raise ValueError(f"model.tokens.{name} = {value} is outside the vocabulary of {self.text.vocab_size}")
        return self
