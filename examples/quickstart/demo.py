"""`make demo`: the whole way from pictures to a model that ordinary transformers loads, small enough for two cores.

Every part prints the command that a user would type, runs it, and says how long it took. What must hold is checked on
the way, and the demo stops where it does not: frozen modules are bit-identical before and after a stage, the loss
falls in every stage, and ``mimo-megatron generate`` answers as transformers does.

    python -m examples.quickstart.demo [--base shipped|train]        # from the root of the repository
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.quickstart.base import RECIPES, SHIPPED, TRAINED, train_base
from examples.quickstart.build_data import QUESTIONS, QuestionSet, build_questions
from examples.quickstart.checks import CheckFailed, check_answers, check_frozen, check_loss
from examples.quickstart.protocol import Protocol, layout
from examples.quickstart.result import Result, result_table, results, training_floors, write_evaluations
from examples.quickstart.sources import build_sources
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.processor import copy_tokenizer
from mimo_megatron.config.run import RunConfig
from mimo_megatron.errors import MimoError
from mimo_megatron.report.run_report import write_journey, write_report
from mimo_megatron.train.run_folder import RunFolder

DATA = Path("demo/data")
QUESTION_FILE = DATA / "questions/questions.jsonl"
RUNS = Path("runs/tiny")
START = RUNS / "start"
EXPORTS = RUNS / "hf"
STAGES = tuple(RECIPES / f"stage{number}.yaml" for number in (1, 2, 3, 4))
NUM_SAMPLES = {
    "caption_few": 6000,
    "caption_some": 5000,
    "dense_few": 3000,
    "dense_some": 3000,
    "question_few": 4000,
    "question_some": 4000,
    "pair_few": 1500,
    "clip_few": 1500,
    "text": 4000,
}
HEADLINES = (("few", "read"), ("few", "count"), ("few", "locate"))
_SEED = 7  # scenes that the base was not trained on
_NUM_COMPARED = 24
_MOST_NEW_TOKENS = 32


def run(
    protocol: Protocol,
    base: Path,
    *,
    recipes: Sequence[Path] = STAGES,
    num_samples: Mapping[str, int] = NUM_SAMPLES,
    question_sets: Sequence[QuestionSet] = QUESTIONS,
    num_floor_samples: int = 600,
) -> list[Result]:
    """What the stages answer, from the base's two folders on. ``demo/data`` and the stages' runs are made afresh."""
    configs = [load_recipe(recipe) for recipe in recipes]
    for stale in (DATA, START, EXPORTS, *(config.dir for config in configs)):
        shutil.rmtree(stale, ignore_errors=True)

    with protocol.part("Data: handwritten digits over photographs"):
        make_data(protocol, base, configs, num_samples, question_sets)
        floors = training_floors(question_sets, num_floor_samples, seed=_SEED)
    with protocol.part("Start: a trained encoder, a trained language model, a random projector between them"):
        sources = base / "text", base / "vision", START
        protocol.command("convert", "assemble", *sources, "--dtype", "fp32", "--name", configs[0].model.name)
    checkpoints = {"start": START}
    for number, (recipe, config) in enumerate(zip(recipes, configs, strict=True), start=1):
        with protocol.part(f"Stage {number}"):
            checkpoints[f"stage {number}"] = run_stage(protocol, recipe, config)
    with protocol.part("Answers: every stage exported to Hugging Face and asked by plain transformers"):
        answers = ask(protocol, checkpoints)
    with protocol.part("Result"):
        found = results(read_rows(QUESTION_FILE), answers, floors)
        protocol.console.print(result_table(found))
        run_dirs = dict(zip(list(checkpoints)[1:], (config.dir for config in configs), strict=True))
        write_evaluations(found, run_dirs)
        reports = [write_report(run_dir) for run_dir in run_dirs.values()]
        journey = write_journey(list(run_dirs.values()), RUNS / "journey.html", title="The four stages of the demo")
    tell_times(protocol)
    protocol.say(f"\nThe model: {EXPORTS / list(checkpoints)[-1].replace(' ', '')}")
    protocol.say(f"The report: {journey} (and of the last stage: {reports[-1]})")
    return found


def make_data(
    protocol: Protocol,
    base: Path,
    configs: Sequence[RunConfig],
    num_samples: Mapping[str, int],
    question_sets: Sequence[QuestionSet],
) -> None:
    """Write tars with their index, and the held-out questions. The tokenizer is the base's."""
    tokenizer = configs[0].data.tokenizer
    tokenizer.mkdir(parents=True)
    copy_tokenizer(base / "text", tokenizer)
    reports = build_sources(configs, num_samples, seed=_SEED)
    for name, report in sorted(reports.items()):
        count = sum(report.num_samples.values())
        protocol.say(f"  {name}: {count:,} samples, {report.num_tokens:,} tokens, {report.num_patches:,} patches")
    build_questions(QUESTION_FILE.parent, seed=_SEED, question_sets=question_sets)
    protocol.say(f"  {QUESTION_FILE}: {len(read_rows(QUESTION_FILE))} questions about digits that no model has seen")


def run_stage(protocol: Protocol, recipe: Path, config: RunConfig) -> Path:
    """The stage's last checkpoint, after the checks of what a stage promises."""
    num_ranks, overrides = layout(config.train.packs_per_step)
    protocol.command("train", recipe, "--ranks", num_ranks, *overrides)
    checkpoint = RunFolder(config.dir).checkpoint(config.train.steps)
    assert config.start_from is not None, "a stage starts from the one before"
    for module, (num_changed, num_tensors) in check_frozen(config.start_from, checkpoint, config).items():
        state = f"trained, {num_changed} of" if num_changed else "frozen, bit-identical in all"
        protocol.found(f"{module}: {state} {num_tensors} tensors")
    first, last = check_loss(config.dir)
    protocol.found(f"loss: {first:.3f} -> {last:.3f} (first and last third of the steps, over their trained tokens)")
    return checkpoint


def ask(protocol: Protocol, checkpoints: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Each model's answers by question id, from a process that knows transformers and nothing of this project."""
    exports = {model: EXPORTS / model.replace(" ", "") for model in checkpoints}
    for model, export in exports.items():
        protocol.command("convert", "to-hf", checkpoints[model], export)
    limit = ("--max-new-tokens", _MOST_NEW_TOKENS)
    protocol.python("examples.quickstart.answer", QUESTION_FILE, *exports.values(), *limit)
    answers = {
        model: {row["id"]: row["answer"] for row in read_rows(export / "answers.jsonl")}
        for model, export in exports.items()
    }
    last, lines = list(checkpoints)[-1], QUESTION_FILE.read_text().splitlines(keepends=True)
    some, ours = QUESTION_FILE.with_name("some.jsonl"), EXPORTS / "generated.jsonl"
    some.write_text("".join(lines[:: max(1, len(lines) // _NUM_COMPARED)]))
    protocol.command("generate", checkpoints[last], "--prompts", some, "--out", ours, *limit)
    num_equal = check_answers(read_rows(ours), answers[last])
    protocol.found(f"{num_equal} answers of `mimo-megatron generate` are those of transformers, word for word")
    return answers


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tell_times(protocol: Protocol) -> None:
    times = Table(title="Time", title_justify="left", show_header=False)
    for title, seconds in protocol.seconds.items():
        times.add_row(title.partition(":")[0], f"{seconds:.0f} s")
    times.add_section()
    times.add_row("all", f"{sum(protocol.seconds.values()) / 60:.1f} min")
    protocol.console.print(times)


def check_headlines(found: Sequence[Result]) -> None:
    """Reading, counting and locating are better than at the start, than chance and than any constant answer."""
    poor = [one.label for one in found if (one.level, one.task) in HEADLINES and not one.is_learnt]
    if poor:
        raise CheckFailed(f"not better than without training: {', '.join(poor)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="From pictures to a Hugging Face model in four stages.")
    parser.add_argument("--base", choices=("shipped", "train"), default="shipped", help="train: make the base again")
    base, protocol = parser.parse_args().base, Protocol()
    try:
        if base == "train":
            train_base(protocol, TRAINED)
        found = run(protocol, TRAINED if base == "train" else SHIPPED)
        check_headlines(found)
    except MimoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
