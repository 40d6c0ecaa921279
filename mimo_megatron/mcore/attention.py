"""Our core attention inside megatron's layers: packed, causal per segment, context-parallel by gathering keys, values.

The layout travels as data: ``PackParams`` rides where megatron passes its packed-sequence parameters, so that an
activation recomputed in the backward pass sees the layout of its own microbatch.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mimo_megatron.attention.cache import KVCache
from mimo_megatron.attention.packed import Backend, Piece, causal_attention
from mimo_megatron.attention.text_kernel import TextKernel
from mimo_megatron.ops import turn
from mimo_megatron.parallel.collectives import start_gather_slots
from mimo_megatron.parallel.mesh import Axis


@dataclass
class PackParams(PackedSeqParams):
    """The attention layout of one pack on this rank.

    ``qkv_format`` is not ``thd``, so megatron leaves q, k and v alone.
    """

    qkv_format: str = "pack"
    pieces: tuple[Piece, ...] = ()
    cp: Axis = field(default_factory=lambda: Axis(0, 1))
    cos_sin: tuple[Tensor, Tensor] | None = None
    """Of the rotary angles of this rank's slots, each [S / cp, 1, H / 2]; set by the decoder, once for all layers."""
    kernel: TextKernel | None = None
    """In place of ``backend``, except in generation; both are set by the decoder."""
    backend: Backend = "sdpa"
    merge_order_S: Tensor | None = None
    """int64 [S] (``zigzag.merge_order``); None where cp is 1."""
    cache: KVCache | None = None
    """In generation only: filled by the prompts' forward, grown by the steps after it."""


class PackedCoreAttention(MegatronModule):
    """Replaces megatron's ``DotProductAttention`` in the layer spec, and its rotary turn; has no parameters.

    q ``[S / cp, 1, N / tp, H]``, k and v ``[S / cp, 1, K / tp, H]`` -> ``[S / cp, 1, N / tp * H]``.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, **__: Any):
        super().__init__(config)
        self.layer_number = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        packed_seq_params: PackParams | None = None,
        **__: Any,
    ) -> Tensor:
        assert isinstance(packed_seq_params, PackParams), "packed attention needs the pack's layout"
        assert packed_seq_params.cos_sin is not None, "the decoder computes the rotary angles"
        cos, sin = packed_seq_params.cos_sin
        cache, kernel, cp = packed_seq_params.cache, packed_seq_params.kernel, packed_seq_params.cp
        q_TNH, k_TKH, v_TKH = query.squeeze(1), turn(key.squeeze(1), cos, sin), value.squeeze(1)
        if cp.size > 1:
            assert packed_seq_params.merge_order_S is not None
            gathered = start_gather_slots(torch.stack((k_TKH, v_TKH), 1), packed_seq_params.merge_order_S, cp)
        if kernel is None or cache is not None:
            q_TNH = turn(q_TNH, cos, sin)  # beside the gather
        if cp.size > 1:
            k_TKH, v_TKH = gathered().unbind(1)
        if kernel is not None and cache is None:  # which turns queries itself
            out_TNH = kernel(q_TNH, k_TKH, v_TKH, packed_seq_params.cos_sin, packed_seq_params.pieces)
            return out_TNH.flatten(1).unsqueeze(1)
        if cache is not None and cache.holds(self.layer_number):
            return cache.attend(self.layer_number, q_TNH, k_TKH, v_TKH).flatten(1).unsqueeze(1)
        if cache is not None:
            cache.remember(self.layer_number, k_TKH, v_TKH)
        out_TNH = causal_attention(q_TNH, k_TKH, v_TKH, packed_seq_params.pieces, backend=packed_seq_params.backend)
        return out_TNH.flatten(1).unsqueeze(1)
