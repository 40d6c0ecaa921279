"""``rollouts.jsonl``: what a response said and what its rule read of it, and that the report draws it where it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimo_megatron.config.load import dump_resolved
from mimo_megatron.config.presets import preset
from mimo_megatron.config.rl import PromptSourceConfig, RLConfig, RolloutConfig
from mimo_megatron.config.run import DataConfig, RunConfig, TrainConfig
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.report.run_report import write_report
from mimo_megatron.rl.collect import Collected, Sampler
from mimo_megatron.rl.curves import ROLLOUTS, Curves
from mimo_megatron.rl.groups import RewardedGroup
from mimo_megatron.rl.questions import QuestionReader
from mimo_megatron.rl.scheduler.step import StepReport, TaskReport
from mimo_megatron.train.metrics import MetricsWriter
from mimo_megatron.types import Rollout
from tests.data_fixtures import picture
from tests.report_fixtures import Page
from tests.repository import ROOT

TOKENIZER = ROOT / "examples/quickstart/base/text"
MODEL = preset("tiny-vl")
BOX = [10, 5, 30, 45]
CLICK = {"action": "click", "start_box": BOX}


def written(run: Path, task: str, gold: Any, *texts: str) -> dict[str, Any]:
    """The row of one group of these responses to a question about a picture of 56 x 100 pixels, shown as 56 x 112."""
    (run / "a.png").write_bytes(picture(100, 56))
    asked = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where?"}]
    row = {"id": "q", "task": task, "gold": gold, "messages": [{"role": "user", "content": asked}]}
    (run / "rows.jsonl").write_text(json.dumps(row))
    data = DataConfig(tokenizer=TOKENIZER, pack_tokens=100, pack_patches=100)
    rollout = RolloutConfig(groups_per_step=1, max_new_tokens=50)
    rl = RLConfig(prompts=(PromptSourceConfig(task="where", path=run / "rows.jsonl"),), rollout=rollout)
    config = RunConfig(name="r", dir=run, model=MODEL, data=data, train=TrainConfig(steps=1), rl=rl)
    dump_resolved(config, run / "config.yaml")
    (question,) = QuestionReader(MODEL, data, run / "media").read(run / "rows.jsonl", "where", None)
    tokenizer = load_tokenizer(TOKENIZER, MODEL.tokens, MODEL.text.vocab_size)
    sampler = Sampler(None, None, None, tokenizer, MODEL.tokens.ends, 50)  # type: ignore[arg-type]  # nothing is asked
    rollouts = []
    for place, text in enumerate(texts):
        ids_T = np.array([*tokenizer.encode(text), MODEL.tokens.turn_end])
        rollouts.append(Rollout("1-0", place, ids_T, np.zeros(len(ids_T), np.float32), ids_T * 0, "stop"))
    rewards, reasons = (0.5,) * len(texts), ("partial",) * len(texts)
    group = RewardedGroup(question.id, "where", 10, 4, tuple(rollouts), rewards, reasons)
    report = StepReport({"where": TaskReport(1, 1, 1, 0, 0, 0, 0, False, 0.5)})
    with MetricsWriter(run, config, 1, False).open_for(0) as metrics:
        curves = Curves(run, config, metrics, {question.id: question}, sampler)
        curves.open_for(0)
        curves.step(1, Collected((group,), (group,), report, {}), None, {}, (), {}, 1.0)
    (found,) = map(json.loads, (run / ROLLOUTS).read_text().splitlines())
    return found


def test_boxes_are_written_as_their_rule_read_them_in_pixels_of_the_stored_picture(tmp_path):
    texts = ["[14, 56, 28, 84]", '[{"bbox_2d": [0, 0, 56, 112], "label": "x"}]', "[28, 84, 14, 56]", "no box"]
    row = written(tmp_path, "box", [BOX], *texts)
    assert [one["text"] for one in row["responses"]] == texts
    assert row["shapes"] == [BOX]
    assert [one["shapes"] for one in row["responses"]] == [[[14, 50, 28, 75]], [[0, 0, 56, 100]], [], []]


@pytest.mark.parametrize(
    ("task", "gold", "text"),
    [("point", BOX, "[14, 56]"), ("gui", CLICK, '{"action": "click", "start_point": [14, 56]}')],
)
def test_points_are_written_with_the_box_that_they_must_fall_into(tmp_path, task, gold, text):
    row = written(tmp_path, task, gold, text, "nothing")
    assert row["shapes"] == [BOX]
    assert [one["shapes"] for one in row["responses"]] == [[[14, 50]], []]


def test_a_task_that_is_not_in_pixels_has_no_shapes(tmp_path):
    row = written(tmp_path, "count", 4, "[14, 56, 28, 84]")
    assert row["shapes"] == [] and row["responses"][0]["shapes"] == []


def test_the_report_draws_what_was_written(tmp_path):
    written(tmp_path, "box", [BOX], "[14, 56, 28, 84]")
    page = Page(write_report(tmp_path))
    shapes = [attrs for tag, attrs in page.tags if attrs.get("class", "").startswith("shape ")]
    assert [one["class"] for one in shapes] == ["shape gold", "shape said1"]
    assert [float(shapes[1][name]) for name in ("x", "y", "width", "height")] == [14, 50, 14, 25]
