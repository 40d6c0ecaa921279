"""A cluster's parts on this machine: engines, rewards and trainer, each a process of its own on loopback.

What SLURM does there, this does here: it starts again what has ended with an error (examples/slurm/morl.sbatch).
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from mimo_megatron.convert.verbs import assemble
from tests.data_fixtures import picture
from tests.repository import ROOT

BASE = ROOT / "examples/quickstart/base"
NUM_ENGINES = 2
FAULTS = {
    "deadline", "worker_lost", "cancelled", "overloaded", "model_unavailable", "media_missing", "internal",
    "no_verdict", "killed_twice",
}  # fmt: skip
"""Reasons that say nothing of a response."""
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
  vllm: {{python: {python}, engines: {engines}, max_model_len: 512}}
  sync: {{bucket_mib: 1, max_mean_gap: 0.0001, max_gap: 0.001}}
"""


def write_run(folder: Path, python: str, steps: int) -> Path:
    """A recipe, its start (the projector is random), questions of text, and questions about pictures."""
    folder.mkdir(parents=True, exist_ok=True)
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
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, base=BASE, steps=steps, python=python, engines=NUM_ENGINES))
    return recipe


@dataclass
class Part:
    """A command that is begun again where it ends with an error."""

    words: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0

    def tend(self) -> None:
        if self.process is None or self.process.poll() not in (None, 0):
            with self.log.open("a") as log:
                command = [sys.executable, "-m", "mimo_megatron.cli", *self.words]
                self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            self.num_starts += 1

    def processes(self) -> list[psutil.Process]:
        """Its own, and all below it."""
        if self.process is None or self.process.poll() is not None:
            return []
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self) -> None:
        below = self.processes()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
        _, alive = psutil.wait_procs(below, timeout=30)
        for one in alive:
            one.kill()


class Topology:
    """``NUM_ENGINES`` engines, one reward service and a trainer of two ranks, which find each other in one folder."""

    def __init__(self, recipe: Path) -> None:
        self.folder = recipe.parent
        services = [f"rl.vllm.folder={self.folder}/services", f"rl.reward.folder={self.folder}/services"]

        def part(name: str, *words: str) -> Part:
            return Part([*words, str(recipe), *services], self.folder / f"{name}.log")

        self.engines = [part(f"engine{number}", "serve-rl-engine") for number in range(NUM_ENGINES)]
        self.rewards = part("rewards", "serve-rl-rewards")
        self.trainer = part("trainer", "rl", "--ranks", "2")
        self.parts = [*self.engines, self.rewards, self.trainer]

    def __enter__(self) -> Self:
        self.tend()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for part in reversed(self.parts):
            part.end()

    def tend(self) -> None:
        for part in self.parts:
            part.tend()

    @property
    def is_done(self) -> bool:
        return self.trainer.process is not None and self.trainer.process.poll() == 0

    def wait(self, is_so: Callable[[], bool], seconds: float) -> None:
        """``AssertionError`` with the trainer's last words where it does not come about."""
        until = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until, self.trainer.log.read_text(errors="replace")[-4000:]
            self.tend()
            time.sleep(0.1)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return rows_of(self.folder / "run/metrics.jsonl")

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        return rows_of(self.folder / "run/rollouts.jsonl")

    def problems(self, steps: int) -> list[str]:
        """What is wrong with a run that is done: a step that is missing or came twice, a token of another policy, a
        response that was scored though nobody could judge it."""
        rows = self.metrics
        found = []
        if [row["step"] for row in rows] != list(range(1, steps + 1)):
            found.append(f"steps {[row['step'] for row in rows]}")
        for row in rows:
            numbers = row["numbers"]
            if any(tag.startswith("stale/") for tag in numbers):
                found.append(f"step {row['step']}: stale tokens")
            if not numbers["canary/mean_gap_0"] < 1e-4 or not numbers["canary/mean_gap_1"] < 1e-4:  # text, a picture
                found.append(f"step {row['step']}: the canary is {numbers}")
            largest, ratio = numbers.get("policy/largest_gap", 0.0), numbers.get("policy/largest_ratio_error", 0.0)
            if not largest < 1e-3 or ratio != 0.0:
                found.append(f"step {row['step']}: log-probabilities {largest} apart, ratio {ratio} from 1")
        for row in self.rollouts:
            for response in row["responses"]:
                if response["reason"] in FAULTS:
                    found.append(f"step {row['step']}: a response was scored for the reason {response['reason']!r}")
        return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
