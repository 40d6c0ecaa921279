"""Weight sync on one node: a model of MiMo-VL-7B's shapes from trainer to engine, against copying memory.

    python benchmarks/bench_weight_sync.py    # 16.6 GB a pass, through 13 GB of memory; two minutes

The trainer's process packs its parameters, in bf16, with the converter's rules straight into slots of shared memory and
computes the checksums; the engine's process verifies every checksum and copies into its own weights. One thread each.
All 36 + 32 layers are sent, but only ``--distinct`` of a kind exist in memory, on both sides, so that two models fit;
they are together larger than the caches. Timed is a whole pass, from the manifest until the engine has finished it.

The fastest of several passes counts, as others share the machine. GB per CPU-second is that of the slower process: the
rate of an update where each process has a core to itself and neither waits. Peak memory is the growth of the resident
set beyond the weights; both processes count the two shared slots, which they map.

Copies: torch's ``copy_`` of the same tensors into the same weights within one process, with one thread (which is what
each end of an update has) and with two. An update copies every byte twice and hashes it twice, so its two threads could
at best come to half of what two threads copy.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"  # before torch is imported: the most that is used

import torch
from provenance import write_rows
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from mimo_megatron.config.presets import preset
from mimo_megatron.convert.families import rules_for
from mimo_megatron.parallel.mesh import single_process_mesh
from mimo_megatron.rl.sync.buckets import Manifest, TensorEntry
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.rl.sync.receiver import Receiver
from mimo_megatron.rl.sync.shared_memory import SlotNotice, SlotReader, SlotRing

DTYPE = torch.bfloat16
MODEL = preset("mimo-vl-7b")
ENGINE = "engine"


class Weights:
    """Tensors by name, of which layers with the same number modulo ``num_distinct`` are the same memory."""

    def __init__(self, num_distinct: int, seed: int):
        self._num_distinct = num_distinct
        self._draw = torch.Generator().manual_seed(seed)
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        key = re.sub(r"\.(\d+)\.", lambda found: f".{int(found[1]) % self._num_distinct}.", name, count=1)
        if key not in self._held:
            words = torch.empty(-(-int(torch.Size(shape).numel()) // 4), dtype=torch.int64)
            self._held[key] = words.random_(generator=self._draw).view(DTYPE)[: torch.Size(shape).numel()].view(shape)
        return self._held[key]

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in self._held.values())


def trainer_module(weights: Weights) -> Module:
    """The whole model on one rank: a tree of modules with our parameters' names."""
    root = Module()
    for rule in rules_for(MODEL):
        *path, leaf = rule.ours.name.split(".")
        module = root
        for depth, part in enumerate(path):
            if part not in dict(module.named_children()):
                is_list = path[depth + 1 : depth + 2] == ["0"]
                module.add_module(part, ModuleList() if is_list else Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, Parameter(weights.get(*_ours(rule)), requires_grad=False))
    return root


def _ours(rule: Any) -> tuple[str, tuple[int, ...]]:
    return rule.ours.name, rule.ours.shape


# ---- the engine's process --------------------------------------------------------------------------------------------


def engine(path: Path, num_distinct: int, wire: Connection) -> None:
    """Takes updates until the wire says no more; answers every message with JSON."""
    torch.set_num_threads(1)
    held = Weights(num_distinct, seed=1)
    model = {spec.name: spec.shape for rule in rules_for(MODEL) for spec in rule.hf}
    weights = {name: held.get(name, shape) for name, shape in model.items()}
    receiver = Receiver({name: TensorEntry(name, "BF16", shape) for name, shape in model.items()})
    resident = _reset_peak()
    reader = SlotReader(path)
    _answer(wire)
    while announced := wire.recv_bytes():
        cpu = _cpu_seconds()
        receiver.begin(Manifest.from_json(announced))
        while (message := wire.recv_bytes()) not in (b"finish", b"compare"):
            receiver.copy(reader.read(SlotNotice.from_json(message)), weights.__getitem__)
            _answer(wire)
        receiver.finish(weights.__getitem__ if message == b"compare" else None)
        _answer(wire, cpu_seconds=_cpu_seconds() - cpu, peak_bytes=_resident_bytes("VmHWM") - resident)


def _answer(wire: Connection, **what: float) -> None:
    wire.send_bytes(json.dumps(what).encode())


# ---- the trainer's process -------------------------------------------------------------------------------------------


class Update:
    """Passes of the whole model to the engine's process."""

    def __init__(self, weights: Weights, num_distinct: int, bucket_bytes: int):
        self._publisher = Publisher([trainer_module(weights)], MODEL, single_process_mesh(), bucket_bytes)
        self._resident = _reset_peak()
        self._ring = SlotRing(self._publisher.largest_bucket_bytes, [ENGINE])
        context = multiprocessing.get_context("spawn")
        self._wire, theirs = context.Pipe()
        self._engine = context.Process(target=engine, args=(self._ring.path, num_distinct, theirs))
        self._engine.start()
        self._wire.recv_bytes()
        self._ring.unlink()
        self._version = 0
        self._given: list[SlotNotice] = []

    def run(self, end: bytes) -> dict[str, float]:
        """One pass; how long it took and what it used."""
        start, cpu = time.perf_counter(), _cpu_seconds()
        self._version += 1
        manifest = self._publisher.manifest(self._version)
        self._wire.send_bytes(manifest.to_json())
        for bucket in self._publisher.buckets(self._version, self._room):
            self._given.append(self._ring.write(bucket))
            self._wire.send_bytes(self._given[-1].to_json())
        while self._given:
            self._release()
        self._wire.send_bytes(end)
        engine = json.loads(self._wire.recv_bytes())
        return dict(
            wall_seconds=time.perf_counter() - start,
            num_bytes=sum(entry.num_bytes for entry in manifest.tensors),
            trainer_cpu_seconds=_cpu_seconds() - cpu,
            engine_cpu_seconds=engine["cpu_seconds"],
            trainer_peak_bytes=_resident_bytes("VmHWM") - self._resident,
            engine_peak_bytes=engine["peak_bytes"],
        )

    def _room(self, num_bytes: int) -> Tensor:
        while self._ring.holders():
            self._release()
        return self._ring.room(num_bytes)

    def _release(self) -> None:
        self._wire.recv_bytes()
        self._ring.release(ENGINE, self._given.pop(0))

    def close(self) -> None:
        self._wire.send_bytes(b"")
        self._engine.join()
        self._ring.close()


def copies(weights: Weights, num_distinct: int) -> Callable[[], int]:
    """A pass of plain copies; gives the bytes copied."""
    held = Weights(num_distinct, seed=1)
    pairs = [(held.get(*_ours(rule)), weights.get(*_ours(rule))) for rule in rules_for(MODEL)]

    def run() -> int:
        for there, here in pairs:
            there.copy_(here)
        return sum(here.nbytes for _, here in pairs)

    return run


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident_bytes(field: str) -> int:
    (kilobytes,) = re.findall(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def _reset_peak() -> int:
    """The resident set now, from which its peak is counted again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_bytes("VmRSS")


def measure_copies(weights: Weights, num_distinct: int, threads: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    run, times, num_bytes = copies(weights, num_distinct), [], 0
    for _ in range(repeats):
        start, cpu = time.perf_counter(), _cpu_seconds()
        num_bytes = run()
        times.append((time.perf_counter() - start, _cpu_seconds() - cpu))
    return dict(wall_seconds=min(times)[0], num_bytes=num_bytes, trainer_cpu_seconds=min(cpu for _, cpu in times))


def fastest(runs: list[dict[str, float]]) -> dict[str, float]:
    """The best of each of its times, for the load of others falls on different ones; the worst of its memory."""
    return {key: (max if key.endswith("peak_bytes") else min)(run[key] for run in runs) for key in runs[0]}


def row(name: str, run: dict[str, float], one_thread: dict[str, float]) -> dict[str, str]:
    """Speed is that of the slower process; its share of a copy's, by wall time and by CPU time."""
    gigabytes = run["num_bytes"] / 1e9
    cpu = max(run["trainer_cpu_seconds"], run.get("engine_cpu_seconds", 0.0))
    found = dict(
        gigabytes=gigabytes,
        wall_seconds=run["wall_seconds"],
        gb_per_second=gigabytes / run["wall_seconds"],
        of_copy_by_1_thread=one_thread["wall_seconds"] / run["wall_seconds"],
        gb_per_cpu_second=gigabytes / cpu,
        of_copy_by_cpu_time=one_thread["trainer_cpu_seconds"] / cpu,
        trainer_cpu_seconds=run["trainer_cpu_seconds"],
        engine_cpu_seconds=run.get("engine_cpu_seconds"),
        trainer_peak_gigabytes=run["trainer_peak_bytes"] / 1e9 if "trainer_peak_bytes" in run else None,
        engine_peak_gigabytes=run["engine_peak_bytes"] / 1e9 if "engine_peak_bytes" in run else None,
    )
    shown = {key: "" if value is None else f"{value:.2f}" for key, value in found.items()}
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in shown.items() if value))
    return dict(operation=name) | shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distinct", type=int, default=6, help="layers of a kind in memory")
    parser.add_argument("--bucket-megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()
    weights = Weights(values.distinct, seed=0)
    runs = {
        f"copy_ in one process, {threads} thread(s)": measure_copies(weights, values.distinct, threads, values.repeats)
        for threads in (2, 1)
    }
    update = Update(weights, values.distinct, values.bucket_megabytes << 20)
    for name, end in (("update", b"finish"), ("update, read back and compared", b"compare")):
        runs[name] = fastest([update.run(end) for _ in range(values.repeats)])
    update.close()
    rows = [row(name, run, list(runs.values())[1]) for name, run in runs.items()]
    measured = ["mimo_megatron/rl/sync", "mimo_megatron/convert", "benchmarks/bench_weight_sync.py"]
    print(f"wrote {write_rows('weight-sync', rows, measured, ['torch', 'xxhash', 'numpy'], values.out)}")


if __name__ == "__main__":
    main()
