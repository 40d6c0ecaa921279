"""Builds the demo's data: tokenizer, training sources as WebDataset tars, and held-out questions with their gold.

Everything is a function of the seed. Training sources hold nothing but training digits and training photographs; the
questions hold nothing but held-out ones.

    python -m examples.quickstart.build_data OUT [--seed 1] [--scale 1.0] [--sources caption_one text ...]
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.assets import Assets, load_assets
from examples.quickstart.tasks import FAMILIES, DemoSample, draw_sample
from examples.quickstart.tokenizer import build_tokenizer, save_tokenizer
from mimo_megatron.config.presets import preset
from mimo_megatron.data.shards import ShardSample, write_shards

SAMPLES_PER_SHARD = 5000
TOKENIZER_SAMPLES = 60  # of every family; each of the demo's words occurs many times within them


@dataclass(frozen=True)
class Source:
    """One folder of training samples: a family at a level."""

    family: str
    level: str
    num_samples: int


@dataclass(frozen=True)
class QuestionSet:
    """Held-out questions of one family and level; ``tasks`` are those it may ask, ``num_questions`` of each."""

    family: str
    level: str
    tasks: tuple[str, ...]
    num_questions: int


SOURCES: dict[str, Source] = {
    "caption_tile": Source("caption", "tile", 30_000),
    "caption_one": Source("caption", "one", 40_000),
    "caption_two": Source("caption", "two", 40_000),
    "caption_few": Source("caption", "few", 40_000),
    "caption_some": Source("caption", "some", 40_000),
    "caption_many": Source("caption", "many", 20_000),
    "dense_two": Source("dense", "two", 20_000),
    "dense_few": Source("dense", "few", 20_000),
    "dense_some": Source("dense", "some", 20_000),
    "question_few": Source("question", "few", 20_000),
    "question_some": Source("question", "some", 20_000),
    "pair_few": Source("pair", "few", 5_000),
    "clip_one": Source("clip", "one", 2_000),
    "clip_few": Source("clip", "few", 2_000),
    "text": Source("text", "one", 20_000),
}
_SCENE_TASKS = ("read", "count", "locate", "point", "add", "subtract")
QUESTIONS: tuple[QuestionSet, ...] = (
    QuestionSet("question", "few", _SCENE_TASKS, 60),
    QuestionSet("question", "some", _SCENE_TASKS, 60),
    QuestionSet("pair", "few", ("read_pair", "count_pair"), 30),
    QuestionSet("clip", "few", ("when",), 40),
    QuestionSet("text", "one", ("text",), 40),
)


def build(folder: Path, *, seed: int = 1, scale: float = 1.0, sources: Sequence[str] = tuple(SOURCES)) -> None:
    """Writes ``tokenizer/``, ``sources/NAME/shard-*.tar`` and ``questions/``; ``scale`` shrinks the sources."""
    build_demo_tokenizer(folder / "tokenizer", seed=seed)
    for name in sources:
        build_source(folder / "sources" / name, SOURCES[name], seed=seed, scale=scale)
    build_questions(folder / "questions", seed=seed)


def build_demo_tokenizer(folder: Path, *, seed: int = 1) -> None:
    """Writes the tokenizer made of the training samples' own words."""
    assets = load_assets("train")
    samples = (
        draw_sample(family, "few", assets, seed=seed, number=number)
        for family in FAMILIES
        for number in range(TOKENIZER_SAMPLES)
    )
    model = preset("tiny-vl")
    tokenizer = build_tokenizer(_texts(samples), model.tokens, model.text.vocab_size)
    save_tokenizer(tokenizer, folder)


def build_source(folder: Path, source: Source, *, seed: int, scale: float = 1.0) -> list[Path]:
    """The shards of one training source."""
    num_samples = max(1, round(source.num_samples * scale))
    return write_shards(_shard_samples(source, load_assets("train"), num_samples, seed), folder, SAMPLES_PER_SHARD)


def build_questions(folder: Path, *, seed: int, question_sets: Sequence[QuestionSet] = QUESTIONS) -> Path:
    """The path of ``questions.jsonl``: the question alone (media beside the file), ``task``, ``level`` and ``gold``."""
    assets = load_assets("held_out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    with path.open("w") as lines:
        for question_set in question_sets:
            for sample_id, sample in _held_out(question_set, assets, seed):
                names = {part: f"{sample_id}.{part}" for part in sample.media}
                for part, data in sample.media.items():
                    (folder / names[part]).write_bytes(data)
                question = sample.questions[0]
                record = {
                    "id": sample_id,
                    "messages": messages(sample, names)[:1],
                    "task": question.task,
                    "level": sample.level,
                    "gold": question.gold,
                }
                lines.write(json.dumps(record) + "\n")
    return path


def training_answers(
    question_set: QuestionSet, *, seed: int, num_samples: int = 600
) -> dict[str, tuple[list[str], list[str]]]:
    """For each task, the answers (as a model would say them) and golds of training samples of the same kind."""
    assets = load_assets("train")
    found: dict[str, tuple[list[str], list[str]]] = {task: ([], []) for task in question_set.tasks}
    for number in range(num_samples):
        sample = draw_sample(question_set.family, question_set.level, assets, seed=seed, number=number)
        question = sample.questions[0]
        if question.task in found:
            answers, golds = found[question.task]
            answers.append(question.said)
            golds.append(question.gold)
    return found


def messages(sample: DemoSample, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The conversation as a record holds it; ``names`` gives each medium the name it has beside the record."""
    turns: list[dict[str, Any]] = []
    shown: list[dict[str, str]] = []
    for part in sample.media:
        kind = "video" if part.startswith("video") else "image"
        shown.append({"type": kind, kind: names[part]})
    for question in sample.questions:
        turns.append({"role": "user", "content": [*shown, {"type": "text", "text": question.prompt}]})
        turns.append({"role": "assistant", "content": question.answer})
        shown = []
    return turns


def _shard_samples(source: Source, assets: Assets, num_samples: int, seed: int) -> Iterator[ShardSample]:
    for number in range(num_samples):
        sample = draw_sample(source.family, source.level, assets, seed=seed, number=number)
        key = f"{source.family}-{source.level}-{number:06d}"
        record = {
            "id": key,
            "split": assets.split,
            "messages": messages(sample, {part: part for part in sample.media}),
            "tasks": [question.task for question in sample.questions],
            "level": sample.level,
        }
        yield ShardSample(key, record, sample.media)


def _held_out(question_set: QuestionSet, assets: Assets, seed: int) -> Iterator[tuple[str, DemoSample]]:
    """Samples until every task of the set has been asked as often as it should be."""
    missing = dict.fromkeys(question_set.tasks, question_set.num_questions)
    number = 0
    while any(missing.values()):
        sample = draw_sample(question_set.family, question_set.level, assets, seed=seed, number=number)
        task = sample.questions[0].task
        if missing.get(task, 0):
            missing[task] -= 1
            yield f"{question_set.family}-{question_set.level}-{number:06d}", sample
        number += 1


def _texts(samples: Iterator[DemoSample]) -> Iterator[str]:
    yield from ("user\n", "assistant\n", "system\n")
    for sample in samples:
        for question in sample.questions:
            yield question.prompt
            yield question.said


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo's data set from packages' own assets.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training samples to write")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=list(SOURCES))
    given = parser.parse_args()
    build(given.folder, seed=given.seed, scale=given.scale, sources=given.sources)


if __name__ == "__main__":
    main()
