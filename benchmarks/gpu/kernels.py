"""The kernel table: every way of every operation at the sizes of training, timed, as fractions of measured ceilings.

A way whose output is not that of the trusted one is not timed: it is listed with its error.
"""

import gc
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Way, in_order
from benchmarks.gpu.cases import table_cases
from benchmarks.gpu.correctness import is_fatal
from benchmarks.gpu.peers import Unavailable
from benchmarks.gpu.setting import NO_TIME, Bench
from benchmarks.gpu.timing import Timing, measure, relative_error
from benchmarks.gpu.writing import Save

MOST_DIFFERENCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Of two ways' outputs: twice what bf16 operands make of float64 results."""


def section(bench: Bench, save: Save) -> None:
    for case, names in in_order(table_cases(bench.setting, bench.kept["packs"])):
        if bench.seconds_left() <= 0:
            save(rows=[{"op": case.op, "shape": case.shape, "way": name, "absent": NO_TIME} for name in names])
            continue
        inputs = [x.requires_grad_() for x in case.draw()]
        trusted = case.ways[case.trusted]
        assert not isinstance(trusted, Unavailable)
        with torch.no_grad():
            want = trusted(*inputs)
        d_out = torch.randn(want.shape, generator=bench.setting.generator(), device=want.device).to(want.dtype)
        for name in names:
            if bench.has_time_for(name):
                save(rows=[timed(case, name, case.ways[name], inputs, want, d_out, bench)])
            else:
                save(rows=[{"op": case.op, "shape": case.shape, "way": name, "absent": NO_TIME}])
        del inputs, want, d_out
        gc.collect()


def timed(
    case: Case, name: str, way: Way | Unavailable, inputs: list[Tensor], want: Tensor, d_out: Tensor, bench: Bench
) -> dict[str, Any]:
    head: dict[str, Any] = {"op": case.op, "shape": case.shape, "way": name, "ours": name in case.judged}
    head["case"] = case.name
    if case.key is not None:
        head["key"] = list(case.key)
    if isinstance(way, Unavailable):
        return {**head, "absent": str(way)}
    setting = bench.setting

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(*inputs), inputs, d_out)

    try:
        with torch.no_grad():
            error = relative_error(way(*inputs), want)
            if not error <= MOST_DIFFERENCE[setting.dtype]:
                return {**head, "failed": f"its output is {error:.2e} from that of {case.trusted}"}
            forward = measure(lambda: way(*inputs), setting)
        both = measure(train, setting)
    except Unavailable as reason:
        return {**head, "absent": str(reason)}
    except Exception as error:
        if is_fatal(error, setting.synchronize):
            raise
        return {**head, "failed": f"{type(error).__name__}: {error}"[:500]}
    work = case.work
    return {
        **head,
        "difference": error,
        "forward": rates(forward, work.forward_flops, work.forward_bytes, bench.ceilings),
        "train": rates(both, work.train_flops, work.train_bytes, bench.ceilings),
    }


def rates(timing: Timing, flops: float, num_bytes: float, ceilings: dict[str, float]) -> dict[str, Any]:
    """TFLOP/s and GB/s of the work asked for, its fraction of the copy's bytes, and the larger of its fractions of the
    two ceilings."""
    found: dict[str, Any] = timing.row()
    fractions = {"bytes": num_bytes / timing.seconds / ceilings["bytes_per_second"]}
    found["gbytes_per_second"] = round(num_bytes / timing.seconds / 1e9, 3)
    found["of_copy"] = round(fractions["bytes"], 4)
    if flops:
        fractions["flops"] = flops / timing.seconds / ceilings["flops_per_second"]
        found["tflops"] = round(flops / timing.seconds / 1e12, 3)
    bound = max(fractions, key=lambda name: fractions[name])
    return {**found, "of_ceiling": round(fractions[bound], 4), "bound_by": bound}
