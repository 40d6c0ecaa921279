"""All GPU measurements in one command, in under eight minutes: python benchmarks/gpu_suite.py

    python benchmarks/gpu_suite.py                                  # on a machine with a GPU, torch and triton
    python benchmarks/gpu_suite.py --wheels wheels --out "$OUT" --commit abc123    # on one that reaches no registry
    python benchmarks/gpu_suite.py --device cpu --tiny              # a rehearsal of the same code; no measurement
    python benchmarks/gpu_suite.py --render benchmarks/results/nvidia-h200-2026-12-01.json

Sections, each with its own time: the ceilings (a large copy, a large matrix product), correctness of every kernel, real
packs from real JPEGs, training steps of the 7B shape at reduced depth in every way, the kernel table, the head's loss,
the optimizer's step, FP8 against bf16; and from their rows the targets (docs/gpu-suite.md). They run in a child
process, which this one watches: a section that fails, hangs or takes the device with it is recorded with its error and
loses no other. Writes ``results/<device>-<date>.json`` after every row, and the same as a markdown page at the end.
Ends with code 1 where a section is not done.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script: this tree's packages, installed or not

from benchmarks.gpu import machine
from benchmarks.gpu.report import markdown, summary
from benchmarks.gpu.table import put_into, rows_of
from benchmarks.gpu.targets import targets
from benchmarks.gpu.writing import Results
from benchmarks.provenance import ROOT
from mimo_megatron.attention.choice import TABLE
from mimo_megatron.errors import ConfigError, MimoError

RESULTS = ROOT / "benchmarks" / "results"
# Seconds that a section may take before it is ended. A section knows its own limit, and leaves the rest of its rows out
# shortly before.
BUDGETS = {
    "ceilings": 40, "correctness": 90, "packs": 60, "train": 190, "kernels": 120, "head": 45, "optimizer": 25,
    "fp8": 45,
}  # fmt: skip
EXPECTED = {
    "ceilings": 8, "correctness": 50, "packs": 15, "train": 160, "kernels": 90, "head": 25, "optimizer": 10, "fp8": 25,
}  # fmt: skip
"""What a real run on an H200 should take, none of it timed there yet."""
EXPECTED_START = 30
TOTAL_SECONDS = 470
START_SECONDS = 90
"""Until the first section begins: torch and megatron are loaded."""
PATIENCE = 5
"""Times as long a rehearsal may take: it proves that the code runs, on whatever machine."""
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
_LAST_LINES = 15


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    if args.render is not None:
        print(markdown(Results.read(args.render).tree), end="")
        return 0
    try:
        if args.table is not None:
            put_into(TABLE, rows_of(Results.read(args.table).tree, args.table.name))
            return 0
        path = measure(args)
    except MimoError as error:
        print(error, file=sys.stderr)
        return 2
    tree = Results.read(path).tree
    print(summary(tree))
    print(f"wrote {path} and {path.with_suffix('.md')}")
    return 0 if all(section["status"] == "done" for section in tree["sections"].values()) else 1


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at tiny size; no number is a measurement")
    parser.add_argument("--wheels", type=Path, help="folder of wheels this interpreter lacks; unpacked, not installed")
    parser.add_argument("--out", type=Path, help="folder of the result file; default benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=BUDGETS, help="sections; packs are made for those that need them")
    parser.add_argument("--seconds", type=float, help=f"for everything; default {TOTAL_SECONDS}")
    parser.add_argument("--commit", help="of this tree, where its history is not there")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", type=Path, help="put a result file's times of attention into the table of `auto`")
    parser.add_argument("--render", type=Path, help="print the page of a result file, and measure nothing")
    args = parser.parse_args(words)
    if args.device == "cpu" and not args.tiny:
        parser.error("a CPU can only rehearse: add --tiny")
    if args.tiny and args.out is not None and args.out.resolve().is_relative_to(RESULTS):
        parser.error("a rehearsal measures nothing, so it is not written into benchmarks/results: choose another --out")
    return args


def measure(args: argparse.Namespace) -> Path:
    """The finished result file, its page beside it."""
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as name:
        folder = Path(name)
        paths = [machine.link_kernels(folder), ROOT]
        if args.wheels is not None:
            paths.append(machine.unpacked(args.wheels, folder))
        environ = environment(args, paths)
        require_parts(environ)
        out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-suite-rehearsal-")) if args.tiny else RESULTS)
        results = Results(out / f"gpu-suite-running-{os.getpid()}.json", beginning(args))
        results.write()
        deadline = time.monotonic() + (args.seconds or TOTAL_SECONDS * patience(args))
        results = supervise(results.path, folder, environ, deadline)
    results.tree["targets"] = targets(results.tree)
    results.write()
    device = machine.short_name(results.tree.get("device", {}).get("name", "unknown"))
    stem = f"{'rehearsal-' if args.tiny else ''}{device}-{time.strftime('%Y-%m-%d', time.gmtime())}"
    taken = sum(1 for path in out.glob(f"{stem}*.json"))
    path = out / f"{stem}{f'-{taken + 1}' if taken else ''}.json"
    results.path.rename(path)
    path.with_suffix(".md").write_text(markdown(results.tree), encoding="utf-8")
    return path


def patience(args: argparse.Namespace) -> int:
    return PATIENCE if args.tiny else 1


def beginning(args: argparse.Namespace) -> dict[str, Any]:
    """The tree of a result file in which nothing is measured yet."""
    chosen = set(args.only or BUDGETS)
    chosen |= {"ceilings"} | ({"packs"} if chosen & {"train", "kernels", "head", "optimizer", "fp8"} else set())
    return {
        "suite": 1,
        "rehearsal": args.tiny,
        "asked": {"device": args.device, "tiny": args.tiny, "seed": args.seed},
        "start_seconds": START_SECONDS * patience(args),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "command": shlex.join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]]),
        "commit": machine.commit(args.commit),
        "sections": {
            name: {
                "status": "waiting" if name in chosen else "not asked for",
                "budget_seconds": seconds * patience(args),
            }
            for name, seconds in BUDGETS.items()
        },
    }


def environment(args: argparse.Namespace, paths: list[Path]) -> dict[str, str]:
    """Of the child: this tree first. Without a GPU, triton interprets and one thread computes."""
    own = {"PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if args.device == "cpu":
        own |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def require_parts(environ: dict[str, str]) -> None:
    """``ConfigError`` names what is missing and how to bring it, before a device's time is spent."""
    command = [sys.executable, "-m", "benchmarks.gpu.needs"]
    missing = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout.strip()
    if missing:
        raise ConfigError(f"the suite cannot run here:\n{missing}")


def supervise(
    path: Path, folder: Path, environ: dict[str, str], deadline: float, worker: Sequence[str] = WORKER
) -> Results:
    """Start workers until every section has an end; what a worker left running is marked with the reason."""
    log_path = folder / "log"
    while True:
        results = Results.read(path)
        waiting = [name for name, section in results.tree["sections"].items() if section["status"] == "waiting"]
        if not waiting:
            return results
        if time.monotonic() > deadline:
            for name in waiting:
                results.set(name, status="not run", error="no time was left")
            return results
        with log_path.open("w") as log:
            child = subprocess.Popen(
                [*worker, str(path), str(folder), f"{deadline - time.monotonic():.0f}"],
                cwd=ROOT,
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            reason = watch(child, path, deadline)
        results = Results.read(path)
        mark_ended(results, waiting, reason, log_path.read_text(encoding="utf-8", errors="replace").splitlines())


def watch(child: "subprocess.Popen[bytes]", path: Path, deadline: float) -> str:
    """Why the child ended; it is killed where its section exceeds its time, or all of them theirs."""
    current, since = "", time.monotonic()
    while child.poll() is None:
        time.sleep(0.2)
        tree = Results.read(path).tree
        sections = tree["sections"]
        running = next((name for name, section in sections.items() if section["status"] == "running"), "")
        if running != current:
            if current:
                print(f"  {current}: {sections[current]['status']}, {time.monotonic() - since:.0f} s", flush=True)
            current, since = running, time.monotonic()
        budget = sections[current]["budget_seconds"] if current else tree["start_seconds"]
        now = time.monotonic()
        if now - since > budget or now > deadline:
            child.kill()
            child.wait()
            return (
                f"ended after {now - since:.0f} s: {'its time' if now <= deadline else 'the time of the suite'} is over"
            )
    return f"the process ended with code {child.returncode}"


def mark_ended(results: Results, waiting_before: list[str], reason: str, log: list[str]) -> None:
    """A section that was running did not end by itself; where a worker began none, none can be begun."""
    sections = results.tree["sections"]
    running = [name for name, section in sections.items() if section["status"] == "running"]
    waiting = [name for name, section in sections.items() if section["status"] == "waiting"]
    for name in running or (waiting if waiting == waiting_before else []):
        results.set(name, status="failed", error=reason, log=log[-_LAST_LINES:])


if __name__ == "__main__":
    sys.exit(main())
