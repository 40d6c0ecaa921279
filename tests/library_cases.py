"""Stand-ins for libraries' varlen attention, which needs a GPU: their signatures, and the definition behind them.

Of flash-attn's tag v2.8.3, for generation 3 of its main branch in August 2026, of fa4-v4.0.0.beta13 (without what
stands behind ``score_mod_bwd``); of torch 2.11 and 2.13.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_megatron.attention import libraries, varlen
from mimo_megatron.attention.libraries import FLASH_ATTN, Library
from mimo_megatron.attention.packed import Piece
from mimo_megatron.attention.reference import reference_attention

Kernel = Callable[..., Tensor]


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """What the kernels compute, and what they must be given: int32 lengths that end where the rows do, in each tensor's
    own order."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k) and cu_q[0] == cu_k[0] == 0
    assert all(x.is_contiguous() for x in (q, k, v, cu_q, cu_k)) and type(max_q) is type(max_k) is int
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v) and q.shape[1] % k.shape[1] == 0
    pieces = [Piece(*one, *two) for one, two in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)]
    assert max_q == max(piece.q_end - piece.q_start for piece in pieces) and min(cu_q.diff()) > 0
    assert max_k == max(piece.k_end - piece.k_start for piece in pieces)
    return reference_attention(q, k, v, pieces, causal=causal)


def at_the_top_left(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, _max_q: int, _max_k: int, causal: bool
) -> Tensor:
    """A fault: the first query stands at the first key, as flash-attn before 2.1 had it."""
    outs = []
    for (q_start, q_end), (k_start, k_end) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        length = q_end - q_start if causal else k_end - k_start
        keys, values = (x[k_start : k_start + length] for x in (k, v))
        outs.append(reference_attention(q[q_start:q_end], keys, values, [Piece(0, q_end - q_start, 0, length)], causal))
    return torch.cat(outs)


# ---- signatures ------------------------------------------------------------------------------------------------------


def flash_attn_2(kernel: Kernel, asked: list[bool]) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        asked.append(deterministic)
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)

    return flash_attn_varlen_func


def flash_attn_3(kernel: Kernel, asked: list[bool]) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        asked.append(deterministic)
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)

    return flash_attn_varlen_func


def flash_attn_4(kernel: Kernel, asked: list[bool]) -> Callable[..., Any]:
    """Which gives log-sums too."""

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
    ):  # fmt: skip
        asked.append(deterministic)
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal), None

    return flash_attn_varlen_func


def torch_2_11(kernel: Kernel) -> Callable[..., Any]:
    """Where key heads may be fewer though nothing says so."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal)

    return varlen_attn


def torch_2_13(kernel: Kernel) -> Callable[..., Any]:
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        return torch_2_11(kernel)(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    return varlen_attn


# ---- put in their places ---------------------------------------------------------------------------------------------


def attend_of(name: str, kernel: Kernel, patch: pytest.MonkeyPatch, asked: list[bool] | None = None) -> varlen.Attend:
    """As the package calls that library, with ``kernel`` behind its signature. ``asked``: for the same bits or not."""
    asked = [] if asked is None else asked
    if name.startswith("torch"):
        patch.setattr(libraries, "varlen_attn", {"torch 2.11": torch_2_11, "torch 2.13": torch_2_13}[name](kernel))
        return libraries.torch_varlen
    put(name, kernel, patch, asked)
    (generation,) = (one for one in FLASH_ATTN if one.name == name)
    patch.setattr(libraries, "_version", lambda _: None)
    return libraries.load(generation, 9).attend


NAMES = ("torch 2.11", "torch 2.13", "flash-attn 2", "flash-attn 3", "flash-attn 4")


def put(name: str, kernel: Kernel, patch: pytest.MonkeyPatch, asked: list[bool]) -> None:
    """A module in the place of the library's."""
    make, module = {
        "flash-attn 2": (flash_attn_2, "flash_attn"),
        "flash-attn 3": (flash_attn_3, "flash_attn_interface"),
        "flash-attn 4": (flash_attn_4, "flash_attn.cute"),
    }[name]
    if "flash_attn" not in sys.modules or not hasattr(sys.modules["flash_attn"], "__path__"):
        namespace = ModuleType("flash_attn")
        namespace.__path__ = []
        patch.setitem(sys.modules, "flash_attn", namespace)
    found = sys.modules[module] if module == "flash_attn" else ModuleType(module)
    found.flash_attn_varlen_func = make(kernel, asked)  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module, found)


@contextmanager
def by(kernel: Kernel, patch: pytest.MonkeyPatch, name: str = "flash-attn 2") -> Iterator[None]:
    """Whatever asks for varlen or flash gets ``kernel`` as that library, also in ranks that are forked meanwhile."""
    attend = attend_of(name, kernel, patch)
    with patch.context() as inner:
        inner.setattr(libraries, "find", lambda backend, head_width, causal: Library(name, attend))
        yield
