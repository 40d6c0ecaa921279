"""The demo's samples: answers follow from the scene, the data path reads what is written, builds repeat exactly."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.quickstart import build_data, tasks
from examples.quickstart.assets import load_assets
from examples.quickstart.scenes import Mark, Scene
from examples.quickstart.scoring import score
from mimo_megatron.config.presets import preset
from mimo_megatron.data.chat import encode_chat
from mimo_megatron.data.decode import image_size
from mimo_megatron.data.image import smart_resize
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.data.markup import Frame, rescale_messages
from mimo_megatron.data.shards import scan_samples
from mimo_megatron.data.tokenizer import load_tokenizer

SCENE = Scene(np.zeros((100, 56, 3), np.uint8), (Mark(3, (10, 5, 30, 45)), Mark(7, (28, 50, 50, 90))))


def test_answers_are_facts_of_the_scene() -> None:
    """The picture of 100 x 56 is seen as 112 x 56: heights grow by 1.12."""
    asked = tasks.scene_questions(np.random.default_rng(0), SCENE)
    assert set(asked) == {"read", "count", "locate", "point", "add", "subtract"}
    assert [asked[task].gold for task in ("read", "count", "add", "subtract")] == ["3 7", "2", "10", "4"]
    located = tasks.locate(SCENE, SCENE.marks[1])
    assert (located.answer, located.said) == ("<|box|>28,50,50,90<|/box|>", "[28, 56, 50, 101]")
    pointed = tasks.point(SCENE, SCENE.marks[1])
    assert (pointed.answer, pointed.said) == ("<|point|>39,70<|/point|>", "[39, 78]")
    assert tasks.describe(SCENE).said == "3 [10, 6, 30, 50]; 7 [28, 56, 50, 101]"


def test_a_digit_that_stands_twice_is_never_asked_for_by_name() -> None:
    marks = (*SCENE.marks, Mark(3, (0, 60, 10, 80)))
    scene = Scene(SCENE.image_HW3, marks)
    for seed in range(20):
        asked = tasks.scene_questions(np.random.default_rng(seed), scene)
        assert asked["locate"].prompt == "Locate the 7." and asked["point"].prompt == "Point to the 7."
    twins = Scene(SCENE.image_HW3, (Mark(3, (0, 0, 9, 9)), Mark(3, (20, 0, 29, 9))))
    assert set(tasks.scene_questions(np.random.default_rng(0), twins)) == {"read", "count", "add", "subtract"}


@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 10**6), family=st.sampled_from(["caption", "dense", "question", "pair", "text"]))
def test_what_the_data_path_trains_is_what_the_model_should_say_and_scores_full(number: int, family: str) -> None:
    sample = tasks.draw_sample(family, "some", load_assets("held_out"), seed=3, number=number)
    frames = []
    for data in sample.media.values():
        stored = image_size(data)
        resized = smart_resize(*stored, multiple=28, min_pixels=tasks.MIN_PIXELS, max_pixels=tasks.MAX_PIXELS)
        frames.append(Frame(*stored, *resized))
    turns, _ = rescale_messages(build_data.messages(sample, {part: part for part in sample.media}), frames)
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert answers == [question.said for question in sample.questions]
    for question in sample.questions:
        assert score(question.task, question.said, question.gold) == 1.0


def test_clip_samples_decode_to_the_frames_that_were_drawn() -> None:
    sample = tasks.draw_sample("clip", "few", load_assets("train"), seed=1, number=0)
    with av.open(io.BytesIO(sample.media["video0.mp4"])) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == tasks.CLIP_FRAMES_PER_SECOND
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) % tasks.CLIP_FRAMES_PER_SECOND == 0
    (question,) = sample.questions
    assert question.task == "when" and score("when", question.answer, question.gold) == 1.0


def test_samples_of_one_number_differ_between_shares_levels_and_seeds() -> None:
    def drawn(split: str, level: str, seed: int, number: int) -> tasks.DemoSample:
        return tasks.draw_sample("caption", level, load_assets(split), seed=seed, number=number)  # type: ignore[arg-type]

    first = drawn("train", "few", 1, 0)
    assert first == drawn("train", "few", 1, 0)
    for other in (drawn("held_out", "few", 1, 0), drawn("train", "some", 1, 0), drawn("train", "few", 2, 0)):
        assert other.media != first.media


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    sources = {name: build_data.Source(one.family, one.level, 4) for name, one in build_data.SOURCES.items()}
    build_data.build_demo_tokenizer(folder / "tokenizer")
    for name, source in sources.items():
        build_data.build_source(folder / "sources" / name, source, seed=1)
    sets = [build_data.QuestionSet(one.family, one.level, one.tasks, 2) for one in build_data.QUESTIONS]
    build_data.build_questions(folder / "questions", seed=1, question_sets=sets)
    return folder


def test_every_source_encodes_and_trains_only_answers(built: Path) -> None:
    model = preset("tiny-vl")
    tokenizer = load_tokenizer(built / "tokenizer", model.tokens, model.text.vocab_size)
    for name in build_data.SOURCES:
        (shard,) = (built / "sources" / name).iterdir()
        for key, members in scan_samples(shard):
            data = shard.read_bytes()
            files = {one.name: data[one.offset : one.offset + one.num_bytes] for one in members}
            record = json.loads(files.pop("json"))
            assert record["split"] == "train" and record["id"] == key
            names = [part[part["type"]] for turn in record["messages"] if isinstance(turn["content"], list)
                     for part in turn["content"] if part["type"] != "text"]  # fmt: skip
            assert sorted(names) == sorted(files)
            ids, mask = encode_chat(record["messages"], tokenizer, model.tokens, [4] * len(names), system_prompt=None)
            trained = tokenizer.decode(ids[mask].tolist())
            said = "".join(turn["content"] + "<|im_end|>" for turn in record["messages"] if turn["role"] == "assistant")
            assert trained == said


def test_questions_hold_no_answer_and_every_task(built: Path) -> None:
    samples = list(read_jsonl(built / "questions" / "questions.jsonl"))
    assert all([turn["role"] for turn in sample.messages] == ["user"] for sample in samples)
    asked = {(sample.meta["level"], sample.meta["task"]) for sample in samples}
    assert asked == {(one.level, task) for one in build_data.QUESTIONS for task in one.tasks}
    assert len({sample.id for sample in samples}) == len(samples) == 2 * len(asked)


def test_training_answers_are_those_of_the_training_share() -> None:
    found = build_data.training_answers(build_data.QUESTIONS[0], seed=1, num_samples=60)
    assert all(len(answers) == len(golds) > 0 for answers, golds in found.values())
    assert all(score("point", said, gold) == 1.0 for said, gold in zip(*found["point"], strict=True))


def test_a_second_build_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    source = build_data.SOURCES["clip_few"]
    (again,) = build_data.build_source(tmp_path, build_data.Source(source.family, source.level, 4), seed=1)
    assert again.read_bytes() == (built / "sources" / "clip_few" / again.name).read_bytes()
