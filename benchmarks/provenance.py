"""What every row of a result file says about itself: the processor, the commit, the versions and the command."""

import csv
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # benchmarks are scripts: `examples`, which some of them import, is not installed


def machine() -> str:
    """The processor's name and number of cores; never the host's."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = re.sub(r"\((R|TM|r|tm)\)", "", match.group(1) if match else platform.machine())
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower())) + f"-{os.cpu_count()}cpu"


def commit(*measured: str) -> str:
    """The checked-out commit, marked where one of the measured paths differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--", *measured) else ""
    )


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(*packages: str) -> str:
    found = (f"{name} {installed(name) or 'not installed'}" for name in packages)
    return "; ".join([f"python {platform.python_version()}", *found])


def write_rows(
    thing: str, rows: Sequence[Mapping[str, Any]], measured: Sequence[str], packages: Sequence[str], out: Path | None
) -> Path:
    """The CSV file of these rows, ``results/<machine>-<thing>.csv`` unless ``out`` says otherwise."""
    path = out or ROOT / "benchmarks" / "results" / f"{machine()}-{thing}.csv"
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    common = dict(commit=commit(*measured), machine=machine(), versions=versions(*packages), command=command)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    return path
