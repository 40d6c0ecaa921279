"""The whole cycle on the real vLLM: sampled by it, judged, learnt from, and the new weights proven to be there."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.repository import ROOT
from tests.vllm.topology import write_run

pytestmark = pytest.mark.vllm
STEPS = 5


def test_five_steps_with_an_engine_killed_on_the_way_stay_on_policy(tmp_path):
    folder, recipe = tmp_path, write_run(tmp_path, os.environ["VLLM_PYTHON"], STEPS)
    log = folder / "log.txt"
    with log.open("w") as out:
        command = [sys.executable, "-m", "mimo_megatron.cli", "rl", str(recipe)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        until = time.monotonic() + 400
        while not (folder / "run/checkpoints/step_000002").exists():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.1)
        engines = [one for one in psutil.Process(process.pid).children() if "vllm_process" in " ".join(one.cmdline())]
        assert len(engines) == 2
        engines[0].send_signal(signal.SIGKILL)
        assert process.wait(400) == 0, log.read_text()[-3000:]
    rows = [json.loads(line)["numbers"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    for numbers in rows:
        assert not any(tag.startswith("stale/") for tag in numbers)
        assert numbers["canary/mean_gap_0"] < 1e-4 and numbers["canary/mean_gap_1"] < 1e-4  # text, and a picture
        if "policy/largest_gap" in numbers:
            assert numbers["policy/largest_gap"] < 1e-3 and numbers["policy/largest_ratio_error"] == 0.0
    assert "has been replaced" in log.read_text()
    gaps = {tag: value for numbers in rows for tag, value in numbers.items() if tag.startswith("gap/")}
    print(f"engine and trainer apart, mean log-probability: {gaps}")
