"""Every way to compute packed attention that a machine may have, behind one signature; peers only where they import.

``Packed``: out_TNH of q_TNH, k_TKH, v_TKH and the segments' bounds; causal or not. A way that is not there raises
``Unavailable`` with the reason, which the tables print. Dims: T rows, N query heads, K key heads, H head width.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu.peers import Unavailable, loaded, needs
from mimo_megatron.attention import libraries
from mimo_megatron.attention.packed import Piece, causal_attention, varlen_attention
from mimo_megatron.attention.reference import reference_attention
from mimo_megatron.attention.varlen import Attend, causal_by, varlen_by

Packed = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], bool], Tensor]
_MOST_SCORES = 2**32
"""Of the reference, in one segment: 16 GiB in float32, and as much again for its softmax."""


def packed_ways(device: torch.device, head_width: int, *, causal: bool) -> dict[str, Packed | Unavailable]:
    """By name, in the order of the tables; what is not there, or not for such heads, with its reason.

    ``flash`` is what a recipe's key of that name computes, with gradients added in one order; the generations of
    flash-attn by themselves add them in any.
    """
    ways: dict[str, Packed | Unavailable] = {"reference": reference, "sdpa": sdpa}
    makers: dict[str, Callable[[], Packed]] = {
        "flex": lambda: _flex(device),
        "varlen": lambda: _by_backend("varlen", head_width, causal),
        "flash": lambda: _by_backend("flash", head_width, causal),
        **{one.name.replace(" ", "-"): partial(_flash_attn, one) for one in reversed(libraries.FLASH_ATTN)},
        "transformer-engine": _transformer_engine,
    }
    for name, make in makers.items():
        try:
            if name != "flex" and device.type != "cuda":
                raise Unavailable("needs a GPU")
            ways[name] = make()
        except Unavailable as reason:
            ways[name] = reason
    return ways


def pieces_of(bounds: tuple[int, ...]) -> list[Piece]:
    return [Piece(start, end, start, end) for start, end in pairwise(bounds)]


def reference(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], causal: bool) -> Tensor:
    longest = max(end - start for start, end in pairwise(bounds))
    if q_TNH.shape[1] * longest**2 > _MOST_SCORES:
        raise Unavailable(f"a segment of {longest:,} rows has more scores than are held at once")
    return reference_attention(q_TNH, k_TKH, v_TKH, pieces_of(bounds), causal=causal)


def sdpa(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], causal: bool) -> Tensor:
    """The package's default."""
    if causal:
        return causal_attention(q_TNH, k_TKH, v_TKH, pieces_of(bounds))
    return varlen_attention(q_TNH, k_TKH, v_TKH, bounds)


@cache
def _offsets(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Cumulative lengths of the segments that have rows, and the longest."""
    lengths = [end - start for start, end in pairwise(bounds) if end > start]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return offsets, max(lengths)


def _flex(device: torch.device) -> Packed:
    """Compiled on a GPU. The block mask is made once for a layout, as it would be for a pack and all its layers."""
    attend: Any = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    @cache
    def mask_of(bounds: tuple[int, ...], causal: bool) -> Any:
        lengths = torch.tensor([end - start for start, end in pairwise(bounds)])
        segment_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)

        def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = segment_T[query] == segment_T[key]
            return same & (query >= key) if causal else same

        return create_block_mask(
            is_seen, None, None, bounds[-1], bounds[-1], device=device, _compile=device.type == "cuda"
        )

    def run(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], causal: bool) -> Tensor:
        heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH)]
        grouped = q_TNH.shape[1] != k_TKH.shape[1]
        out = attend(*heads_first, block_mask=mask_of(bounds, causal), enable_gqa=grouped)
        return out.squeeze(0).transpose(0, 1)

    return run


def _by_backend(backend: libraries.LibraryBackend, head_width: int, causal: bool) -> Packed:
    """As the package calls it."""
    try:
        attend = libraries.find(backend, head_width, causal).attend
    except libraries.Unavailable as reason:
        raise Unavailable(str(reason)) from None
    return _packed(attend)


def _flash_attn(generation: libraries.FlashAttn) -> Packed:
    """With gradients added in any order, which is its fastest."""
    gpu = libraries.find_gpu()
    assert gpu is not None
    try:
        attend = libraries.load(generation, gpu[1], deterministic=False).attend
    except libraries.Unavailable as reason:
        raise Unavailable(str(reason)) from None
    return _packed(attend)


def _packed(attend: Attend) -> Packed:
    def run(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, bounds: tuple[int, ...], causal: bool) -> Tensor:
        if causal:
            return causal_by(attend, q_TNH, k_TNH, v_TNH, pieces_of(bounds))
        return varlen_by(attend, q_TNH, k_TNH, v_TNH, bounds)

    return run


def _transformer_engine() -> Packed:
    def load() -> Any:
        from transformer_engine.pytorch import DotProductAttention

        return DotProductAttention

    needs("transformer_engine.pytorch")
    kind = loaded(load)

    @cache
    def module(heads: int, key_heads: int, width: int, causal: bool) -> Any:
        return kind(
            num_attention_heads=heads, kv_channels=width, num_gqa_groups=key_heads, attention_dropout=0.0,
            qkv_format="thd", attn_mask_type="padding_causal" if causal else "padding",
            softmax_scale=1 / math.sqrt(width),
        )  # fmt: skip

    def run(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], causal: bool) -> Tensor:
        offsets, longest = _offsets(bounds, q_TNH.device)
        attend = module(q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2], causal)
        out = attend(
            q_TNH.contiguous(), k_TKH.contiguous(), v_TKH.contiguous(), cu_seqlens_q=offsets, cu_seqlens_kv=offsets,
            max_seqlen_q=longest, max_seqlen_kv=longest,
        )  # fmt: skip
        return out.view_as(q_TNH)

    return run
