"""Packed attention by the flash kernels inside PyTorch, ``torch.nn.attention.varlen``: one call for all segments.

They need a GPU and half precision. Segments are whole: for queries that stand behind more keys, as context parallelism
has them, the alignment of the causal mask is not documented, so that is not offered.
"""

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ModuleNotFoundError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]


def problem() -> str | None:
    """Why these kernels cannot run here; None where they can."""
    if varlen_attn is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def flash_varlen(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], *, causal: bool) -> Tensor:
    """out_TNH: every row attends to all rows of its segment, or to those not after it. K divides N."""
    if bounds[-1] == 0:
        return q_TNH
    offsets, longest = _offsets(bounds, q_TNH.device)
    takes = _parameters(varlen_attn)
    options: dict[str, Any] = {}
    if causal:  # spelled in two ways over torch's releases
        options = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if q_TNH.shape[1] != k_TKH.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            repeats = q_TNH.shape[1] // k_TKH.shape[1]
            k_TKH, v_TKH = (x.repeat_interleave(repeats, 1) for x in (k_TKH, v_TKH))
    q_TNH, k_TKH, v_TKH = (x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
    attend: Any = varlen_attn
    return attend(q_TNH, k_TKH, v_TKH, offsets, offsets, longest, longest, **options)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Read once for a function, not in every layer."""
    return frozenset(inspect.signature(function).parameters)


@lru_cache(maxsize=32)
def _offsets(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """int32 cumulative lengths of the segments that have rows, and the longest."""
    lengths = [end - start for start, end in pairwise(bounds) if end > start]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return offsets, max(lengths)
