"""Converter: bits, memory and speed on a model with MiMo-VL's real tensor names and shapes, at reduced depth.

    python benchmarks/bench_convert.py            # 2 + 2 layers, 3.4 GB in bf16; needs 11 GB of disk, a few minutes
    python benchmarks/bench_convert.py --layers 1

Every operation runs in a process of its own, on one thread, several times over; the fastest run counts, as others share
the page cache and the disk. Speed is gigabytes of weights per CPU-second, user and system: reading, moving, writing and
syncing. Memory is the growth of the resident set, in which mapped file pages count. The first lines must read "equal".
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch
from provenance import write_rows
from safetensors.torch import load_file, save_file

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import write_hf_companions
from mimo_megatron.convert.hf_io import SafetensorsFolder, SafetensorsWriter
from mimo_megatron.convert.storage import Scratch
from mimo_megatron.convert.verbs import from_hf, to_hf, verify

DTYPE = torch.bfloat16
REPEATS = 3
PUBLISHED = dict(  # not measured here: wall time on another machine
    operation="Megatron-Bridge import of Llama-3.2-1B on CPUs (its issue 2767; 0.27 GB/s)",
    gigabytes="2.47",
    wall_seconds="9.14",
)


def reduced_model(num_layers: int) -> ModelConfig:
    """MiMo-VL-7B with that many layers in the decoder and in the encoder."""
    model = preset("mimo-vl-7b")
    assert model.vision is not None
    vision = {"depth": num_layers, "full_attention_layers": (num_layers - 1,)}
    return model.model_copy(
        update={
            "text": model.text.model_copy(update={"num_layers": num_layers}),
            "vision": model.vision.model_copy(update=vision),
        }
    )


def make_random(folder: Path, model: ModelConfig) -> None:
    folder.mkdir()
    write_hf_companions(folder, model, DTYPE)
    draw = torch.Generator().manual_seed(0)
    specs = [spec for rule in rules_for(model) for spec in rule.hf]
    with SafetensorsWriter(folder, specs, DTYPE, shard_bytes=5_000_000_000) as writer:
        for spec in specs:
            words = torch.empty(-(-spec.numel // 4), dtype=torch.int64).random_(generator=draw)
            writer.add(spec.name, words.view(DTYPE)[: spec.numel].view(spec.shape))


# ---- operations: each returns the bytes of weights that passed -------------------------------------------------------


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def plain_copy(work: Path) -> int:
    """What a converter cannot avoid: read and write safetensors with their own package, the whole model in memory."""
    (work / "copy").mkdir()
    for path in (work / "hf").glob("*.safetensors"):
        save_file(load_file(path), work / "copy" / path.name)
    return weight_bytes(work / "hf")


def import_(work: Path) -> int:
    from_hf(work / "hf", work / "ckpt")
    return weight_bytes(work / "hf")


def export(work: Path) -> int:
    to_hf(work / "ckpt", work / "back")
    return weight_bytes(work / "hf")


def compare(work: Path) -> int:
    """The checkpoint against both folders. Both equal: every tensor went round bit for bit."""
    results = [verify(work / "ckpt", work / name) for name in ("hf", "back")]
    print("\n".join(f"checkpoint against {name}: {one}" for name, one in zip(("hf", "back"), results, strict=True)))
    assert all(one.is_equal for one in results)
    return sum(one.num_bytes for one in results)


def move(work: Path) -> int:
    """The rules that move elements, both directions, between memory and memory."""
    source, there, back = SafetensorsFolder(work / "hf"), Scratch(), Scratch()
    moved = 0
    for rule in rules_for(reduced_model(_layers_of(work))):
        if rule.pieces:
            hf = [source.read(spec.name) for spec in rule.hf]
            ours = rule.to_ours(hf, there.take(rule.ours.numel, DTYPE))
            rule.to_hf(ours, back.take(rule.ours.numel, DTYPE))
            moved += 2 * ours.nbytes
    return moved


def _layers_of(work: Path) -> int:
    return json.loads((work / "hf" / "config.json").read_text())["text_config"]["num_hidden_layers"]


OPERATIONS: dict[str, tuple[Callable[[Path], int], str]] = {
    "plain safetensors copy": (plain_copy, "copy"),
    "from-hf": (import_, "ckpt"),
    "to-hf": (export, "back"),
    "verify, twice": (compare, ""),
    "rules only, in memory": (move, ""),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_here(name: str, work: Path) -> dict[str, float]:
    """One run in this process: bytes, CPU and wall seconds, growth of the resident set at its peak."""
    torch.set_num_threads(1)
    resident = _resident_bytes("VmRSS")
    cpu, wall = _cpu_seconds(), time.perf_counter()
    num_bytes = OPERATIONS[name][0](work)
    return dict(
        num_bytes=num_bytes,
        cpu_seconds=_cpu_seconds() - cpu,
        wall_seconds=time.perf_counter() - wall,
        peak_bytes=_resident_bytes("VmHWM") - resident,
    )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident_bytes(field: str) -> int:
    """From /proc: getrusage's peak of a new process begins at that of the process that started it."""
    (kilobytes,) = re.findall(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def measure(name: str, work: Path) -> dict[str, float]:
    """The fastest of several runs, each in a new process; what it wrote is kept from the last one."""
    runs = []
    for repeat in range(REPEATS):
        written = OPERATIONS[name][1]
        if repeat and written:
            subprocess.run(["rm", "-r", str(work / written)], check=True)
        command = [sys.executable, __file__, "--one", name, "--work", str(work)]
        *said, result = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        print("".join(f"  {line}\n" for line in said if repeat == 0), end="")
        runs.append(json.loads(result))
    return min(runs, key=lambda run: run["cpu_seconds"])


def row(name: str, run: dict[str, float], largest_bytes: int) -> dict[str, Any]:
    gigabytes = run["num_bytes"] / 1e9
    one = dict(
        operation=name,
        gigabytes=f"{gigabytes:.3f}",
        cpu_seconds=f"{run['cpu_seconds']:.2f}",
        gb_per_cpu_second=f"{gigabytes / run['cpu_seconds']:.2f}",
        wall_seconds=f"{run['wall_seconds']:.2f}",
        peak_gigabytes=f"{run['peak_bytes'] / 1e9:.3f}",
        peak_over_largest_tensor=f"{run['peak_bytes'] / largest_bytes:.2f}",
    )
    print(
        f"{name:24} {one['gigabytes']:>7} GB  {one['gb_per_cpu_second']:>6} GB per CPU-second  "
        f"{one['wall_seconds']:>6} s wall  peak {one['peak_gigabytes']} GB, {one['peak_over_largest_tensor']} x largest"
    )
    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=OPERATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.one:
        print(json.dumps(measure_here(values.one, values.work)))
        return
    model = reduced_model(values.layers)
    largest = max(rule.ours.numel for rule in rules_for(model)) * DTYPE.itemsize
    with tempfile.TemporaryDirectory() as name:
        make_random(Path(name) / "hf", model)
        print(f"{weight_bytes(Path(name) / 'hf') / 1e9:.3f} GB, the largest tensor {largest / 1e9:.3f} GB")
        rows = [row(operation, measure(operation, Path(name)), largest) for operation in OPERATIONS]
    print(PUBLISHED["operation"])
    rows.append(dict.fromkeys(rows[0], "") | PUBLISHED)
    path = write_rows("convert", rows, ["mimo_megatron/convert"], ["torch", "safetensors", "numpy"], values.out)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
