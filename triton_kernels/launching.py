"""The one way a kernel is launched, so that what an op would launch can also be written down and compiled elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: chosen by what the compilers report for sm_80, sm_90 and sm_100 (docs/kernels.md)."""

    rows: int
    """Of a tile, which is one program's work."""
    step: int
    """Rows of the other side that are read at a time."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Call:
    kernel: Any
    """A function under ``triton.jit``."""
    args: tuple[Any, ...]
    constants: dict[str, Any]
    blocks: Blocks


_recorded: list[Call] | None = None
_recorded_capability = 0


def launch(kernel: Any, num_programs: int, blocks: Blocks, *args: Any, **constants: Any) -> None:
    """Run ``kernel`` on ``num_programs`` programs, on the tensors' device or in Triton's interpreter."""
    if _recorded is not None:
        _recorded.append(Call(kernel, args, constants, blocks))
        return
    kernel[(num_programs,)](*args, **constants, num_warps=blocks.num_warps, num_stages=blocks.num_stages)


@contextmanager
def recorded_calls(for_capability: int) -> Iterator[list[Call]]:
    """The launches of the block as on a GPU of this compute capability: written down, not run, outputs undefined."""
    global _recorded, _recorded_capability
    assert _recorded is None
    _recorded, _recorded_capability = (calls := []), for_capability
    try:
        yield calls
    finally:
        _recorded = None


def capability(device: torch.device) -> int:
    """90 for 9.0: the device's compute capability. The interpreter, which has none, does what is done for 9.0."""
    if _recorded is not None:
        return _recorded_capability
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def interprets() -> bool:
    """Whether a launch runs in Triton's interpreter, which is slow by the step and knows no registers."""
    return _recorded is None and triton.knobs.runtime.interpret


def can_run() -> bool:
    """Whether there is a device for kernels, or their interpreter was asked for."""
    return triton.knobs.runtime.interpret or torch.cuda.is_available()


def check_device(op: str, *tensors: Tensor) -> None:
    """Raise ``ValueError`` where Triton cannot run on these tensors, or would compute something else."""
    if _recorded is not None:
        return
    interprets = triton.knobs.runtime.interpret
    for tensor in tensors:
        if tensor.device.type != "cuda" and not interprets:
            raise ValueError(f"{op}: a tensor is on {tensor.device}; Triton's kernels need a CUDA device")
        if interprets and tensor.dtype == torch.bfloat16:
            raise ValueError(
                f"{op}: Triton's interpreter computes bfloat16 wrongly without a word; interpret float32 or float16"
            )
