"""The process that measures: section after section into the result file, until all are done or the device is lost.

    python -m benchmarks.gpu.worker RESULT_FILE FOLDER SECONDS      # gpu_suite.py starts it, and again after a crash

A section that fails leaves its error and what it had measured; the next one begins. After an error that the device does
not survive, the process ends with code 3, and a new one takes the sections that are left: it measures the ceilings
anew, so that fractions are always of the same process.
"""

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, correctness, fp8, head, kernels, machine, optimizer, packs, steps, train
from benchmarks.gpu.setting import Bench, Setting, device_facts
from benchmarks.gpu.writing import Results, Save
from mimo_megatron.errors import ConfigError

DEVICE_LOST = 3
SECTIONS: dict[str, Callable[[Bench, Save, Path], None]] = {
    "ceilings": lambda bench, save, folder: ceilings.section(bench, save),
    "correctness": lambda bench, save, folder: correctness.section(bench, save),
    "packs": packs.section,
    "train": lambda bench, save, folder: train.section(bench, save),
    "kernels": lambda bench, save, folder: kernels.section(bench, save),
    "head": lambda bench, save, folder: head.section(bench, save),
    "optimizer": lambda bench, save, folder: optimizer.section(bench, save),
    "fp8": lambda bench, save, folder: fp8.section(bench, save),
}
NEEDS_PACKS = ("train", "kernels", "head", "optimizer", "fp8")
USABLE = 0.92
"""Of a section's time, until it begins no further row."""
LAST_SECONDS = 5
"""Before the suite's end, for the row in progress."""


def main(path: Path, folder: Path, seconds: float) -> None:
    """``seconds``: until the whole suite is ended."""
    results = Results.read(path)
    bench = Bench(setting_of(results.tree), suite_ends=time.monotonic() + seconds - LAST_SECONDS)
    bench.setting.prepare_torch()
    results.tree["device"], results.tree["versions"] = device_facts(bench.setting), machine.versions()
    results.write()
    for name in SECTIONS:
        if results.section(name)["status"] == "waiting":
            run(name, bench, results, folder)


def setting_of(tree: dict[str, Any]) -> Setting:
    device = torch.device(tree["asked"]["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU; `--device cpu --tiny` rehearses the suite on a CPU")
    return Setting(device, tree["asked"]["tiny"], tree["asked"]["seed"])


def run(name: str, bench: Bench, results: Results, folder: Path) -> None:
    began = time.perf_counter()
    budget = results.section(name)["budget_seconds"]
    bench.ends = min(time.monotonic() + USABLE * budget, bench.suite_ends)
    results.set(name, status="running", gpu_before=machine.gpu_state())
    try:
        prepare(name, bench, results, folder)
        SECTIONS[name](bench, results.saver(name), folder)
        status: dict[str, Any] = {"status": "done"}
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()[-12:]
        status = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000], "traceback": last}
        if correctness.is_fatal(error, bench.setting.synchronize):
            results.set(name, **status, seconds=round(time.perf_counter() - began, 1))
            sys.exit(DEVICE_LOST)
    steps.release(bench)
    results.set(name, **status, seconds=round(time.perf_counter() - began, 1), gpu_after=machine.gpu_state())
    print(f"{name}: {status['status']} after {time.perf_counter() - began:.1f} s", flush=True)


def prepare(name: str, bench: Bench, results: Results, folder: Path) -> None:
    """What ``name`` builds on and another process measured or made."""
    if name != "ceilings" and not bench.ceilings:
        ceilings.section(bench, lambda **found: None)
    if name in NEEDS_PACKS and "packs" not in bench.kept:
        if results.section("packs")["status"] != "done":
            raise ConfigError(f"{name} needs real packs, and the section packs did not make them")
        bench.kept |= packs.made_before(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
