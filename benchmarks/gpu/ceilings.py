"""The two rates that everything else is a fraction of, measured in the process that uses them: a large copy, a large
matrix product. And what the data sheet says, for orientation."""

import torch

from benchmarks.gpu.setting import Bench
from benchmarks.gpu.timing import measure
from benchmarks.gpu.writing import Save
from mimo_megatron.planner.hardware import GPUS
from mimo_megatron.train.flops import peak_flops


def section(bench: Bench, save: Save) -> None:
    """``bytes_per_second``, ``flops_per_second`` and, where the device has it, ``fp8_flops_per_second``."""
    setting, sizes = bench.setting, bench.setting.sizes
    generator = setting.generator()
    source = torch.randint(0, 256, (sizes.copy_bytes,), dtype=torch.uint8, generator=generator, device=setting.device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), setting)
    bench.ceilings["bytes_per_second"] = 2 * sizes.copy_bytes / timing.seconds
    save(copy={"bytes": 2 * sizes.copy_bytes, **timing.row()}, ceilings=bench.ceilings)

    size = sizes.gemm
    left, right = (setting.normal(size, size, generator=generator) for _ in range(2))
    out = torch.empty_like(left)
    timing = measure(lambda: torch.mm(left, right, out=out), setting, 2 * sizes.time_budget_ms)
    bench.ceilings["flops_per_second"] = 2 * size**3 / timing.seconds
    save(gemm={"shape": [size] * 3, **timing.row()}, ceilings=bench.ceilings)

    if has_fp8(setting.on_gpu):
        unit = torch.ones((), device=setting.device)
        a = left.to(torch.float8_e4m3fn)
        b = right.to(torch.float8_e4m3fn).t().contiguous().t()  # the second operand of the FP8 product is column-major
        timing = measure(
            lambda: torch._scaled_mm(a, b, unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True), setting
        )
        bench.ceilings["fp8_flops_per_second"] = 2 * size**3 / timing.seconds
        save(fp8_gemm={"shape": [size] * 3, **timing.row()}, ceilings=bench.ceilings)
    save(sheet=sheet(torch.cuda.get_device_name(0)) if setting.on_gpu else {})


def has_fp8(on_gpu: bool) -> bool:
    return on_gpu and torch.cuda.get_device_capability(0) >= (8, 9)


def sheet(device_name: str) -> dict[str, float]:
    """Dense bf16 FLOP/s and bytes/s of memory by the maker's data sheet, where they are known."""
    found = {"flops_per_second": flops} if (flops := peak_flops(device_name)) else {}
    gpu = next((gpu for name, gpu in GPUS.items() if name in device_name.lower()), None)
    return {**found, "bytes_per_second": gpu.memory_bandwidth} if gpu else found
