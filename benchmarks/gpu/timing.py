"""Times of device work: events around each call, the L2 cache emptied before it, the median of many.

A call may take longer to launch than to run. So the device idles before each until the host is ahead, and the host's
time is kept beside the device's. A call that waits for the device has its gaps counted.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.setting import Setting

_FEWEST, _MOST = 5, 200
_AHEAD = 1.5
"""Times as long as the host launches a call, the device is kept from beginning it."""
_MOST_IDLE_SECONDS = 0.02
_CYCLES_PER_SECOND = 2e9
"""Of a multiprocessor's clock at most: a slower one idles longer."""
_flush_buffers: dict[int, torch.Tensor] = {}


@dataclass(frozen=True)
class Timing:
    median_ms: float
    low_ms: float
    """A tenth of the calls were faster."""
    high_ms: float
    """A tenth were slower."""
    host_ms: float
    """Median time until the call had launched everything."""
    repeats: int

    @property
    def seconds(self) -> float:
        return self.median_ms / 1e3

    def row(self) -> dict[str, Any]:
        return {
            "ms": round(self.median_ms, 5),
            "low_ms": round(self.low_ms, 5),
            "high_ms": round(self.high_ms, 5),
            "host_ms": round(self.host_ms, 5),
            "repeats": self.repeats,
        }


def measure(call: Callable[[], Any], setting: Setting, budget_ms: float | None = None) -> Timing:
    """The time of ``call`` after two calls to warm up, over as many calls as the budget holds, 5 to 200.

    With a budget of 0, in a rehearsal, once after one call.
    """
    budget_ms = setting.sizes.time_budget_ms if budget_ms is None else budget_ms
    if budget_ms:
        call()
    setting.synchronize()
    began = time.perf_counter()
    call()
    launched = time.perf_counter() - began
    setting.synchronize()
    one_ms = max(1e3 * (time.perf_counter() - began), 1e-3)
    repeats = min(max(int(budget_ms / one_ms), _FEWEST), _MOST) if budget_ms else 1
    times, host = _on_gpu(call, setting, repeats, launched) if setting.on_gpu else _on_cpu(call, repeats)
    times.sort()
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    return Timing(statistics.median(times), low, high, statistics.median(host), repeats)


def _on_gpu(
    call: Callable[[], Any], setting: Setting, repeats: int, launched: float
) -> tuple[list[float], list[float]]:
    """``launched``: seconds that the host takes to launch one call."""
    flush, idle_cycles = _flush_buffer(setting), int(min(_AHEAD * launched, _MOST_IDLE_SECONDS) * _CYCLES_PER_SECOND)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    host = []
    for start, end in events:
        # The device is busy with these while the host launches, so gaps between launches are not counted. The flush
        # alone is over in less time than many calls take to launch.
        torch.cuda._sleep(idle_cycles)
        flush.zero_()
        start.record()
        began = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - began))
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], host


def _on_cpu(call: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return times, list(times)


def _flush_buffer(setting: Setting) -> torch.Tensor:
    """Several times the L2 cache; zeroing it leaves nothing of a call's inputs there."""
    index = torch.cuda.current_device()
    if index not in _flush_buffers:
        num_bytes = max(4 * torch.cuda.get_device_properties(index).L2_cache_size, 2**28)
        _flush_buffers[index] = torch.empty(num_bytes, dtype=torch.uint8, device=setting.device)
    return _flush_buffers[index]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, in float64; NaN where either has one."""
    wide = want.double()
    return float((got.double() - wide).norm() / wide.norm())
