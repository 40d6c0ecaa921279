"""What a sample is predicted to cost, so that packs and ranks can be given equal work.

    cost = per_token x tokens + per_token_pair x sum of segments^2
         + per_patch x patches + per_patch_pair x sum of frames^2

The second line is the vision encoder's and the projector's. Only ratios matter.
"""

from pydantic import Field

from mimo_megatron.config.base import Strict
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.text_flops import text_weights
from mimo_megatron.config.vision_flops import layer_weights, projector_weights


class PackCost(Strict):
    per_token: float = Field(ge=0, description="Of a token: matrix products of the decoder and the head.")
    per_token_pair: float = Field(0.0, ge=0, description="Of tokens squared, by segment: the decoder's attention.")
    per_patch: float = Field(
        0.0, ge=0, description="Of a vision patch: matrix products and window attention of the encoder, the projector."
    )
    per_patch_pair: float = Field(
        0.0, ge=0, description="Of patches squared, by frame: the encoder's layers with full attention."
    )


def cost_by_flops(model: ModelConfig) -> PackCost:
    """Forward FLOPs by the published formula (``train/flops.py``); training takes about three times each.

    Windows are counted as full, and the head for every token, since an index knows neither the grids of windows nor
    which tokens are trained.
    """
    text = model.text
    depth, mtp = text.num_layers + text.num_mtp_layers, 1 + text.num_mtp_layers
    per_token = 2 * (text_weights(text) + text.width * text.head_rows * mtp)
    per_token_pair = 2 * text.num_heads * text.head_width * depth
    vision = model.vision
    if vision is None:
        return PackCost(per_token=per_token, per_token_pair=per_token_pair)
    num_full = len(set(vision.full_attention_layers))
    window_patches = (vision.window_size // vision.patch_size) ** 2
    linear = 2 * (vision.patch_bytes * vision.width + vision.depth * layer_weights(vision))
    windows = 4 * vision.width * (vision.depth - num_full) * window_patches
    projector = 2 * projector_weights(vision, text.width) // vision.merge_factor
    return PackCost(
        per_token=per_token,
        per_token_pair=per_token_pair,
        per_patch=linear + windows + projector,
        per_patch_pair=4 * vision.width * num_full,
    )
