"""Which kernels a call spends the device's time in."""

from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.setting import Setting

NUM_KERNELS = 15


def top_kernels(call: Callable[[], Any], setting: Setting) -> dict[str, Any]:
    """The 15 kernels with most time of one call, after one that is not watched; on a CPU, operators."""
    call()
    setting.synchronize()
    activity = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as watched:
        call()
        setting.synchronize()
    kind = DeviceType.CUDA if setting.on_gpu else DeviceType.CPU
    # A range that somebody named lies over its kernels, whose time it would count again.
    rows = [one for one in watched.key_averages() if one.device_type == kind and not one.is_user_annotation]
    spent = {one.key: (_microseconds(one, setting), one.count) for one in rows}
    total = sum(us for us, _ in spent.values()) or 1.0
    ranked = sorted(spent.items(), key=lambda item: -item[1][0])[:NUM_KERNELS]
    return {
        "device_ms": total / 1e3,
        "kernels": [
            {"name": name[:160], "calls": count, "ms": us / 1e3, "share": us / total} for name, (us, count) in ranked
        ],
    }


def _microseconds(row: Any, setting: Setting) -> float:
    return float(row.self_device_time_total if setting.on_gpu else row.self_cpu_time_total)
