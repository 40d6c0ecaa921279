"""The ``mimo-megatron`` command: a table of verbs, each a few lines that call the package.

Every verb imports what it needs when it runs, so that ``--help`` and a misspelt option answer at once: this folder is
the one place where imports stand inside functions. To add a verb, write its two functions and a line in its file's
``VERBS``.
"""

import argparse
from collections.abc import Sequence

from mimo_megatron import __version__
from mimo_megatron.cli import convert, data, inspect, plan, prove, reward_model, rewards, run, serve
from mimo_megatron.cli.verb import Values, Verb
from mimo_megatron.errors import MimoError

VERBS: tuple[Verb, ...] = (
    *inspect.VERBS,
    *data.VERBS,
    *plan.VERBS,
    *run.VERBS,
    *prove.VERBS,
    *convert.VERBS,
    *reward_model.VERBS,
    *rewards.VERBS,
    *serve.VERBS,
)
_GROUPS = {
    "config": "recipes: show, explain, model",
    "data": "data sets: convert, index, lint, stats, preview, verify-resume, calibrate",
    "reward-model": "reward models: evaluate",
    "convert": "checkpoints: from-hf, to-hf, verify, assemble, seal",
    "rewards": "rewards: check, inspect",
}


def build_parser(verbs: Sequence[Verb] = VERBS) -> argparse.ArgumentParser:
    """The parser of the whole command line; the chosen verb is ``values.verb``."""
    parser = argparse.ArgumentParser(
        prog="mimo-megatron", description="Train MiMo-VL-7B-class models on Megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"mimo-megatron {__version__}")
    first_words = parser.add_subparsers(required=True, metavar="VERB")
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for verb in verbs:
        first, _, second = verb.name.partition(" ")
        if second and first not in groups:
            group = first_words.add_parser(first, help=_GROUPS[first])
            groups[first] = group.add_subparsers(required=True, metavar="VERB")
        sub = (groups[first] if second else first_words).add_parser(
            second or first, help=verb.help, description=verb.help
        )
        verb.add_arguments(sub)
        sub.set_defaults(verb=verb, parser=sub)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Values:
    """The values of the command line. ``key=value`` overrides may stand before, between and after options."""
    values, rest = build_parser().parse_known_args(arguments)
    strangers = [text for text in rest if "=" not in text or text.startswith("-") or not hasattr(values, "overrides")]
    if strangers:
        values.parser.error(f"not understood: {' '.join(strangers)}")
    if rest:
        values.overrides += rest
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where the answer is bad news, else the error's (see docs/faults.md)."""
    values = parse(arguments)
    try:
        return values.verb.run(values)
    except MimoError as error:
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text

        title = f"{type(error).__name__} in mimo-megatron {values.verb.name}"
        Console(stderr=True).print(Panel(Text(str(error)), title=title, title_align="left", border_style="red"))
        return error.exit_code
