"""Who may import whom: docs/architecture.md section 3, read from the source by AST.

Invariants: a layer imports only the layers listed for it; megatron stays in mcore/ and platform/; no import cycle; no
import inside a function except at the seams listed here; nothing imports a door.
"""

import ast
import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from tests.repository import python_sources

BASIS = {"types", "errors", "log", "lifetime"}
DOORS = {"cli", "doctor"}  # entry points inside the package: they import anything, only doors import them
_TRAINING = {"config", "parallel", "platform", "data", "attention", "loss", "mcore", "model"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "log": set(),
    "lifetime": set(),
    "config": {"errors"},
    "ops": set(),
    "offload": set(),
    "platform": {"errors", "log"},
    "parallel": {"errors", "_packing"},
    "data": {*BASIS, "config", "_packing"},
    "reward": {*BASIS, "config"},
    "curation": {*BASIS, "config"},
    "attention": {"kernels", "ops", "parallel", "errors", "log"},
    "fp8": {"kernels", "parallel", "errors"},
    "loss": {"kernels", "parallel", "errors", "log"},
    "mcore": {*BASIS, "config", "ops", "offload", "parallel", "platform", "attention", "fp8", "loss"},
    "model": {*BASIS, "config", "ops", "offload", "parallel", "attention", "loss", "mcore"},
    "convert": {*BASIS, "config", "parallel", "platform", "mcore", "model"},
    "report": {*BASIS, "config"},
    "train": {*BASIS, *_TRAINING, "convert", "report"},
    "rl": {*BASIS, *_TRAINING, "ops", "convert", "train", "reward", "report", "rl.scheduler"},
    "rl.scheduler": {"errors"},  # a layer of its own inside another: the name of its folder
    "prove": {*BASIS, *_TRAINING, "train", "rl"},
    "reward_model": {*BASIS, *_TRAINING, "train", "evaluation", "reward"},
    "planner": {*BASIS, "config", "parallel", "data", "train"},
    "evaluation": {*BASIS, *_TRAINING, "train", "report", "reward"},
    "kernels": set(),
}
# Outside packages that only some layers may import.
ONLY_IN: dict[str, set[str]] = {
    "megatron.core": {"mcore", "platform"},
    "megatron.energon": {"data"},
    "nvidia.dali": {"data"},
    "triton": {"kernels"},
}
NEVER_IN: dict[str, set[str]] = {
    "config": {"torch"},
    "data": {"torch.distributed"},
    "reward": {"torch"},
    "planner": {"torch"},
    "rl.scheduler": {"torch"},
    "kernels": {"transformers", "numpy"},
}
# Files whose functions may import, and what: the CLI's verbs load what they run; the CPU stand-ins patch megatron's
# tracker only in the processes that install them; triton, which kernels need, and peers that a benchmark compares with
# need not be installed; a module that every start of an interpreter runs loads torch only where it is asked for
# torchvision.
SEAMS: dict[str, tuple[str, ...]] = {
    **{
        f"mimo_megatron/cli/{name}.py": ("",)
        for name in (
            "__init__",
            "inspect",
            "data",
            "plan",
            "run",
            "prove",
            "convert",
            "reward_model",
            "rewards",
            "serve",
        )
    },
    "mimo_megatron/platform/cpu.py": ("megatron",),
    "mimo_megatron/attention/libraries.py": ("flash_attn", "flash_attn_interface"),
    "mimo_megatron/attention/text_kernel.py": ("mimo_triton_kernels",),
    "mimo_megatron/attention/vision_kernel.py": ("mimo_triton_kernels",),
    "mimo_megatron/fp8/rounding.py": ("mimo_triton_kernels",),
    "mimo_megatron/loss/chunk_softmax.py": ("mimo_triton_kernels",),
    "mimo_megatron/data/energon.py": ("megatron.energon",),
    "benchmarks/bench_images.py": ("nvidia.dali",),
    "benchmarks/gpu/attention.py": ("transformer_engine",),
    "benchmarks/gpu/fp8.py": ("transformer_engine",),
    "benchmarks/gpu/peers.py": ("transformer_engine", "apex", "liger_kernel"),
    "benchmarks/bench_packing.py": ("lightbinpack", "trl"),
    "examples/vllm_env/mimo_torchvision_schemas.py": ("torch",),
}
FOLDERS = ("mimo_megatron", "triton_kernels", "examples", "benchmarks")


@dataclass(frozen=True)
class Import:
    path: str
    line: int
    target: str
    is_in_function: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}"


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks the rules in ``sources`` (path -> text)."""
    imports = [found for path, text in sources.items() for found in imports_of(path, text)]
    return [
        *(f"{one}: {problem}" for one in imports for problem in _problems(one)),
        *cycles(sources, imports),
    ]


def imports_of(path: str, text: str) -> Iterator[Import]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def visit(node: ast.AST, is_in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name, is_in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module_name(path, keep_init=True).split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (package, node.module or "")))
            yield from (Import(path, node.lineno, f"{base}.{alias.name}", is_in_function) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_in_function or isinstance(node, functions))

    yield from visit(ast.parse(text), False)


def module_name(path: str, keep_init: bool = False) -> str:
    parts = path.removesuffix(".py").split("/")
    if parts[0] == "triton_kernels":
        parts[0] = "mimo_triton_kernels"
    return ".".join(parts if keep_init or parts[-1] != "__init__" else parts[:-1])


def layer_of(module: str) -> str | None:
    """The layer a module of ours belongs to; ``door`` for what nothing may import; None for outside packages."""
    first, *rest = module.split(".")
    if first in ("examples", "benchmarks", "tests"):
        return "door"
    if first == "mimo_triton_kernels":
        return "kernels"
    if first != "mimo_megatron":
        return None
    if ".".join(rest[:2]) in ALLOWED:
        return ".".join(rest[:2])
    second = rest[0] if rest else "root"
    return "door" if second in DOORS else second if second in {*ALLOWED, "_packing"} else "root"


def _problems(one: Import) -> Iterator[str]:
    source = layer_of(module_name(one.path))
    target = layer_of(one.target)
    assert source is not None
    if one.is_in_function and not any(_is_under(one.target, name) for name in SEAMS.get(one.path, ())):
        yield "an import inside a function; move it to the top, or list the seam in tests/test_layering.py"
    if source == "root" and one.path != "mimo_megatron/__init__.py":
        yield "its folder has no layer; list it in tests/test_layering.py and docs/architecture.md"
    if source in ("door", "root"):
        return
    if target == "door":
        yield "nothing imports a door"
    elif target not in (None, source, "root") and target not in ALLOWED[source]:
        yield f"{source} may import {', '.join(sorted(ALLOWED[source])) or 'nothing of ours'}"
    for package, layers in ONLY_IN.items():
        if _is_under(one.target, package) and source not in layers:
            yield f"only {', '.join(sorted(layers))} may import {package}"
    for package in NEVER_IN.get(source, set()):
        if _is_under(one.target, package):
            yield f"{source} never imports {package}"


def _is_under(module: str, package: str) -> bool:
    return not package or module == package or module.startswith(package + ".")


def cycles(sources: Mapping[str, str], imports: list[Import]) -> list[str]:
    """The first cycle of modules that import one another, if there is one."""
    modules = {module_name(path) for path in sources}

    def resolve(target: str) -> str | None:
        return target if target in modules else (parent if (parent := target.rpartition(".")[0]) in modules else None)

    graph: dict[str, set[str]] = {module: set() for module in modules}
    for one in imports:
        importer, target = module_name(one.path), resolve(one.target)
        if target is not None and target != importer:
            graph[importer].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"import cycle: {' <- '.join(error.args[1])}"]
    return []


def test_every_import_keeps_the_layers() -> None:
    found = violations(python_sources(*FOLDERS))
    assert not found, "\n".join(found)


def test_every_seam_is_still_used() -> None:
    sources = python_sources(*FOLDERS)
    used = {path for path, text in sources.items() if any(one.is_in_function for one in imports_of(path, text))}
    assert used == set(SEAMS)


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("mimo_megatron/data/x.py", "from mimo_megatron.model import vlm", "data may import"),
        ("mimo_megatron/data/x.py", "from mimo_megatron import model", "data may import"),
        ("mimo_megatron/data/x.py", "from ..model.vlm import f", "data may import"),
        ("mimo_megatron/data/x.py", "import torch.distributed as dist", "data never imports torch.distributed"),
        ("mimo_megatron/data/x.py", "from torch import distributed", "data never imports torch.distributed"),
        ("mimo_megatron/train/x.py", "from megatron.core import parallel_state", "only mcore, platform may import"),
        ("mimo_megatron/data/x.py", "from megatron import core", "only mcore, platform may import"),
        ("mimo_megatron/train/x.py", "import megatron.energon", "only data may import megatron.energon"),
        ("mimo_megatron/reward/x.py", "from torch import Tensor", "reward never imports torch"),
        ("mimo_megatron/rl/scheduler/x.py", "import torch", "rl.scheduler never imports torch"),
        ("mimo_megatron/rl/scheduler/x.py", "from mimo_megatron.rl import x", "rl.scheduler may import errors"),
        ("mimo_megatron/errors.py", "from mimo_megatron.log import once", "errors may import nothing of ours"),
        ("mimo_megatron/train/x.py", "from mimo_megatron.cli import main", "nothing imports a door"),
        ("mimo_megatron/train/x.py", "from examples.quickstart import demo", "nothing imports a door"),
        ("mimo_megatron/train/x.py", "def f():\n    import torch", "an import inside a function"),
        ("mimo_megatron/misc/x.py", "import torch", "its folder has no layer"),
        ("triton_kernels/x.py", "from mimo_megatron.errors import MimoError", "kernels may import nothing of ours"),
    ],
)
def test_a_planted_bad_import_is_found(path: str, line: str, complaint: str) -> None:
    assert violations({path: "import os\n"}) == [] or path.startswith("mimo_megatron/misc")
    assert any(complaint in problem for problem in violations({path: line}))


def test_a_planted_import_cycle_is_found() -> None:
    sources = {
        "mimo_megatron/data/a.py": "from mimo_megatron.data.b import g",
        "mimo_megatron/data/b.py": "from mimo_megatron.data import c",
        "mimo_megatron/data/c.py": "import os",
    }
    assert violations(sources) == []
    sources["mimo_megatron/data/c.py"] = "import mimo_megatron.data.a"
    assert [problem for problem in violations(sources) if problem.startswith("import cycle")]


def test_a_door_may_import_anything() -> None:
    assert violations({"examples/x.py": "from megatron import core\nfrom mimo_megatron.train import loop"}) == []
