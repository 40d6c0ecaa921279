"""Whose varlen kernels compute attention here: PyTorch's (``varlen``), or the newest flash-attn that can (``flash``).

Signatures, devices and alignment are by the libraries' sources: flash-attn's tags v2.7.4 to fa4-v4.0.0.beta27, torch
2.11 and 2.13. None has run here on a GPU; so before a library is taken it computes a small case on the device, forward
and backward, beside the definition.

flash-attn's backward adds gradients of queries in whatever order its blocks end, unless it is asked for the same bits
every time: then in one order, which takes longer, and in generation 2 more memory. It is asked, as a run that is
resumed should go on as if it had not stopped. PyTorch's flash kernels, in varlen and in sdpa, are asked by
``torch.use_deterministic_algorithms`` only, which concerns every operation, and which this package does not set.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from itertools import pairwise
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mimo_megatron.attention.reference import Piece, reference_attention
from mimo_megatron.attention.varlen import Attend, Lengths, causal_by, varlen_by

LibraryBackend = Literal["varlen", "flash"]
_FARTHEST = 0.03
"""Of a result from the definition's, relative, in bf16, which rounds by 0.002; a mask at the top left is off by 1."""


class Unavailable(Exception):
    """Why a library cannot be used here."""


@dataclass(frozen=True)
class Library:
    name: str
    attend: Attend
    passed_over: str = ""
    """Newer ones, and why they were not taken."""


@dataclass(frozen=True)
class FlashAttn:
    """A generation of flash-attn: its distribution, its function, and the GPUs it runs forward and backward on."""

    name: str
    distribution: str
    load: Callable[[], Any]
    majors: tuple[int, ...]
    """Of the GPU's compute capability. Generation 3 ends the process on another."""
    oldest: str | None = None
    """Version from which a backward with the same bits every time is right, where the signature does not tell."""


def find_gpu() -> tuple[torch.device, int] | None:
    """This process's GPU, and the major number of its compute capability; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_capability()[0]


@cache
@torch.enable_grad()
def find(backend: LibraryBackend, head_width: int, causal: bool) -> Library:
    """What computes ``backend`` in this process, looked for once. ``Unavailable`` where nothing can."""
    gpu = find_gpu()
    if gpu is None:
        raise Unavailable("torch sees no GPU")
    device, major = gpu
    makers: dict[str, Callable[[], Library]] = {one.name: partial(load, one, major) for one in FLASH_ATTN}
    if backend == "varlen":
        makers = {"torch": lambda: Library(f"torch {torch.__version__}", torch_varlen)}
    passed_over: list[str] = []
    for name, make in makers.items():
        try:
            library = make()
            _check(library.attend, head_width, causal, device)
        except Unavailable as reason:
            passed_over.append(f"{name}: {reason}")
        else:
            return Library(library.name, library.attend, "; ".join(passed_over))
    raise Unavailable("; ".join(passed_over))


def hindrance(backend: LibraryBackend, head_width: int, causal: bool) -> str | None:
    """Why ``backend`` cannot run here; None where it can."""
    try:
        find(backend, head_width, causal)
    except Unavailable as reason:
        return str(reason)
    return None


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_varlen(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, lengths: Lengths, causal: bool) -> Tensor:
    """Key heads may be fewer in any release: torch 2.12 wants to be told, 2.11 has no such parameter and passes them
    on to the same kernels."""
    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    if q_TNH.shape[1] != k_SKH.shape[1] and "enable_gqa" in _parameters(varlen_attn):
        options["enable_gqa"] = True
    attend: Any = varlen_attn
    return attend(
        q_TNH, k_SKH, v_SKH, lengths.queries, lengths.keys, lengths.most_queries, lengths.most_keys, **options
    )


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Read once for a function, not in every layer."""
    return frozenset(inspect.signature(function).parameters)


# ---- flash-attn ------------------------------------------------------------------------------------------------------


def _function_4() -> Any:
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def _function_3() -> Any:
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def _function_2() -> Any:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


FLASH_ATTN = (
    FlashAttn("flash-attn 4", "flash-attn-4", _function_4, (9, 10, 11), "4.0.0b13"),
    FlashAttn("flash-attn 3", "flash-attn-3", _function_3, (9,)),
    FlashAttn("flash-attn 2", "flash-attn", _function_2, (8, 9, 10, 11, 12)),
)
"""From the newest on. What else they refuse, such as wide heads, the small case finds."""
_TAKEN = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal", "deterministic")
"""Given by name, as the order differs from generation to generation."""


def load(one: FlashAttn, major: int, *, deterministic: bool = True) -> Library:
    """The library with its version, for a GPU of that compute capability. ``Unavailable`` where it cannot be had."""
    if major not in one.majors:
        runs_on = ", ".join(f"{number}.x" for number in one.majors)
        raise Unavailable(f"runs on compute capabilities {runs_on}, and this GPU's is {major}.x")
    try:
        function = one.load()
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from None
    except Exception as error:  # a build for another torch or GPU: whatever it raises is the reason
        raise Unavailable(f"does not import: {type(error).__name__}: {error}") from error
    version = _version(one.distribution)
    if deterministic and one.oldest and version and Version(version) < Version(one.oldest):
        raise Unavailable(f"{version} is older than {one.oldest}, which first gives the same bits every time")
    try:
        inspect.signature(function).bind(None, None, None, **dict.fromkeys(_TAKEN))
    except TypeError as error:
        raise Unavailable(f"its flash_attn_varlen_func is another one: {error}") from None

    def attend(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, lengths: Lengths, causal: bool) -> Tensor:
        given = (lengths.queries, lengths.keys, lengths.most_queries, lengths.most_keys, causal, deterministic)
        found = function(q_TNH, k_SKH, v_SKH, **dict(zip(_TAKEN, given, strict=True)))
        return found[0] if isinstance(found, tuple) else found  # some give the log-sums, too

    return Library(f"{one.name} ({version or 'of unknown version'})", attend)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# ---- the small case --------------------------------------------------------------------------------------------------

_BOUNDS = (0, 150, 151, 190, 400)
_PIECES = (Piece(0, 90, 0, 90), Piece(90, 91, 90, 91), Piece(91, 200, 91, 330), Piece(200, 210, 60, 200))
"""Segments that are whole, and pieces behind more keys, some of which they share and some nobody sees."""
_NUM_KEYS = 340


def _check(attend: Attend, head_width: int, causal: bool, device: torch.device) -> None:
    """``Unavailable`` where output or a gradient is not near the definition's, or nothing comes out."""
    draw = torch.Generator(device).manual_seed(1)
    num_queries, num_keys = (_PIECES[-1].q_end, _NUM_KEYS) if causal else (_BOUNDS[-1], _BOUNDS[-1])
    shapes = [(num_queries, 4, head_width), *[(num_keys, 2 if causal else 4, head_width)] * 2]
    q, k, v = (torch.randn(shape, device=device, generator=draw).bfloat16().requires_grad_() for shape in shapes)
    d_out = torch.randn(shapes[0], device=device, generator=draw).bfloat16()
    segments = [Piece(start, end, start, end) for start, end in pairwise(_BOUNDS)]
    want = reference_attention(q, k, v, _PIECES if causal else segments, causal=causal)
    try:
        got = causal_by(attend, q, k, v, _PIECES) if causal else varlen_by(attend, q, k, v, _BOUNDS)
        results = [got, *torch.autograd.grad(got, (q, k, v), d_out)]
    except Exception as error:
        raise Unavailable(f"fails on this device: {type(error).__name__}: {error}"[:300]) from error
    wanted = [want, *torch.autograd.grad(want, (q, k, v), d_out)]
    for what, one, other in zip(("output", "gradient of q", "of k", "of v"), results, wanted, strict=True):
        distance = _distance(one.detach(), other.detach())
        if not distance < _FARTHEST:
            raise Unavailable(f"computes something else on this device: {what} is {distance:.2g} from the definition")


def _distance(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()
