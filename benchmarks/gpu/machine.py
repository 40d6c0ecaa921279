"""What the suite runs on: this tree's own kernels, carried wheels, and the facts that every result file holds.

No torch: the command, which watches the process that measures, never loads it.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.provenance import ROOT, installed
from mimo_megatron.errors import ConfigError

PACKAGES = (
    "torch", "triton", "transformers", "megatron-core", "transformer-engine", "flash-attn", "flash-attn-3",
    "flash-attn-4", "numpy",
)  # fmt: skip
_GPU_FACTS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu", "memory.used",
)  # fmt: skip


def link_kernels(folder: Path) -> Path:
    """A folder for the front of ``PYTHONPATH`` under which ``mimo_triton_kernels`` is this tree's, installed or not."""
    path = folder / "import"
    path.mkdir()
    (path / "mimo_triton_kernels").symlink_to(ROOT / "triton_kernels", target_is_directory=True)
    return path


def unpacked(wheels: Path, folder: Path) -> Path:
    """A folder with the contents of these wheels, for ``PYTHONPATH``. Nothing is fetched, nothing else is changed.

    ``ConfigError`` where there are none, or pip cannot unpack them for this interpreter.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ConfigError(f"--wheels {wheels}: no *.whl there")
    target = folder / "wheels"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*command, "--target", str(target), *map(str, files)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"--wheels {wheels}: pip cannot unpack them here: {done.stderr.strip()}")
    return target


def commit(given: str | None) -> str:
    """The commit that is measured: as given, for a tree that travelled without its history, or as git knows it."""
    if given:
        return given
    words = ["git", "-C", str(ROOT)]
    head = subprocess.run([*words, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    paths = ["mimo_megatron", "triton_kernels", "csrc", "benchmarks"]
    changed = subprocess.run([*words, "status", "--porcelain", "--", *paths], capture_output=True, text=True).stdout
    is_changed = any(not line.endswith((".json", ".md", ".csv")) for line in changed.splitlines())
    return head.stdout.strip() + ("+changes" if is_changed else "")


def versions() -> dict[str, str]:
    """Of Python and the packages that matter, those that are not installed left out."""
    found = {name: version for name in PACKAGES if (version := installed(name))}
    return {"python": platform.python_version(), **found}


def gpu_state() -> dict[str, str]:
    """Clocks, power, temperature and load as ``nvidia-smi`` reads them now; empty where it is not there. Only read."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_GPU_FACTS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:  # no fact is worth a section
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(_GPU_FACTS, values, strict=True)) if len(values) == len(_GPU_FACTS) else {}


def short_name(device_name: str) -> str:
    """``nvidia-h200`` for "NVIDIA H200": what result files are called by."""
    return "-".join(re.findall(r"[a-z0-9.]+", device_name.lower())) or "unknown"
