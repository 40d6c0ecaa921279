"""The kernels that round to FP8: their bits beside those of PyTorch's operations on the same device.

Dims: M rows, K columns.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import has_fp8
from benchmarks.gpu.setting import Setting
from mimo_megatron.fp8.quantise import E4M3, E5M2, round_to
from mimo_megatron.fp8.rounding import TORCH
from mimo_triton_kernels.fp8_rounding import largest_magnitude, round_two_ways

OP, WAY = "FP8 rounding", "triton"
SHAPES, REHEARSAL_SHAPES = ((4096, 4096), (1370, 3420), (1, 1)), ((70, 129), (1, 1))
NO_FP8 = "this GPU has no FP8 numbers, as Ada, Hopper and later have"


def has_kernels(setting: Setting) -> bool:
    return not setting.on_gpu or has_fp8(setting.on_gpu)


def heads(setting: Setting) -> Iterator[tuple[dict[str, Any], tuple[int, int], torch.dtype]]:
    """For each format and shape: the beginning of its row of the section correctness."""
    for dtype in (E4M3, E5M2):
        for shape in REHEARSAL_SHAPES if setting.is_rehearsal else SHAPES:
            yield (
                {"op": OP, "shape": f"{shape[0]:,} x {shape[1]:,}, {dtype}", "way": WAY, "ours": True}, shape, dtype,
            )  # fmt: skip


def judged(setting: Setting, shape: tuple[int, int], dtype: torch.dtype, poisoned: Callable[[], Any]) -> dict[str, Any]:
    """The share of values whose bits are others than those of PyTorch's operations on this device, none of which may
    be; and whether two runs agree."""
    if not has_kernels(setting):
        return {"absent": NO_FP8}
    x_MK, scale = numbers(setting, *shape), torch.tensor(0.7, device=setting.device)
    is_largest = largest_magnitude(x_MK).equal(TORCH.amax(x_MK))
    x_MK[-1, -1] = -torch.inf
    with poisoned():
        found, again = (round_two_ways(x_MK, scale, dtype) for _ in range(2))
    errors = {
        "values": others(found[0], round_to(x_MK, scale, dtype)),
        "transposed": others(found[1], round_to(x_MK, scale, dtype).t()),
        "largest magnitude": float(not is_largest),
        "two runs": float(not all(bits(a).equal(bits(b)) for a, b in zip(found, again, strict=True))),
    }
    beyond = [f"{part} differ: {share:.1e}" for part, share in errors.items() if share]
    return {"errors": errors, "limits": dict.fromkeys(errors, 0.0), "ok": not beyond, "why": "; ".join(beyond)}


def numbers(setting: Setting, rows: int, columns: int) -> Tensor:
    """Of all magnitudes that the formats have and of larger ones, of both signs."""
    draw = setting.generator()
    exponents = torch.randint(-24, 18, (rows, columns), generator=draw, device=setting.device)
    x_MK = setting.normal(rows, columns, generator=draw, dtype=torch.float32) * torch.exp2(exponents.float())
    return x_MK.to(setting.dtype)


def bits(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.view(torch.uint8)


def others(found: Tensor | None, want: Tensor) -> float:
    """The share of ``found`` whose bits are not those of ``want``, or behind it not zero."""
    wanted = torch.zeros_like(bits(found))
    wanted[: want.shape[0], : want.shape[1]] = want.contiguous().view(torch.uint8)
    return (bits(found) != wanted).float().mean().item()
