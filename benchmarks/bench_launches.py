"""Whether CUDA graphs of the encoder could pay: the host's time to launch it, against what its products take a GPU.

    python benchmarks/bench_launches.py                              # seconds on one core

The encoder of MiMo-VL-7B by number of layers and calls, so narrow, and over one image so small, that computing is
nothing: what is left of a forward and backward pass on a CPU is Python, autograd and the dispatch of each call, which a
GPU's host does too. A launch on a GPU costs a few microseconds more each (``LAUNCH``), and takes fewer calls than a
CPU, where norm and turn are several. The device's time is calculated: FLOPs over half of an H100's data sheet.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import write_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.model.vision import VisionEncoder
from mimo_megatron.train.flops import step_flops

LAUNCH = 4e-6
"""Seconds that handing one kernel to the driver takes, beside what a CPU does too: a common figure, not measured."""
FLOPS_PER_SECOND = 0.5 * 989e12
GRID = (1, 2, 2)
"""Of the launched pack: four patches."""
MANY = (1, 128, 256)
"""Of the calculated pack."""


class CallCounter(TorchDispatchMode):
    """Counts calls that compute: those whose result is a view of nothing given."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_calls += not func.is_view
        return out


def encoder_like(vision: VisionConfig) -> VisionEncoder:
    narrow = {"width": vision.head_width, "num_heads": 1, "ffn_width": 16}
    return VisionEncoder(vision.model_copy(update=narrow))


def one_pass(encoder: VisionEncoder, pixels_PC: Tensor) -> None:
    encoder(pixels_PC, vision_layout([GRID], encoder.config)).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = preset("mimo-vl-7b")
    assert model.vision is not None
    encoder = encoder_like(model.vision)
    pixels_PC = torch.zeros(4, model.vision.patch_bytes, dtype=torch.uint8)
    one_pass(encoder, pixels_PC)
    with CallCounter() as counter:
        one_pass(encoder, pixels_PC)
    times = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        one_pass(encoder, pixels_PC)
        times.append(time.perf_counter() - began)
    dispatch = statistics.median(times)
    host = dispatch + counter.num_calls * LAUNCH
    flops = step_flops(model, [], [MANY], ("vision", "projector", "text"))
    device = (flops.vision_linear + flops.vision_attention) / (MANY[1] * MANY[2]) / FLOPS_PER_SECOND
    row = dict(
        layers=model.vision.depth,
        calls=counter.num_calls,
        dispatch_ms=f"{1e3 * dispatch:.1f}",
        host_ms=f"{1e3 * host:.1f}",
        device_us_of_a_patch=f"{1e6 * device:.2f}",
        patches_of_equal_times=round(host / device),
    )
    for name, value in row.items():
        print(f"{name:>24}  {value}")
    print(write_rows("launches", [row], ("mimo_megatron/model", "benchmarks/bench_launches.py"), ("torch",), args.out))


if __name__ == "__main__":
    main()
