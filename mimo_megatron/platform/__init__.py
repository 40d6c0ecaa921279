"""Which device and which collectives this process uses: CUDA with NCCL, or the CPU with gloo.

Both run the same megatron-core. Nothing else in the package asks whether there is a GPU.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from mimo_megatron.platform import cpu


@dataclass(frozen=True)
class Platform:
    kind: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]

    def device(self, local_rank: int = 0) -> torch.device:
        return torch.device("cuda", local_rank) if self.kind == "cuda" else torch.device("cpu")

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"


@functools.cache
def current() -> Platform:
    """The platform of this process, found once: CUDA if torch sees a device, else the CPU."""
    return Platform("cuda", "nccl") if torch.cuda.is_available() else Platform("cpu", "gloo")


def has_fp8_products() -> bool:
    """Whether ``torch._scaled_mm`` runs here: on the CPU, slowly, and on GPUs from Ada and Hopper (8.9) on."""
    return current().is_cpu or torch.cuda.get_device_capability() >= (8, 9)


def prepare_megatron() -> None:
    """Make megatron-core usable in this process: nothing on CUDA, the CPU stand-ins of ``cpu.install`` else."""
    if current().is_cpu:
        cpu.install()
