"""Every kernel against its definition in float64, in the dtype that trains, on this device.

The rule of tests/parity_rule.py: output and each gradient of a kernel of ours may be at most 1.5 times as far from
float64 as the definition is in the same dtype, of PyTorch's 3 times. Uninitialised memory is NaN meanwhile, so an
element that nothing writes is found; and two runs of a Triton kernel, or of flash, must give the same bits. What rounds
to FP8 must give the bits of PyTorch's operations.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import rounding
from benchmarks.gpu.case import FACTOR, Case, Way, in_order
from benchmarks.gpu.cases import small_cases
from benchmarks.gpu.peers import Unavailable
from benchmarks.gpu.setting import NO_TIME, Bench
from benchmarks.gpu.timing import relative_error
from benchmarks.gpu.writing import Save

FP32_FLOOR = 2e-6
DETERMINISTIC = ("triton", "flash")
"""Ways that promise the same bits of two runs."""


class WrongResult(Exception):
    """A way of ours computes something else than its definition."""


def section(bench: Bench, save: Save) -> None:
    """One row for each way of each operation; ``WrongResult`` at the end, all rows kept, where one of ours fails."""
    wrong, measured = [], bench.setting.dtype
    for case, names in in_order(small_cases(bench.setting)):
        if bench.seconds_left() <= 0:
            rows = [{"op": case.op, "shape": case.shape, "way": name, "absent": NO_TIME} for name in names]
            wrong += [f"{case.op} by {name}: {NO_TIME}" for name in names if name in case.judged]
            save(rows=rows)
            continue
        oracle = run(case.definition, case, torch.float64, measured)
        eager = run(case.definition, case, measured, measured)
        for name in names:
            if name not in case.judged and not bench.has_time_for(name):
                save(rows=[{"op": case.op, "shape": case.shape, "way": name, "absent": NO_TIME}])
                continue
            row = judge(case, name, case.ways[name], oracle, eager, bench)
            if name in case.judged and not row.get("ok", "absent" in row):
                wrong.append(f"{case.op} by {name} ({case.shape}): {row.get('failed') or row['why']}")
            save(rows=[row])
        gc.collect()
    for head, shape, dtype in rounding.heads(bench.setting):
        row = judge_rounding(head, shape, dtype, bench)
        if not row.get("ok", row.get("absent") == rounding.NO_FP8):
            told = row.get("failed") or row.get("absent") or row["why"]
            wrong.append(f"{row['op']} by {row['way']} ({row['shape']}): {told}")
        save(rows=[row])
    if wrong:
        raise WrongResult("; ".join(wrong))


def judge(
    case: Case, name: str, way: Way | Unavailable, oracle: list[Tensor], eager: list[Tensor], bench: Bench
) -> Any:
    head = {"op": case.op, "shape": case.shape, "way": name, "ours": name in case.judged}
    if isinstance(way, Unavailable):
        return {**head, "absent": str(way)}
    dtype = bench.setting.dtype
    try:
        with poisoned() if name in case.judged else contextlib.nullcontext():
            got = run(way, case, dtype, dtype)
            again = run(way, case, dtype, dtype) if name in DETERMINISTIC else got
        bench.setting.synchronize()
    except Exception as error:
        if is_fatal(error, bench.setting.synchronize):
            raise
        return {**head, "failed": f"{type(error).__name__}: {error}"[:500]}
    floor = FP32_FLOOR if dtype == torch.float32 else 0.0
    errors = {part: relative_error(one, want) for part, one, want in zip(_parts(oracle), got, oracle, strict=True)}
    limits = {
        part: max(case.judged.get(name, FACTOR) * relative_error(one, want), floor)
        for part, one, want in zip(_parts(oracle), eager, oracle, strict=True)
    }
    beyond = [
        f"{part} {errors[part]:.2e} over {limit:.2e}" for part, limit in limits.items() if not errors[part] <= limit
    ]
    same_bits = all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    if not same_bits:
        beyond.append("two runs differ")
    return {**head, "errors": errors, "limits": limits, "ok": not beyond, "why": "; ".join(beyond)}


def judge_rounding(head: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    if bench.seconds_left() <= 0:
        return {**head, "absent": NO_TIME}
    try:
        return {**head, **rounding.judged(bench.setting, shape, dtype, poisoned)}
    except Exception as error:
        if is_fatal(error, bench.setting.synchronize):
            raise
        return {**head, "failed": f"{type(error).__name__}: {error}"[:500]}


def run(way: Way, case: Case, dtype: torch.dtype, measured: torch.dtype) -> list[Tensor]:
    """Output and the gradient of every input in ``dtype``, from numbers that are rounded to the measured one."""
    inputs = [x.to(measured).to(dtype).detach().requires_grad_() for x in case.draw()]
    out = way(*inputs)
    seed = torch.Generator(out.device).manual_seed(7)
    d_out = torch.randn(out.shape, generator=seed, dtype=torch.float32, device=out.device).to(measured).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def is_fatal(error: Exception, synchronize: Callable[[], None]) -> bool:
    """Whether the device is lost to this process: after an illegal access every later call fails too."""
    try:
        synchronize()
    except Exception:
        return True
    return False


def _parts(tensors: list[Tensor]) -> list[str]:
    return ["output", *(f"gradient {number}" for number in range(len(tensors) - 1))]
