"""What the GPUs offer by their makers' sheets, and what of it is assumed to be reached. All of it can be overridden."""

from dataclasses import dataclass

from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.errors import ConfigError

GIB = 2**30
LINK_FRACTION = 0.8
"""Of a link's printed bandwidth that collectives reach: an assumption, not a measurement of ours."""
FRAGMENTATION = 1.08
"""Allocator: bytes reserved for each byte of activations and temporaries that is in use. Assumed."""
CONTEXT_BYTES = 3 * GIB
"""CUDA context, NCCL's buffers for a handful of groups, matrix-product workspaces. Assumed."""


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    """What torch reports as the device's capacity, a little below the printed gigabytes."""
    flops: float
    """Dense bf16 FLOP/s."""
    memory_bandwidth: float
    """Bytes/s."""
    node_bandwidth: float
    """Bytes/s to the other GPUs of a node, one direction."""
    network_bandwidth: float
    """Bytes/s to other nodes for each GPU, one direction."""
    fp8_flops: float | None
    """Dense FP8 FLOP/s; None where the GPU has no FP8 products."""
    gpus_per_node: int = 8


def _gpu(
    name: str, gib: float, tflops: float, hbm_tb: float, nvlink_gb: float, network_gb: float, fp8_tflops: float | None
) -> Gpu:
    fp8_flops = fp8_tflops and fp8_tflops * 1e12
    return Gpu(name, int(gib * GIB), tflops * 1e12, hbm_tb * 1e12, nvlink_gb * 1e9, network_gb * 1e9, fp8_flops)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA data sheets of the SXM parts: sparse bf16 and sparse FP8 / 2, HBM, NVLink's total / 2. Network: one
        # 400 Gb/s port a GPU in DGX H100, H200 and B200, one of 200 Gb/s in DGX A100 (their user guides).
        _gpu("h100", 79.1, 989.5, 3.35, 450, 50, 1979),
        _gpu("h200", 139.8, 989.5, 4.8, 450, 50, 1979),
        _gpu("a100", 79.1, 312, 2.039, 300, 25, None),  # 80 GB
        _gpu("b200", 178.3, 2250, 8.0, 900, 50, 4500),
    )
}


def gpu_named(name: str) -> Gpu:
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: not in the table; there are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def check_fp8(gpu: Gpu, fp8: Fp8Config | None) -> None:
    """``ConfigError`` where the recipe multiplies in FP8 and the GPU cannot."""
    if fp8 is not None and fp8.engine != "twin" and gpu.fp8_flops is None:
        raise ConfigError(
            f"--gpu {gpu.name} has no FP8 products, and train.fp8 is set: add train.fp8=null, or take "
            + ", ".join(name for name, one in GPUS.items() if one.fp8_flops)
        )


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that a rank reaches while it computes: waiting and communication come on top.

    Published whole-step figures, for orientation: 7B text models on H100/H200 40 to 58 %, vision-language ones 30 to
    42 %; none is of this program. Vision is set lower: heads of 80 in windows of 64 patches are bound by memory. Of
    products in FP8 the same share of their higher peak is taken.
    """

    text: float = 0.5
    vision: float = 0.35


def efficiency_of(text: float | None, vision: float | None) -> Efficiency:
    """The default where None. ``ConfigError`` for what is no share of a peak."""
    chosen = Efficiency(text or Efficiency.text, vision or Efficiency.vision)
    for name, share in (("--mfu", text), ("--vision-mfu", vision)):
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"{name} {share:g} must be above 0 and at most 1: a share of the GPU's peak")
    return chosen


def group_bandwidth(gpu: Gpu, stride: int, size: int) -> float:
    """Bytes/s of a collective in a group of every ``stride``-th rank.

    Between nodes the ranks of a group that share a node drive their own network ports side by side.
    """
    if stride * size <= gpu.gpus_per_node:
        return gpu.node_bandwidth * LINK_FRACTION
    in_node = max(gpu.gpus_per_node // stride, 1)
    return min(gpu.node_bandwidth, gpu.network_bandwidth * in_node) * LINK_FRACTION
