"""Reinforcement learning by the command line: the shipped base learns sums, is killed and stopped, and goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path

import psutil
import pytest

from tests.commands import Done, finish, start
from tests.repository import ROOT

pytestmark = pytest.mark.slow
BASE = ROOT / "examples/quickstart/base/text"
RECIPE = """
name: test-morl
dir: {dir}
seed: 3
model: {{preset: tiny-vl, vision: null}}
start_from: {base}
data: {{tokenizer: {base}, pack_tokens: 512, pack_patches: 1}}
train:
  steps: {steps}
  precision: fp32
  optimizer: {{weight_decay: 0.0}}
  schedule: {{decay: constant}}
  text: {{lr: 1e-4}}
  checkpoint: {{every_steps: 1}}
rl:
  prompts:
    - {{task: sums, path: {questions}/sums.jsonl, held_out: {questions}/held_out.jsonl}}
    - {{task: lengths, path: {questions}/lengths.jsonl, ratio: 0.5}}
  rollout: {{group_size: 6, groups_per_step: 6, max_new_tokens: 6}}
  sync: {{bucket_mib: 1}}
  evaluation: {{every_steps: 2, questions: 10}}
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    draw = random.Random(1)

    def rows(num: int, task: str) -> str:
        lines = []
        for number in range(num):
            digits = [draw.randint(0, 9) for _ in range(draw.randint(2, 4))]
            said = " ".join(map(str, digits))
            text, gold = (
                (f"Add the digits {said}.", str(sum(digits)))
                if task == "math"
                else (f"How many digits: {said}?", len(digits))
            )
            message = {"role": "user", "content": text}
            row = {"id": str(number), "task": task, "gold": gold, "meta": {"bare_answer": True}, "messages": [message]}
            lines.append(json.dumps(row) + "\n")
        return "".join(lines)

    for name, task, num in (("sums", "math", 60), ("held_out", "math", 10), ("lengths", "count", 60)):
        (folder / f"{name}.jsonl").write_text(rows(num, task))
    return folder


def recipe(folder: Path, questions: Path, steps: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(dir=folder / "run", base=BASE, questions=questions, steps=steps))
    return path


def rl(path: Path, *words: str) -> Done:
    """The command on a recipe, to its end."""
    return finish("mimo_megatron.cli", "rl", path, *words, folder=ROOT, said=path.with_name("said"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def begun(path: Path, until: str, seconds: float = 120, words: Sequence[str] = ()) -> ForkProcess:
    """A run that has come so far that ``until`` exists."""
    process = start("mimo_megatron.cli", "rl", path, *words)
    end = time.monotonic() + seconds
    while not (path.parent / "run" / until).exists():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.05)
    return process


def ended(process: ForkProcess, seconds: float = 120) -> int | None:
    """Its exit code; None where it still runs after ``seconds``."""
    process.join(seconds)
    return process.exitcode


def kill(process: ForkProcess) -> list[psutil.Process]:
    """The processes that it had started, after SIGKILL to it alone."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    return children


def assert_whole(run: Path, steps: int) -> None:
    """Every step once, on policy, and nothing left behind."""
    found = rows(run / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    for row in found:
        numbers = row["numbers"]
        assert numbers["policy/largest_ratio_error"] == 0.0
        assert numbers["policy/largest_gap"] < 1e-3
        assert not any(tag.startswith(("stale/", "unknown/")) for tag in numbers)
        assert {"reward/sums", "length/sums", "entropy/sums", "gap/sums", "zero_variance/sums"} <= set(numbers)
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{steps:06d}"
    assert (run / "report.html").is_file()


def test_a_run_learns_on_policy_and_tells_every_step(tmp_path, questions):
    done = rl(recipe(tmp_path, questions, 3))
    assert done.code == 0, done.err[-2000:]
    run = tmp_path / "run"
    assert_whole(run, 3)
    evaluations = rows(run / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert all(0 <= row["rewards"]["sums"] <= 1 for row in evaluations)
    shown = rows(run / "rollouts.jsonl")
    assert {row["task"] for row in shown} == {"sums", "lengths"}
    assert all(response["text"] for row in shown for response in row["responses"])
    commands = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    assert not [one for one in commands if str(run) in one]  # its reward service has ended


@pytest.mark.parametrize("overrides", [("parallel.tp=2",), ("parallel.pp=2",), ("--ranks", "2")], ids=" ".join)
def test_a_layout_of_two_ranks_samples_and_learns(overrides, tmp_path, questions):
    done = rl(recipe(tmp_path, questions, 2), *overrides)
    assert done.code == 0, done.err[-2000:]
    assert_whole(tmp_path / "run", 2)


def test_vanilla_grpo_takes_its_updates_with_old_and_reference_log_probabilities(tmp_path, questions):
    words = ("rl.algorithm.name=grpo", "rl.algorithm.updates_per_batch=3", "rl.algorithm.kl_weight=0.01")
    done = rl(recipe(tmp_path, questions, 2), *words)
    assert done.code == 0, done.err[-2000:]
    first, second = (row["numbers"] for row in rows(tmp_path / "run/metrics.jsonl"))
    assert 0 < first["policy/largest_ratio_error"] < 1  # the second and third update are off policy
    assert second["policy/largest_gap"] > 0


def test_a_killed_run_goes_on_from_its_last_whole_step_and_ends_at_the_same_count(tmp_path, questions):
    path = recipe(tmp_path, questions, 4)
    for checkpoint in ("step_000001", "step_000002"):
        process = begun(path, f"checkpoints/{checkpoint}")
        time.sleep(random.Random(checkpoint).random())
        children = kill(process)
        assert children and psutil.wait_procs(children, 30)[1] == []  # its services end with it
    done = rl(path)
    assert done.code == 0, done.err[-2000:]
    assert "resumed after step" in done.err
    assert_whole(tmp_path / "run", 4)


def test_no_rank_outlives_a_killed_launcher(tmp_path, questions):
    process = begun(recipe(tmp_path, questions, 40), "checkpoints/step_000001", words=("--ranks", "2"))
    children = kill(process)
    assert len(children) >= 3 and psutil.wait_procs(children, 30)[1] == []  # two ranks, and rank 0's reward service


def test_a_killed_reward_keeper_comes_back_where_it_was_and_its_trainer_never_notices(tmp_path, questions):
    path, services = recipe(tmp_path, questions, 8), tmp_path / "services"
    serve = partial(start, "mimo_megatron.cli", "serve-rl-rewards", path, f"rl.reward.folder={services}")
    keeper = serve()
    try:
        process = begun(path, "checkpoints/step_000001", words=(f"rl.reward.folder={services}",))
        before = json.loads((services / "rewards.json").read_text())
        children = kill(keeper)
        assert children and psutil.wait_procs(children, 30)[1] == []
        steps_before = len(rows(tmp_path / "run/metrics.jsonl"))
        keeper = serve()
        assert ended(process) == 0 and steps_before < 8
        assert json.loads((services / "rewards.json").read_text()) == before
    finally:
        keeper.terminate()
        keeper.join(30)
    assert_whole(tmp_path / "run", 8)
    assert list(services.iterdir()) == []


def test_a_service_for_a_trainer_elsewhere_asks_for_the_folder_in_which_it_is_found(tmp_path, questions):
    for verb, key in (("serve-rl-rewards", "rl.reward.folder"), ("serve-rl-engine", "rl.vllm.folder")):
        words = verb, recipe(tmp_path, questions, 4)
        done = finish("mimo_megatron.cli", *words, folder=ROOT, said=tmp_path / "said", seconds=60)
        assert done.code == 2 and f"has no {key}" in " ".join(done.err.replace("│", " ").split())


def test_a_signal_stops_a_run_between_two_steps_with_its_questions_given_back(tmp_path, questions):
    path = recipe(tmp_path, questions, 40)
    process = begun(path, "checkpoints/step_000001")
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, 60) == 75
    steps = len(rows(tmp_path / "run/metrics.jsonl"))
    assert 1 <= steps < 40
    done = rl(path, f"train.steps={steps + 1}")
    assert done.code == 0, done.err[-2000:]
    assert_whole(tmp_path / "run", steps + 1)


def test_the_reward_service_is_started_again_when_it_dies_and_no_answer_is_worth_nothing_by_it(tmp_path, questions):
    path = recipe(tmp_path, questions, 4)
    process = begun(path, "checkpoints/step_000001")
    (service,) = [
        one for one in psutil.Process(process.pid).children() if "serve-rewards" in one.cmdline()
    ]  # fmt: skip
    service.kill()
    assert ended(process) == 0
    assert_whole(tmp_path / "run", 4)


def test_a_recipe_without_the_section_is_refused_by_name():
    """In an interpreter of its own, as a user starts it."""
    words = [sys.executable, "-m", "mimo_megatron.cli", "rl", str(ROOT / "examples/recipes/tiny/stage1.yaml")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "has no section rl" in done.stderr.replace("\n", " ")
