"""For every test: one thread per process, reproducible hypothesis examples, GPU tests skipped where there is none.

Without a GPU, Triton's kernels run in its interpreter; where triton is not installed either, their tests are skipped.
"""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked ranks share the cores

import pytest
import torch
from hypothesis import settings

# Before triton is imported, by whatever module does it first; not in the tests of vLLM, whose engines would inherit it.
if not torch.cuda.is_available() and "VLLM_PYTHON" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mimo_megatron import log

settings.register_profile("mimo", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("mimo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """The package's log lines, and its handlers and level as they were before."""
    logger = log.get_logger()
    before = logger.handlers[:], logger.level, logger.propagate
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    yield lines
    logger.handlers[:], logger.level, logger.propagate = before
