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
    assert {row["way"] for row in ours} == {"triton", "sdpa", "ops", "model", "logits", "chunked"}
    assert all(row["ok"] for row in ours)
    assert [row["class"] for row in data["packs"]["packs"]] == ["8K", "32K", "8K text"]
    assert [row["images"] > 0 for row in data["packs"]["packs"]] == [True, True, False]

    assert_steps_are_told(data["train"])
    timed = [row for row in data["kernels"]["rows"] if "forward" in row]
    assert {(row["op"], row["way"]) for row in timed} >= {
        ("vision attention", "triton"), ("vision attention", "reference"), ("text attention", "sdpa"),
        ("RMSNorm", "torch.compile"), ("SwiGLU", "ops"), ("rotary turn", "ops"), ("cross entropy", "ops"),
        ("window order", "model"), ("pack order", "model"), ("splice", "model"),
    }  # fmt: skip
    assert {row["case"] for row in timed} >= {"full windows", "windows, 8K pack", "frames, 32K pack"}
    assert_head_is_told(data["head"]["rows"])
    assert {row["way"]: row["difference"] < 1e-5 for row in data["optimizer"]["rows"] if "ms" in row} == {
        "AdamW foreach": True, "AdamW fused": True,
    }  # fmt: skip
    assert data["fp8"]["rows"][0]["fp8"]["with_casts"]["ms"] > 0

    verdicts = {one["target"]: one["verdict"] for one in tree["targets"]}
    assert set(verdicts.values()) == {"rehearsal", "not measured"} and len(verdicts) == 14
    assert all("flash-attn 2" in name for name, verdict in verdicts.items() if verdict == "not measured")
    page = path.with_suffix(".md").read_text()
    assert "no number on this page is a measurement" in page and "8K, vision triton, recompute none" in page
    assert all(name in page and name in done.stdout for name in verdicts)
    again = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py", "--render", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert again.stdout == page


def assert_steps_are_told(train: dict[str, Any]) -> None:
    """All but varlen and flash, which take half precision, and Transformer Engine. Which is best is luck."""
    measured = {row["variant"].removesuffix(", recompute none"): row for row in train["rows"] if "step_seconds" in row}
    single = ("baseline", "vision triton", "text triton", "head triton", "head chunked", "fp8 scaled_mm")
    assert any("fp8 scaled_mm in all parts" in name for name in measured)
    assert measured.keys() >= {f"8K, {name}" for name in single} | {"32K, baseline"}
    assert len([row for row in measured.values() if row["class"] == "8K text"]) == 1
    left_out = {row["variant"]: row["failed"] for row in train["rows"] if "step_seconds" not in row}
    absent = ("varlen", "flash", "transformer-engine")
    assert len(left_out) == 5 and all(any(way in name for way in absent) for name in left_out), left_out
    for row in measured.values():
        rate = row["flops"]["total"] / row["packs"] / row["step_seconds"]
        assert row["wrong"] == "" and math.isclose(row["tflops"], rate / 1e12, rel_tol=1e-9)
        assert math.isclose(row["flops"]["vision"] + row["flops"]["text"], row["flops"]["total"])
        assert min(row["mfu_of_gemm"], row["planned_bytes"]) > 0
        assert (row["encoder_seconds"] > 0) == (row["class"] != "8K text")
        # The same packs again and again, from the seed's weights: whatever is wrong with a step shows here.
        assert all(last < first for first, last in zip(row["first_losses"], row["last_losses"], strict=True))
    assert measured["8K, fp8 scaled_mm"]["differences"]["tokens"] > 1e-3  # FP8 is there
    assert all(len(one["kernels"]) == 15 for one in train["profiles"]) and train["profiles"]
    assert all(one["host_ms"] > 0 and one["device_ms"] > 0 for one in train["encoder"]) and train["encoder"]


def assert_head_is_told(rows: list[dict[str, Any]]) -> None:
    told = {(row["way"], row["fraction"]) for row in rows if "ms" in row}
    assert told == {(way, part) for way in ("logits", "triton", "chunked") for part in (1.0, 0.5, 0.25, 0.125)} | {
        ("torch.compile", 1.0)
    }
    counted = {row["way"]: row["logits_bytes"] / row["table_bytes"] for row in rows if row.get("logits_bytes")}
    assert counted["chunked"] < 1 <= counted["logits"]
