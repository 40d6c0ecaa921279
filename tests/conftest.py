"""For every test: one thread per process, reproducible hypothesis examples, GPU tests skipped where there is none."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked ranks share the cores

import pytest
import torch
from hypothesis import settings

settings.register_profile("mimo", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("mimo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
