"""Where kernels are tested: on the GPU where there is one, else in Triton's interpreter, which tests/conftest.py sets.

The interpreter computes bfloat16 wrongly, and says nothing, so that dtype is tested on GPUs only.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else []))


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """An element that no kernel writes cannot pass for right then."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def with_fault(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """The module from its source with every ``right`` replaced; kernels are compiled or interpreted from that text."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert right in text, f"no longer in {module.__name__}: {right}"
    name = f"{module.__name__.rpartition('.')[2]}_with_fault"
    path = folder / f"{name}.py"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty
