"""The road of a reward model: real wrong answers, pairs, training, held-out accuracy, calibration, two servers, export.

The weaker checkpoints are the demo's: its language model for text, and for pictures its start, where the projector is
random. Accuracies were 94 % and 94 % when this was written; 80 % is asked for.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from examples.quickstart.base import SHIPPED
from mimo_megatron.config.calibration import read_calibration
from mimo_megatron.reward.client import SyncRewardClient
from mimo_megatron.reward.wire import ScoreItem
from tests.commands import finish
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RECIPES = ROOT / "examples/recipes/tiny"
QUESTIONS = {"text": (5000, 400), "multimodal": (1500, 250)}
OVERRIDES = {"text": ("train.steps=200",), "multimodal": ("train.steps=60", "start_from=start")}


def run(folder: Path, *words: object) -> str:
    """What the module printed; run as a user would, from a folder of its own."""
    done = finish(*map(str, words), folder=folder, said=folder / "said", seconds=600)
    assert done.code == 0, done.out[-2000:] + done.err[-4000:]
    return done.out


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward_models")
    (folder / "examples").symlink_to(ROOT / "examples")
    parts = SHIPPED / "text", SHIPPED / "vision", "start"
    run(folder, "mimo_megatron.cli", "convert", "assemble", *parts, "--dtype", "fp32", "--name", "tiny-vl")
    return folder


@pytest.fixture(scope="module", params=["text", "multimodal"])
def trained(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Path, str]:
    """Kind, calibrated checkpoint, and what the evaluation printed."""
    kind = request.param
    weaker, recipe = SHIPPED / "text" if kind == "text" else "start", RECIPES / f"reward_model_{kind}.yaml"
    num_train, num_held_out = QUESTIONS[kind]
    pairs = "--kind", kind, "--train", num_train, "--held-out", num_held_out
    run(folder, "examples.quickstart.preferences", weaker, f"demo/pairs/{kind}", *pairs)
    run(folder, "mimo_megatron.cli", "data", "index", recipe)
    run(folder, "mimo_megatron.cli", "train", recipe, *OVERRIDES[kind], "--ranks", 2)
    (checkpoint,) = (folder / f"runs/tiny/reward_model_{kind}/checkpoints").glob("step_*")
    held_out = "--pairs", f"demo/pairs/{kind}/held_out.jsonl", "--out", f"{kind}.jsonl", "--calibrate"
    told = run(folder, "mimo_megatron.cli", "reward-model", "evaluate", checkpoint, *held_out)
    return kind, checkpoint, told


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_four_of_five_held_out_pairs_are_ranked_right_and_exchanged_ones_wrong(trained, folder: Path) -> None:
    kind, checkpoint, told = trained
    found = read_calibration(checkpoint)
    assert found.accuracy is not None and found.accuracy > 0.8, told
    assert f"{found.accuracy:.1%} of {found.num_pairs}" in told and found.num_pairs > 100
    pairs = rows(folder / f"demo/pairs/{kind}/held_out.jsonl")
    exchanged = [{**one, "chosen": one["rejected"], "rejected": one["chosen"]} for one in pairs]
    path = folder / f"demo/pairs/{kind}/exchanged.jsonl"
    path.write_text("\n".join(map(json.dumps, exchanged)) + "\n")
    told = run(folder, "mimo_megatron.cli", "reward-model", "evaluate", checkpoint, "--pairs", path)
    assert float(told.partition("%")[0]) == pytest.approx(100 * (1 - found.accuracy), abs=0.1)


def test_another_layout_gives_the_same_scores(trained, folder: Path) -> None:
    kind, checkpoint, _ = trained
    layout, out = ("parallel.tp=2", "parallel.cp=2"), folder / f"{kind}_tp2_cp2.jsonl"
    pairs = "--pairs", folder / f"demo/pairs/{kind}/held_out.jsonl", "--out", out
    run(folder, "mimo_megatron.cli", "reward-model", "evaluate", checkpoint, *layout, *pairs)
    for one, other in zip(rows(folder / f"{kind}.jsonl"), rows(out), strict=True):
        assert (one["chosen"], one["rejected"]) == pytest.approx((other["chosen"], other["rejected"]), abs=1e-3)


@contextlib.contextmanager
def serving(folder: Path, *words: object) -> Iterator[str]:
    """The address of a server that runs while the block lasts."""
    command = [sys.executable, "-W", "ignore", "-m", "mimo_megatron.cli", *map(str, words), "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
        assert process.wait(30) == 0


def picture(folder: Path, root: Path, name: str) -> str:
    """The picture's SHA-256, under which it now lies in ``root``."""
    content = (folder / name).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    (root / sha256).write_bytes(content)
    return sha256


def items(folder: Path, kind: str, root: Path, count: int) -> list[ScoreItem]:
    """Both responses of the first pairs, as a rollout would send them."""
    asked = []
    for pair in rows(folder / f"demo/pairs/{kind}/held_out.jsonl")[:count]:
        (turn,) = pair["messages"]
        for part in turn["content"]:
            if part["type"] == "image":
                part["image"] = picture(folder / f"demo/pairs/{kind}", root, part["image"])
        for side in ("chosen", "rejected"):
            response = f"<think>let me see</think>{pair[side]}"
            tree = {
                "id": f"{pair['id']}-{side}",
                "task": f"rm_{kind}",
                "response": response,
                "meta": {"messages": [turn]},
            }
            asked.append(ScoreItem.model_validate(tree))
    return asked


def test_the_service_gives_the_calibrated_rewards_of_the_evaluation(trained, folder: Path) -> None:
    kind, checkpoint, _ = trained
    root = folder / f"{kind}_pictures"
    root.mkdir()
    asked = items(folder, kind, root, 40)
    calibration = read_calibration(checkpoint)
    scores = [row[side] for row in rows(folder / f"{kind}.jsonl")[:40] for side in ("chosen", "rejected")]
    with (
        serving(folder, "serve-reward-model", checkpoint, "--image-root", root) as model,
        serving(folder, "serve-rewards", "--workers", 1, "--reward-model", f"{kind}={model}") as service,
        SyncRewardClient(service) as client,
    ):
        results = list(client.score_all(asked, deadline_seconds=60))
        assert {result.status for result in results} == {"ok"}
        rewards = [result.reward for result in results]
        assert rewards == pytest.approx([calibration.reward(score) for score in scores], abs=1e-4)
        if kind == "multimodal":
            (root / next(root.iterdir()).name).unlink()
            missing = list(client.score_all([one.model_copy(update={"id": "again" + one.id}) for one in asked]))
            lost = {result.reason for result in missing if result.status == "unknown"}
            assert lost == {"media_missing"} and any(result.status == "ok" for result in missing)
        hostile = asked[0].model_copy(update={"id": "hostile", "response": "<|box|>1,2<|/box|> <|im_end|> \ud7ff"})
        (result,) = client.score_all([hostile])
        assert (result.status, result.reward, result.reason) == ("invalid", 0.0, "unreadable")
        answer = httpx.post(f"{model}/v1/rewards", json={"items": []})
        assert answer.status_code == 422 and answer.json()["error"]["code"] == "invalid"


def test_the_export_is_a_sequence_classifier_that_transformers_runs(trained, folder: Path) -> None:
    kind, checkpoint, _ = trained
    export = folder / f"{kind}_hf"
    run(folder, "mimo_megatron.cli", "convert", "to-hf", checkpoint, export)
    assert read_calibration(export) == read_calibration(checkpoint)
    if kind == "multimodal":  # no such class there; tests/parity/test_reward_model.py compares its parts
        architectures = json.loads((export / "config.json").read_text())["architectures"]
        assert architectures == ["Qwen2_5_VLForSequenceClassification"]
        return
    model = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    # AutoTokenizer takes Qwen's own splitting for every qwen2 model, and the demo's tokenizer has another.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    pairs, ours = rows(folder / "demo/pairs/text/held_out.jsonl"), rows(folder / "text.jsonl")
    for pair, scored in list(zip(pairs, ours, strict=True))[:20]:
        chat = [*pair["messages"], {"role": "assistant", "content": pair["chosen"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        with torch.no_grad():
            token_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            assert model(token_ids).logits.item() == pytest.approx(scored["chosen"], abs=1e-3)
