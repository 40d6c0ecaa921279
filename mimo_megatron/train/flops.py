"""Model FLOPs of a training step, from the real lengths of what was trained on, and the peak of the device it ran on.

The published formula, with multi-token-prediction layers where there are some (each a decoder layer, a 2 D x D matrix
and the head once more), in multiply-adds counted as 2. Only the work that the mathematics asks for is counted: real
tokens and patches (no padding), attention inside each segment, window and frame (causal attention as half of the
square), and no recomputation. Norms, softmax, activations, rotary turns and the embedding look-up are left out.

Forward, of a segment of L text tokens (placeholders included) and a frame of P patches in M = P / 4 merged tokens:

    text linear       2 x L x layers x (q, k, v, output, gate, up and down weights)
    text attention    4 x L^2 / 2 x heads x head width x layers
    head              2 x rows x width x vocabulary   (the tokens that are trained: the head sees no others)
    vision linear     2 x P x (patch embedding + depth x (q, k, v, output, gate, up and down weights))
    vision attention  4 x width x (full layers x P^2 + window layers x sum over windows of their patches squared)
    projector         2 x M x (4 x width x 4 x width + 4 x width x text width)

Backward: each matrix product has one equal product for its input's gradient and one for its weight's gradient. A frozen
weight skips its own third; the input's gradient is skipped where nothing upstream of it is trained. Attention has no
weights: its backward is twice its forward, or nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ModuleName
from mimo_megatron.config.text_flops import text_weights
from mimo_megatron.config.vision_flops import frame_pairs, layer_weights, projector_weights

Grid = tuple[int, int, int]

# Dense bf16 FLOP/s from NVIDIA's data sheets (which print twice this, "with sparsity", for Hopper). First match counts.
_PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.5e12),
    ("A100", 312e12),
)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one step by part, forward and backward, over all ranks."""

    text_linear: int
    text_attention: int
    head: int
    vision_linear: int
    vision_attention: int
    projector: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def step_flops(
    model: ModelConfig,
    segments: Sequence[int],
    grids: Sequence[Grid],
    trained: Collection[ModuleName],
    *,
    num_head_rows: int | None = None,
) -> FlopCount:
    """The FLOPs to train once on ``segments`` (their token counts) with images and videos of ``grids`` (in patches).

    ``num_head_rows`` is the number of tokens the head sees, those that are trained; all of them where it is not given.
    Additive over samples: the count of a step is the sum of the counts of its packs.
    """
    assert model.vision is not None or not grids, f"{model.name} has no vision encoder, but got {len(grids)} grids"
    text_trained, projector_trained, vision_trained = (part in trained for part in ("text", "projector", "vision"))
    features_need_grad = projector_trained or vision_trained
    text_needs_grad = text_trained or features_need_grad
    text_products = 1 + text_needs_grad + text_trained
    num_tokens = sum(segments)
    num_rows = num_tokens if num_head_rows is None else num_head_rows

    vision_linear = vision_attention = projector = 0
    if vision := model.vision:
        num_patches = sum(frames * height * width for frames, height, width in grids)
        # The pixels need no gradient, so the patch embedding has at most its weight's.
        embed = (1 + vision_trained) * vision.patch_bytes * vision.width
        blocks = (1 + 2 * vision_trained) * vision.depth * layer_weights(vision)
        vision_linear = 2 * num_patches * (embed + blocks)
        pairs = sum(frames * frame_pairs(vision, height, width) for frames, height, width in grids)
        vision_attention = (1 + 2 * vision_trained) * 4 * vision.width * pairs
        # Its first layer's input needs a gradient even above a frozen encoder: for the projector's own norm.
        products = 1 + features_need_grad + projector_trained
        num_units = num_patches // vision.merge_factor
        projector = products * 2 * num_units * projector_weights(vision, model.text.width)

    text = model.text
    squares = (text.num_layers + text.num_mtp_layers) * sum(length * length for length in segments)
    return FlopCount(
        text_linear=text_products * 2 * num_tokens * text_weights(text),
        text_attention=(1 + 2 * text_needs_grad) * 2 * text.num_heads * text.head_width * squares,
        head=text_products * 2 * num_rows * text.width * text.head_rows * (1 + text.num_mtp_layers),
        vision_linear=vision_linear,
        vision_attention=vision_attention,
        projector=projector,
    )


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device by its data sheet; None where none is known (a CPU, another GPU)."""
    return next((peak for name, peak in _PEAK_BF16_FLOPS if name.lower() in device_name.lower()), None)
