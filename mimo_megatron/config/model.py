"""What a model is: the sizes that fix every parameter's shape, and the special token ids."""

from typing import Literal

from pydantic import Field, model_validator

from mimo_megatron.config.base import Strict

Head = Literal["vocabulary", "reward"]


class VisionConfig(Strict):
    """A Qwen2.5-VL vision encoder: window attention, a few full-attention layers, 2-D rotary positions."""

    depth: int = Field(gt=0, description="Layers.")
    width: int = Field(gt=0, description="D of the encoder.")
    num_heads: int = Field(gt=0, description="Attention heads.")
    ffn_width: int = Field(gt=0, description="Inner width of the MLPs.")
    patch_size: int = Field(14, gt=0, description="Side of a patch, in pixels.")
    temporal_patch_size: int = Field(2, gt=0, description="Frames of a patch.")
    spatial_merge_size: int = Field(2, gt=0, description="Side of the square of patches that becomes one token.")
    in_channels: int = Field(3, description="Colours; pixels are read as red, green and blue.")
    window_size: int = Field(112, description="Side of an attention window, in pixels.")
    full_attention_layers: tuple[int, ...] = Field(description="Layers, from 0, that attend to the whole frame.")
    tokens_per_second: float = Field(2.0, description="Temporal positions per second of video.")
    video_advance: Literal["time", "frame"] = Field(
        "time",
        description="Where the text after a video counts on: past the video's last moment (time), as the released "
        "models were trained, or past one frame's side (frame), as in transformers 5.",
    )
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    norm_eps: float = Field(1e-6, gt=0, description="Added to the mean square in every norm.")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_bytes(self) -> int:
        """C: values in one patch, both frames."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def still_bytes(self) -> int:
        """Values stored of a patch of a still image: one frame, which fills the others too."""
        return self.patch_bytes // self.temporal_patch_size

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
        if self.in_channels != 3:
            raise ValueError(f"vision.in_channels ({self.in_channels}) must be 3: images are read as RGB")
        if self.window_size <= 0 or self.window_size % self.pixel_multiple:
            raise ValueError(
                f"vision.window_size ({self.window_size}) must be a multiple of {self.pixel_multiple}, above 0"
            )
        if any(not 0 <= layer < self.depth for layer in self.full_attention_layers):
            raise ValueError(f"vision.full_attention_layers {self.full_attention_layers} exceed depth {self.depth}")
        return self


class TextConfig(Strict):
    """A Qwen2-style decoder: pre-norm RMSNorm, grouped-query attention, qkv bias, SwiGLU, 3-axis rotary positions."""

    num_layers: int = Field(gt=0, description="Decoder layers.")
    width: int = Field(gt=0, description="D of the decoder.")
    num_heads: int = Field(gt=0, description="N: query heads.")
    num_kv_heads: int = Field(gt=0, description="K: key and value heads.")
    head_width: int = Field(gt=0, description="H: width of a head.")
    ffn_width: int = Field(gt=0, description="F: inner width of the MLPs.")
    vocab_size: int = Field(gt=0, description="V: rows of the embedding and of the head.")
    rope_theta: float = Field(gt=0, description="Base of the rotary frequencies.")
    mrope_section: tuple[int, int, int] = Field(
        description="Rotary frequencies given to time, height and width; their sum is head_width / 2."
    )
    norm_eps: float = Field(gt=0, description="Added to the mean square in every norm.")
    max_positions: int = Field(32_768, gt=0, description="Longest sample the positions are meant for, in tokens.")
    head: Head = Field(
        "vocabulary",
        description="vocabulary: the next token's logits; reward: one number, read at the last token of a response "
        "(a Bradley-Terry reward model, trained on preference pairs).",
    )
    tie_embeddings: bool = Field(False, description="The head uses the embedding's weight.")
    num_mtp_layers: int = Field(0, ge=0, description="Multi-token-prediction layers (MiMo-7B-Base has one).")
    mtp_loss_weight: float = Field(0.1, ge=0, description="Weight of their loss beside the main loss.")

    @property
    def head_rows(self) -> int:
        """Numbers that the head gives for a token."""
        return 1 if self.head == "reward" else self.vocab_size

    @property
    def ties_head(self) -> bool:
        return self.tie_embeddings and self.head == "vocabulary"

    @model_validator(mode="after")
    def _shapes_fit(self) -> "TextConfig":
        if sum(self.mrope_section) * 2 != self.head_width:
            raise ValueError(
                f"text.mrope_section {self.mrope_section} sums to {sum(self.mrope_section)}, "
                f"but head_width / 2 is {self.head_width / 2:g}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"text.num_heads ({self.num_heads}) % num_kv_heads ({self.num_kv_heads}) != 0")
        if self.head == "reward" and self.num_mtp_layers:
            raise ValueError(
                f"text.num_mtp_layers is {self.num_mtp_layers}, but a reward model predicts no tokens: set it to 0"
            )
        return self


TOKEN_NAMES = {
    "pad": "<|endoftext|>",
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
}
"""How the Qwen vocabularies spell the fields of ``SpecialTokens``."""


class SpecialTokens(Strict):
    """Token ids with a meaning for the data path; defaults are those of the Qwen2.5-VL vocabulary."""

    vision_start: int = Field(151_652, description="Before the tokens of an image or video.")
    vision_end: int = Field(151_653, description="After them.")
    image_pad: int = Field(151_655, description="Stands for one vision token of an image.")
    video_pad: int = Field(151_656, description="Stands for one vision token of a video.")
    pad: int = Field(151_643, description="Fills the end of a pack.")
    turn_start: int = Field(151_644, description="Opens a turn of the chat.")
    turn_end: int = Field(151_645, description="Closes a turn; generation stops there.")

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """Those that only a prompt may hold."""
        return self.turn_start, self.vision_start, self.vision_end, self.image_pad, self.video_pad

    @property
    def ends(self) -> tuple[int, ...]:
        """Those that end a response."""
        return self.turn_end, self.pad


class ModelConfig(Strict):
    """A vision-language model, or a text model where ``vision`` is null."""

    name: str = Field(description="For logs; a preset gives its own.")
    text: TextConfig = Field(description="The decoder.")
    vision: VisionConfig | None = Field(description="The vision encoder; null for a text model.")
    tokens: SpecialTokens = Field(SpecialTokens(), description="Token ids with a meaning.")

    @model_validator(mode="after")
    def _tokens_in_vocabulary(self) -> "ModelConfig":
        for name, value in self.tokens.model_dump().items():
            if not 0 <= value < self.text.vocab_size:
                raise ValueError(f"model.tokens.{name} = {value} is outside the vocabulary of {self.text.vocab_size}")
        return self
