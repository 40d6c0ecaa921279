"""One operation that is checked and timed: its definition, the ways to compute it and the work it asks for.

Work is what the mathematics asks for, as in ``train/flops.py``: attention's backward is twice its forward, and a byte
is counted once for each tensor that must be read or written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.peers import Unavailable
from benchmarks.gpu.setting import Setting

Way = Callable[..., Tensor]
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Work:
    """FLOPs and fewest bytes of the forward, and of forward and backward together."""

    forward_flops: float
    train_flops: float
    forward_bytes: float
    train_bytes: float


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    draw: Callable[[], list[Tensor]]
    """The inputs that get gradients, drawn anew from the seed."""
    definition: Way
    """In any dtype: in float64 it is the oracle, in the measured dtype what eager code gets."""
    ways: Mapping[str, Way | Unavailable]
    judged: Mapping[str, float]
    """Ways that the package trains with, and how many times as far from float64 as the definition they may be; of
    others the error is only told."""
    trusted: str
    """The way whose output others are compared with where the sizes are too large for an oracle."""
    work: Work
    key: Key | None = None
    """Of what ``auto`` chooses by: operation, head width, slots of the pack."""
    name: str = ""
    """By which a target finds the rows."""


FACTOR = 1.5
"""That of tests/parity_rule.py."""
LIBRARY = {"sdpa": 3.0, "varlen": 3.0, "flash": 3.0}
"""Kernels of PyTorch and flash-attn round weights to bf16 where the definition does not; a wrong mask is off by orders
of magnitude."""
LATE = ("flex", "reference")
"""Ways that take long to compile or to run: after all others, so that a section whose time is over has the rest."""
FULL_WINDOWS = "full windows"
COMPILED_FLASH = "torch.compile of the turn, flash"
"""A compiled turn before flash-attn 2, or before torch's varlen where that is not installed."""


def in_order(cases: Sequence[Case]) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Every case with some of its ways, the late ones of all cases last."""
    for late in (None, *LATE):
        for case in cases:
            names = tuple(name for name in case.ways if (name == late if late else name not in LATE))
            if names:
                yield case, names


def compiled(setting: Setting, function: Way) -> Way:
    """By Inductor on a GPU; in a rehearsal only traced, which takes no C++ compiler."""
    compile_it: Any = torch.compile
    return compile_it(function, dynamic=False, backend="inductor" if setting.on_gpu else "eager")
