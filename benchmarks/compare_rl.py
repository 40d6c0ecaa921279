"""Does the mix teach every task, and what does mixing cost? Held-out rewards of whole tiny runs, side by side.

    make demo && make morl                                   # the start, the questions, the reward models
    python benchmarks/compare_rl.py --seeds 1 2 3 --jobs 2

For every seed: the mix of ``tiny/morl.yaml``; each of its five tasks that rules judge alone, with as many groups a step
as the mix gives it, so that at equal steps equally many questions of it were asked; and the mix learnt by vanilla GRPO
(several clipped updates for each batch of rollouts, as the report's Fig. 7 compares). Runs that are there are kept,
those that were cut off go on. Writes a row for each run and task, and the curves.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from provenance import ROOT, write_rows
from rich.console import Console
from rich.table import Table

from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.rl import PromptSourceConfig
from mimo_megatron.report.rl_comparison import write_comparison

RECIPE = ROOT / "examples/recipes/tiny/morl.yaml"
TASKS = ("math", "box", "point", "count", "time")
GRPO_UPDATES = 4
MIXED, ALONE, GRPO = "mixed, on policy", "each task alone", f"mixed, GRPO of {GRPO_UPDATES} updates"


@dataclass(frozen=True)
class Run:
    label: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    def start(self, threads: int) -> None:
        """Run it to its end, and say how long that took. What it prints goes to ``log.txt`` of its folder."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [f"seed={self.seed}", f"dir={self.folder}", *self.overrides]
        with (self.folder / "log.txt").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", "mimo_megatron.cli", "rl", str(RECIPE), *words],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=log, stderr=log, check=True,
            )  # fmt: skip
        print(f"{self.folder}: {(time.monotonic() - began) / 60:.1f} min", flush=True)

    @property
    def has_ended(self) -> bool:
        if not (self.folder / "evaluations.jsonl").exists():
            return False
        last = (self.folder / "evaluations.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["step"] == load_recipe(RECIPE, self.overrides).train.steps

    @property
    def rewards(self) -> list[dict[str, float]]:
        """Of each task at every evaluation, from the first to the last."""
        return [json.loads(line)["rewards"] for line in (self.folder / "evaluations.jsonl").read_text().splitlines()]


def planned(seeds: Sequence[int], labels: Sequence[str], overrides: Sequence[str], out: Path) -> Iterator[Run]:
    """All runs, the mixes first."""
    config = load_recipe(RECIPE, overrides)
    assert config.rl is not None
    groups = config.rl.rollout.groups_per_step / sum(source.ratio for source in config.rl.prompts)
    if MIXED in labels:
        yield from (Run(MIXED, seed, out / f"mixed-{seed}", tuple(overrides)) for seed in seeds)
    for seed in seeds:
        if GRPO in labels:
            keys = (*overrides, "rl.algorithm.name=grpo", f"rl.algorithm.updates_per_batch={GRPO_UPDATES}")
            yield Run(GRPO, seed, out / f"grpo-{seed}", keys)
        for source in config.rl.prompts if ALONE in labels else ():
            if source.task in TASKS:
                yield Run(ALONE, seed, out / f"{source.task}-{seed}", (*overrides, *_alone(source, groups)))


def _alone(source: PromptSourceConfig, groups_per_ratio: float) -> Iterator[str]:
    prompts = [{"task": source.task, "path": str(source.path), "held_out": str(source.held_out)}]
    yield f"rl.prompts={json.dumps(prompts)}"
    yield f"rl.rollout.groups_per_step={round(groups_per_ratio * source.ratio)}"
    yield from ("rl.reward.text_model=null", "rl.reward.multimodal_model=null")


def five_task_mean(rewards: dict[str, float]) -> float | None:
    return fmean(rewards[task] for task in TASKS) if set(TASKS) <= set(rewards) else None


def table_of(runs: Sequence[Run]) -> Table:
    """The first and the last held-out reward of each task, by label and seed."""
    table = Table("run", "seed", *TASKS, "mean of five", title="Held-out reward, first -> last evaluation")
    for run in runs:
        first, *_, last = run.rewards
        pairs = [(first.get(task), last.get(task)) for task in TASKS] + [(five_task_mean(first), five_task_mean(last))]
        cells = ["" if a is None or b is None else f"{a:.3f} -> {b:.3f}" for a, b in pairs]
        table.add_row(run.label, str(run.seed), *cells)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=[MIXED, ALONE, GRPO], nargs="+", default=[MIXED, ALONE, GRPO])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--as-is", action="store_true", help="start nothing: compare the runs that have ended")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny/compare"), help="folder of the runs")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/morl-comparison.png")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe, for every run")
    options = parser.parse_args()
    runs = list(planned(options.seeds, options.only, options.overrides, options.runs))
    if options.as_is:
        runs = [run for run in runs if run.has_ended]
    else:
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: run.start(threads), runs))
    rows = [
        {"run": run.label, "seed": run.seed, "task": task, "first": run.rewards[0][task], "last": run.rewards[-1][task]}
        for run in runs
        for task in run.rewards[0]
    ]
    print(write_rows("rl-comparison", rows, ("mimo_megatron", "examples"), ("torch", "megatron-core"), None))
    by_label = {label: found for label in options.only if (found := [run.folder for run in runs if run.label == label])}
    print(write_comparison(by_label, options.plot))
    Console(width=160).print(table_of(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
