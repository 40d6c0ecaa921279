"""FP8 training against training without it: the same recipe, weights, packs and steps; loss and the demo's score.

    make demo                           # the data, and the checkpoint that the recipe starts from
    python benchmarks/bench_fp8.py      # stage 3 of the demo, 400 steps, three seeds: about two hours
    python benchmarks/bench_fp8.py --steps 100 --seeds 1 --questions 0

Every run is one process by ``mimo-megatron train`` with another ``train.fp8``. ``loss`` is the mean over the last 50
steps. Two yardsticks: ``difference`` is from the fp32 run of the same seed, and that of bf16 is there to compare with;
``seed_spread`` is the standard deviation of the fp32 runs' losses, whose packs come in another order. ``score`` is the
mean over held-out questions, greedy answers. On the CPU the twin computes FP8 in software: its seconds are no speed of
FP8.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import ROOT, write_rows

from examples.quickstart.scoring import score
from mimo_megatron.config.load import load_recipe

LAST = 50
BASE = "fp32"
KINDS: dict[str, tuple[str, ...]] = {
    BASE: ("train.precision=fp32",),
    "bf16": ("train.precision=bf16",),
    "fp8 current": ("train.precision=fp32", "train.fp8={scaling: current}"),
    "fp8 delayed": ("train.precision=fp32", "train.fp8={scaling: delayed, history: 16}"),
    "fp8 blockwise": ("train.precision=fp32", "train.fp8={scaling: blockwise}"),
    "fp8 current in bf16": ("train.precision=bf16", "train.fp8={scaling: current}"),
    **{
        f"fp8 {scaling}, all layers": (
            "train.precision=fp32",
            f"train.fp8={{scaling: {scaling}, first_layers: 0, last_layers: 0, parts: [vision, projector, text]}}",
        )
        for scaling in ("current", "delayed", "blockwise")
    },
}
ONE_PROCESS = "parallel={tp: 1, pp: 1, cp: 1, sequence_parallel: false}"
QUESTIONS = Path("demo/data/questions/questions.jsonl")


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "mimo_megatron.cli", *map(str, words)], check=True)


def train(recipe: Path, folder: Path, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """The run's mean loss over its last steps, and its median seconds of a step. A finished run is only read."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        longest = load_recipe(recipe, [ONE_PROCESS]).train.schedule.warmup_steps
        warmup = f"train.schedule.warmup_steps={min(longest, steps)}"
        options = (f"dir={folder}", f"seed={seed}", f"train.steps={steps}", warmup, ONE_PROCESS, *KINDS[kind])
        run("train", recipe, "--ranks", 1, *options)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = rows[-LAST:]
    tokens = sum(row["num_trained_tokens"] for row in last)
    return {
        "loss": sum(row["loss"] * row["num_trained_tokens"] for row in last) / tokens,
        "step_seconds": statistics.median(row["seconds"] for row in rows),
    }


def ask(folder: Path, steps: int, num_questions: int) -> float:
    """The mean score of greedy answers to questions taken evenly from all kinds."""
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    questions = questions[:: max(1, len(questions) // num_questions)][:num_questions]
    media = QUESTIONS.parent.resolve()
    for question in questions:
        for message in question["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                part |= {kind: str(media / part[kind]) for kind in ("image", "video") if kind in part}
    with tempfile.TemporaryDirectory() as name:
        prompts, answers = Path(name) / "prompts.jsonl", Path(name) / "answers.jsonl"
        prompts.write_text("".join(json.dumps(question) + "\n" for question in questions))
        checkpoint = folder / "checkpoints" / f"step_{steps:06d}"
        run("generate", checkpoint, "--prompts", prompts, "--out", answers, "--max-new-tokens", 48)
        said = {row["id"]: row["answer"] for row in map(json.loads, answers.read_text().splitlines())}
    return statistics.fmean(score(one["task"], said[one["id"]], one["gold"]) for one in questions)


def row_of(kind: str, seed: int, found: dict[str, Any], bases: dict[int, float], steps: int) -> dict[str, Any]:
    spread = statistics.stdev(bases.values()) if len(bases) > 1 else None
    return {
        "run": kind,
        "seed": seed,
        "steps": steps,
        "loss": f"{found['loss']:.4f}",
        "difference": f"{found['loss'] - bases[seed]:+.4f}" if seed in bases else "",
        "seed_spread": "" if spread is None else f"{spread:.4f}",
        "score": f"{found['score']:.3f}" if "score" in found else "",
        "step_seconds": f"{found['step_seconds']:.2f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples/recipes/tiny/stage3.yaml")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the others than fp32 use the first")
    parser.add_argument("--runs", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--questions", type=int, default=200, help="asked of every model; 0 asks none")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_fp8"), help="folder of the runs, which are kept")
    parser.add_argument("--out", type=Path)
    values = parser.parse_args(arguments)
    steps = values.steps or load_recipe(values.recipe, [ONE_PROCESS]).train.steps
    chosen = [(kind, seed) for kind in values.runs for seed in (values.seeds if kind == BASE else values.seeds[:1])]
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for kind, seed in chosen:
        folder = values.work / f"{kind.replace(',', '').replace(' ', '_')}-{seed}-{steps}"
        results[kind, seed] = found = train(values.recipe, folder, kind, seed, steps)
        if values.questions and seed == values.seeds[0]:
            found["score"] = ask(folder, steps, values.questions)
        bases = {seed: one["loss"] for (kind, seed), one in results.items() if kind == BASE}
        rows = [row_of(*key, found, bases, steps) for key, found in results.items()]
        path = write_rows("fp8", rows, ["mimo_megatron"], ["torch", "megatron-core"], values.out)
        print(*(" ".join(f"{value:>20}" for value in row.values()) for row in rows[-1:]), flush=True)
    print(path)


if __name__ == "__main__":
    main()
