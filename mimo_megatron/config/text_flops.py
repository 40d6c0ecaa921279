"""Weights of the decoder by what is multiplied with them; the formula is written out in ``train/flops.py``."""

from mimo_megatron.config.model import TextConfig


def text_weights(text: TextConfig) -> int:
    """Weights every token is multiplied by below the head: the layers, and each MTP layer with its joining matrix."""
    queries, keys = text.num_heads * text.head_width, text.num_kv_heads * text.head_width
    layer = text.width * (2 * queries + 2 * keys + 3 * text.ffn_width)
    return text.num_layers * layer + text.num_mtp_layers * (layer + 2 * text.width * text.width)
