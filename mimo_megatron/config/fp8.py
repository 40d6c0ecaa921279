"""Which linear layers are computed in FP8, and how; docs/fp8.md says what each key means for the numbers."""

from typing import Literal

from pydantic import Field

from mimo_megatron.config.base import Strict

Fp8Scaling = Literal["current", "delayed", "blockwise"]
Fp8Format = Literal["hybrid", "e4m3"]
Fp8Engine = Literal["transformer-engine", "scaled_mm", "twin"]
Fp8Rounding = Literal["auto", "torch", "triton"]
Fp8Part = Literal["vision", "projector", "text"]


class Fp8Config(Strict):
    parts: tuple[Fp8Part, ...] = Field(
        ("text",),
        min_length=1,
        description="Parts of the model whose linear layers are in FP8; the embedding, the head and prediction layers "
        "never are. vision: all blocks of the encoder, but not its patch embedding.",
    )
    scaling: Fp8Scaling = Field(
        "current",
        description="What an operand is divided by before it is rounded. current: its own largest value; delayed: the "
        "largest of earlier steps; blockwise: that of tiles of 128 values, of weights of 128 x 128, a power of two.",
    )
    format: Fp8Format | None = Field(
        None,
        description="hybrid: e4m3 forward, e5m2 for gradients; e4m3: for both. null: e4m3 with blockwise scaling, "
        "else hybrid.",
    )
    first_layers: int = Field(1, ge=0, description="Decoder layers at the start that are not in FP8.")
    last_layers: int = Field(1, ge=0, description="Decoder layers at the end that are not in FP8.")
    history: int = Field(1024, ge=1, description="Steps whose largest values delayed scaling remembers.")
    margin: int = Field(0, ge=0, description="Powers of two that delayed scaling leaves free for larger values.")
    engine: Literal["auto"] | Fp8Engine = Field(
        "auto",
        description="What multiplies. transformer-engine: its layers; scaled_mm: PyTorch's FP8 product; twin: rounds "
        "to FP8 and multiplies in fp32, on any machine. auto: on a GPU the first of the former two that can, on the "
        "CPU the twin; `mimo-megatron doctor` names it.",
    )

    rounding: Fp8Rounding = Field(
        "auto",
        description="What rounds for scaled_mm, to the same bits. torch: PyTorch's operations; triton: kernels of this "
        "package (docs/kernels.md), which have not run on a GPU yet; auto: on a GPU the kernels where triton is "
        "installed, else PyTorch's operations. The log names it.",
    )

    @property
    def number_format(self) -> Fp8Format:
        """The format that holds, given or the scaling's own."""
        return self.format or ("e4m3" if self.scaling == "blockwise" else "hybrid")

    def covers(self, layer: int, num_layers: int) -> bool:
        """Whether the decoder layer of that number, from 0, is in FP8."""
        return "text" in self.parts and self.first_layers <= layer < num_layers - self.last_layers

    @property
    def encoder_parts(self) -> tuple[Fp8Part, ...]:
        """Of ``parts``, those that compute on images: encoder and projector."""
        return tuple(part for part in self.parts if part != "text")
