"""`make morl`: reinforcement learning of the demo's model, after `make demo`.

Two reward models, a start that has much to learn, questions, and the run; then what each task earned before and after.

Reward models and steps that are there already are kept: a second start goes on where the first one ended.

    python -m examples.quickstart.morl [key=value ...]        # from the root of the repository; keys of tiny/morl.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from examples.quickstart.base import RECIPES
from examples.quickstart.demo import read_rows, tell_times
from examples.quickstart.protocol import Protocol
from mimo_megatron.config.calibration import CALIBRATION_FILE
from mimo_megatron.config.load import load_recipe
from mimo_megatron.errors import MimoError
from mimo_megatron.train.run_folder import RunFolder

RECIPE = RECIPES / "morl.yaml"
START = RECIPES / "morl_start.yaml"
QUESTIONS = Path("demo/rl")
REWARD_MODELS = {"text": Path("examples/quickstart/base/text"), "multimodal": Path("runs/tiny/start")}
"""Each kind, and the model whose answers are the worse ones of its pairs."""


def run(protocol: Protocol, overrides: Sequence[str] = ()) -> Path:
    """The run's folder."""
    for kind, worse in REWARD_MODELS.items():
        with protocol.part(f"Reward model of {kind}"):
            train_reward_model(protocol, kind, worse)
    with protocol.part("Start: fifteen steps of stage 4 at a high rate"):
        protocol.command("train", START)  # a run that is done says so and ends
    with protocol.part("Questions: seven tasks"):
        protocol.python("examples.quickstart.rl_questions", QUESTIONS)
    with protocol.part("Reinforcement learning"):
        protocol.command("rl", RECIPE, "--ranks", 2, *overrides)
    config = load_recipe(RECIPE, overrides)
    protocol.console.print(reward_table(config.dir))
    tell_times(protocol)
    return config.dir


def train_reward_model(protocol: Protocol, kind: str, worse: Path) -> None:
    """Pairs, training, and calibration on held-out pairs."""
    recipe, pairs = RECIPES / f"reward_model_{kind}.yaml", Path("demo/pairs") / kind
    config = load_recipe(recipe)
    checkpoint = RunFolder(config.dir).checkpoint(config.train.steps)
    if (checkpoint / CALIBRATION_FILE).exists():
        protocol.say(f"  {checkpoint} is there, and calibrated")
        return
    protocol.python("examples.quickstart.preferences", worse, pairs, "--kind", kind)
    protocol.command("data", "index", recipe)
    protocol.command("train", recipe, "--ranks", 2)
    held_out = pairs / "held_out.jsonl"
    protocol.command("reward-model", "evaluate", checkpoint, "--pairs", held_out, "--calibrate")


def reward_table(run_dir: Path) -> Table:
    """Mean held-out reward of each task at the first and at the last evaluation."""
    first, *_, last = read_rows(run_dir / "evaluations.jsonl")
    table = Table("task", title="Mean held-out reward", title_justify="left")
    for one in (first, last):
        table.add_column(f"step {one['step']}", justify="right")
    for task, before in first["rewards"].items():
        table.add_row(task, f"{before:.3f}", f"{last['rewards'][task]:.3f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="Reinforcement learning of the demo's model.")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    try:
        folder = run(Protocol(), parser.parse_args().overrides)
    except MimoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"The report: {folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
