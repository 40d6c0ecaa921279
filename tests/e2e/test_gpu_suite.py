"""The whole GPU suite in rehearsal: every section of the command at tiny size, Triton's kernels in the interpreter."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the suite measures the kernels: pip install triton")

from tests.repository import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the suite itself is run")
def test_the_suite_rehearsed_on_a_cpu_fills_every_section(tmp_path: Path) -> None:
    before = sorted(RESULTS.iterdir())
    command = [sys.executable, "benchmarks/gpu_suite.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (path,) = tmp_path.glob("*.json")
    tree = json.loads(path.read_text())
    assert done.returncode == 0, done.stdout + done.stderr + json.dumps(tree["sections"], indent=1)[-4000:]
    assert path.name.startswith("rehearsal-cpu-") and tree["rehearsal"]
    assert sorted(RESULTS.iterdir()) == before
    data = {name: section["data"] for name, section in tree["sections"].items()}

    ours = [row for row in data["correctness"]["rows"] if row["ours"] and "absent" not in row]
    assert {row["way"] for row in ours} == {"triton", "sdpa", "ops"} and all(row["ok"] for row in ours)
    assert [row["class"] for row in data["packs"]["packs"]] == ["8K", "8K", "32K"]
    assert all(row["images"] for row in data["packs"]["packs"])

    assert_steps_are_told(data["train"])
    timed = [row for row in data["kernels"]["rows"] if "forward" in row]
    assert {(row["op"], row["way"]) for row in timed} >= {
        ("vision attention", "triton"), ("vision attention", "reference"), ("text attention", "sdpa"),
        ("RMSNorm", "torch.compile"), ("SwiGLU", "ops"), ("rotary turn", "ops"), ("cross entropy", "ops"),
    }  # fmt: skip
    assert data["fp8"]["rows"][0]["fp8"]["with_casts"]["ms"] > 0

    page = path.with_suffix(".md").read_text()
    assert "no number on this page is a measurement" in page and "8K, vision attention triton" in page
    again = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py", "--render", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert again.stdout == page


def assert_steps_are_told(train: dict[str, Any]) -> None:
    assert [row["variant"].split(", recompute")[0] for row in train["rows"]] == [
        f"{name}, vision attention {way}" for name in ("8K", "32K") for way in ("sdpa", "triton")
    ]
    for row in train["rows"]:
        rate = row["flops"]["total"] / row["packs"] / row["step_seconds"]
        assert math.isclose(row["tflops"], rate / 1e12, rel_tol=1e-9)
        assert math.isclose(row["flops"]["vision"] + row["flops"]["text"], row["flops"]["total"])
        assert min(row["mfu_of_gemm"], row["encoder_seconds"], row["planned_bytes"]) > 0
        # The same packs again and again, from the seed's weights: whatever is wrong with a step shows here.
        assert all(last < first for first, last in zip(row["first_losses"], row["last_losses"], strict=True))
    assert [len(one["kernels"]) for one in train["profiles"]] == [15, 15]
