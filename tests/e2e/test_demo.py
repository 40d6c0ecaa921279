"""The demo in miniature, every part of it: base, data, assembly, stages, export, answers by transformers, table."""

import ast
import inspect
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM

from examples.quickstart import answer, demo
from examples.quickstart.answer import image_inputs, video_inputs
from examples.quickstart.base import base_recipes, train_base
from examples.quickstart.build_data import QuestionSet, build_demo_tokenizer, build_questions
from examples.quickstart.checks import CheckFailed, check_answers, check_frozen, check_loss
from examples.quickstart.protocol import Protocol
from examples.quickstart.result import Result, result_table, results
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import VideoConfig
from mimo_megatron.convert.checkpoint_io import CheckpointReader, CheckpointWriter
from mimo_megatron.data.image import encode_image
from mimo_megatron.data.video import encode_video
from mimo_megatron.types import EncodedMedia
from tests.pixels import normalized
from tests.repository import ROOT

SMALL = "model: {preset: tiny-vl, text: {num_layers: 2}, vision: {depth: 2, full_attention_layers: [1]}}"
BASE = f"""
name: base
dir: runs/tiny/base1
{SMALL}
data:
  sources: [{{path: demo/base/sources/caption_tile}}, {{path: demo/base/sources/text}}]
  tokenizer: demo/base/tokenizer
  pack_tokens: 512
  pack_patches: 1536
  max_pixels: 200704
  video: {{max_total_tokens: 128}}
train:
  steps: 4
  packs_per_step: 2
  precision: fp32
  vision: {{lr: 1e-3}}
  projector: {{lr: 1e-3}}
  text: {{lr: 1e-3}}
"""
STAGE_1 = """
base: base.yaml
name: first
dir: runs/tiny/first
start_from: runs/tiny/start
data:
  sources: [{path: demo/data/sources/caption_tile}, {path: demo/data/sources/clip_one}]
  tokenizer: demo/data/tokenizer
train: {steps: 20, vision: {lr: null}, projector: {lr: 1e-2}, text: {lr: 1e-2}}
"""
STAGE_2 = """
base: stage1.yaml
name: second
dir: runs/tiny/second
start_from: runs/tiny/first/checkpoints/step_000020
data: {sources: [{path: demo/data/sources/caption_tile}]}
train: {steps: 10, vision: {lr: 3e-3}, projector: {lr: null}, text: {lr: 3e-3}}
"""
QUESTION_SETS = (
    QuestionSet("question", "one", ("read", "locate"), 3),
    QuestionSet("pair", "few", ("read_pair",), 2),
    QuestionSet("clip", "one", ("when",), 2),
    QuestionSet("text", "one", ("text",), 2),
)


@dataclass(frozen=True)
class Ran:
    folder: Path
    found: list[Result]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The folder in which a small base was trained and the demo run on it, and what it found."""
    folder = tmp_path_factory.mktemp("demo")
    for name, text in (("base", BASE), ("stage1", STAGE_1), ("stage2", STAGE_2)):
        (folder / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        protocol = Protocol()
        train_base(protocol, Path("base"), [Path("base.yaml")], {"caption_tile": 60, "text": 60})
        found = demo.run(
            protocol,
            Path("base"),
            recipes=(Path("stage1.yaml"), Path("stage2.yaml")),
            num_samples={"caption_tile": 150, "clip_one": 6},
            question_sets=QUESTION_SETS,
            num_floor_samples=20,
        )
        yield Ran(folder, found)


@pytest.mark.slow
def test_the_demo_runs_from_nothing_to_a_table_and_a_report(ran: Ran) -> None:
    assert [(one.level, one.task, one.num_questions) for one in ran.found] == [
        ("one", "read", 3), ("one", "locate", 3), ("few", "read_pair", 2), ("one", "when", 2), ("one", "text", 2)
    ]  # fmt: skip
    assert all(list(one.scores) == ["start", "stage 1", "stage 2"] for one in ran.found)
    journey = (ran.folder / "runs/tiny/journey.html").read_text()
    assert "one: digits read" in journey and "second" in journey
    assert "one: digits read" in (ran.folder / "runs/tiny/second/report.html").read_text()


@pytest.mark.slow
def test_the_base_is_kept_without_its_projector_and_both_parts_start_the_demo(ran: Ran) -> None:
    trained = CheckpointReader(ran.folder / "runs/tiny/base1/checkpoints/step_000004")
    start = CheckpointReader(ran.folder / "runs/tiny/start")
    for name in start.tensors:
        is_kept = start.read(name).equal(trained.read(name).to(torch.bfloat16).float())
        assert is_kept != name.startswith("projector."), name
    names = {part: set(load_file(ran.folder / f"base/{part}/model.safetensors")) for part in ("text", "vision")}
    assert not names["text"] & names["vision"] and not any("merger" in name for name in names["vision"])
    AutoModelForCausalLM.from_pretrained(ran.folder / "base/text")
    manifest = json.loads((ran.folder / "base/MANIFEST.json").read_text())
    assert manifest["phases"][0]["steps"] == 4 and len(manifest["phases"][0]["loss_of_every_100_steps"]) == 1
    assert set(manifest["sha256"]) == {"text/model.safetensors", "vision/model.safetensors"}


@pytest.mark.slow
def test_a_frozen_module_that_changed_and_a_trained_one_that_did_not_are_found(ran: Ran, tmp_path: Path) -> None:
    config = load_recipe(ran.folder / "stage1.yaml")
    before, after = ran.folder / "runs/tiny/start", ran.folder / "runs/tiny/first/checkpoints/step_000020"
    assert check_frozen(before, after, config)["vision"][0] == 0
    reader = CheckpointReader(after)
    with CheckpointWriter(tmp_path, reader.model) as writer:
        for name in reader.tensors:
            tensor = reader.read(name).clone()
            if name == "vision.blocks.1.norm2.weight":
                tensor[3] = torch.nextafter(tensor[3], torch.tensor(9.0))
            writer.add(name, tensor)
    with pytest.raises(CheckFailed, match=r"vision is frozen, but 1 of its tensors changed: vision.blocks.1.norm2"):
        check_frozen(before, tmp_path, config)
    with pytest.raises(CheckFailed, match="projector is trained, but none"):
        check_frozen(before, before, config)


def test_a_loss_that_rises_is_found(tmp_path: Path) -> None:
    def write(losses: list[float], tokens: int = 9) -> None:
        rows = [{"loss": loss, "num_trained_tokens": tokens} for loss in losses]
        rows[-1]["num_trained_tokens"] = 9
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write([3.0] * 33 + [9.0] * 34 + [2.0] * 33)
    assert check_loss(tmp_path) == (3.0, 2.0)
    write([2.0] * 33 + [1.0] * 34 + [3.0] * 33)
    with pytest.raises(CheckFailed, match="did not fall"):
        check_loss(tmp_path)
    write([2.0, 9.0, 1.0, 4.0], tokens=3)  # the first third is one step of the four
    with pytest.raises(CheckFailed, match=r"2\.0000 in the first third, 4\.0000"):
        check_loss(tmp_path)
    write([2.0] * 5 + [4.0, 1.0], tokens=1)  # the last two steps have 1 and 9 tokens
    assert check_loss(tmp_path) == (2.0, 1.3)


def test_an_answer_that_differs_between_the_two_clients_is_found() -> None:
    ours = [{"id": "a", "answer": "3"}, {"id": "b", "answer": "4 5"}]
    assert check_answers(ours, {"a": "3", "b": "4 5"}) == 2
    with pytest.raises(CheckFailed, match="b: generate says '4 5', transformers '4  5'"):
        check_answers(ours, {"a": "3", "b": "4  5"})


def test_results_stand_beside_chance_and_the_best_constant_answer() -> None:
    questions = [{"id": str(i), "task": "count", "level": "few", "gold": gold} for i, gold in enumerate("1122")]
    answers = {"start": dict.fromkeys("0123", "7"), "stage 1": dict(zip("0123", "1121", strict=True))}
    floors = {("few", "count"): (list("111222223"), list("111222223"))}
    (one,) = results(questions, answers, floors)
    assert one.scores == {"start": 0.0, "stage 1": 0.75} and one.constant == 0.5 and 0.2 < one.chance < 0.6
    assert one.is_learnt and result_table([one]).row_count == 1
    demo.check_headlines([one])
    (poor,) = results(questions, {"start": answers["start"], "stage 1": dict.fromkeys("0123", "2")}, floors)
    with pytest.raises(CheckFailed, match="few: count"):
        demo.check_headlines([poor])


def test_the_client_makes_the_pixels_that_the_model_was_trained_on(tmp_path: Path) -> None:
    build_demo_tokenizer(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    sets = (QuestionSet("question", "some", ("read",), 3), QuestionSet("clip", "few", ("when",), 3))
    build_questions(tmp_path / "questions", question_sets=sets, seed=1)
    vision = preset("tiny-vl").vision
    assert vision is not None

    limits = dict(min_pixels=3136, max_pixels=200704)

    def same(patches_PC: torch.Tensor, grid: torch.Tensor, ours: EncodedMedia) -> None:
        assert tuple(grid.tolist()) == ours.grid
        normal_PC = normalized(torch.from_numpy(ours.patches_PC))
        assert (patches_PC - normal_PC).abs().max() < 1e-5

    for path in (tmp_path / "questions").glob("*.jpg"):
        same(*image_inputs(processor, path), encode_image(path.read_bytes(), vision, **limits))
    for path in (tmp_path / "questions").glob("*.mp4"):
        same(*video_inputs(processor, path), encode_video(path.read_bytes(), vision, VideoConfig(), min_pixels=3136))


def test_the_answering_process_imports_nothing_of_the_project() -> None:
    for file in (Path(inspect.getfile(answer)), *(Path(demo.__file__).parents[i] / "__init__.py" for i in (0, 1))):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("mimo_megatron", "examples", "tests")) for name in names), file


def test_every_base_phase_starts_from_the_last_checkpoint_of_the_one_before() -> None:
    configs = [load_recipe(recipe) for recipe in base_recipes()]
    assert configs[0].start_from is None and len(configs) > 1
    for before, after in itertools.pairwise(configs):
        assert after.start_from == before.dir / "checkpoints" / f"step_{before.train.steps:06d}"


def test_the_demo_has_data_for_every_source_of_its_stages() -> None:
    named = {source.path for recipe in demo.STAGES for source in load_recipe(recipe).data.sources}
    assert {path.name for path in named} == set(demo.NUM_SAMPLES)
    assert {path.parent for path in named} == {demo.DATA / "sources"}
