"""The whole cycle on the real vLLM: sampled by it, judged, learnt from, and the new weights proven to be there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mimo_megatron.convert.verbs import assemble
from tests.data_fixtures import picture
from tests.repository import ROOT

pytestmark = pytest.mark.vllm
BASE = ROOT / "examples/quickstart/base"
STEPS = 5
RECIPE = """
name: test-vllm
dir: {folder}/run
seed: 3
model: {{preset: tiny-vl}}
start_from: {folder}/start
data:
  {{tokenizer: {base}/text, pack_tokens: 512, pack_patches: 2048, max_pixels: 50176, video: {{max_total_tokens: 64}}}}
train:
  steps: {steps}
  precision: fp32
  optimizer: {{weight_decay: 0.0}}
  schedule: {{decay: constant}}
  vision: {{lr: 1e-4}}
  projector: {{lr: 1e-3}}
  text: {{lr: 1e-4}}
  checkpoint: {{every_steps: 1}}
rl:
  prompts:
    - {{task: sums, path: {folder}/sums.jsonl}}
    - {{task: seen, path: {folder}/seen.jsonl}}
  rollout: {{engine: vllm, group_size: 4, groups_per_step: 4, max_new_tokens: 6, refill_budget: 4}}
  vllm: {{python: {python}, engines: 2, max_model_len: 512}}
  sync: {{bucket_mib: 1, max_mean_gap: 0.0001, max_gap: 0.001}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A start (its projector is random), questions of text, and questions about pictures."""
    folder = tmp_path_factory.mktemp("cycle")
    assemble(BASE / "text", BASE / "vision", folder / "start", seed=1)
    draw = random.Random(1)
    sums, seen = [], []
    for number in range(40):
        digits = [draw.randint(0, 9) for _ in range(2)]
        (folder / f"{number}.png").write_bytes(picture(56 + 28 * (number % 3), 84, seed=number))
        common = {"id": str(number), "meta": {"bare_answer": True}}
        content = f"Add the digits {digits[0]} {digits[1]}."
        sums.append(common | dict(task="math", gold=str(sum(digits)), messages=[dict(role="user", content=content)]))
        parts = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "How many digits?"}]
        seen.append(common | dict(task="count", gold=draw.randint(1, 4), messages=[dict(role="user", content=parts)]))
    for name, rows in (("sums", sums), ("seen", seen)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE.format(folder=folder, base=BASE, steps=STEPS, python=os.environ["VLLM_PYTHON"])
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def test_five_steps_with_an_engine_killed_on_the_way_stay_on_policy(folder):
    log = folder / "log.txt"
    with log.open("w") as out:
        command = [sys.executable, "-m", "mimo_megatron.cli", "rl", str(folder / "recipe.yaml")]
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
