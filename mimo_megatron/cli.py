"""The ``mimo-megatron`` command: a table of verbs, each a few lines that call the package.

Every verb imports what it needs when it runs, so that ``--help`` and a misspelt option answer at once: this file is the
one place where imports stand inside functions. To add a verb, write its two functions and a line in ``VERBS``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_megatron import __version__
from mimo_megatron.errors import MimoError

Arguments = argparse.ArgumentParser
Values = argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """``name`` may be two words: verbs that share the first are shown under it."""

    name: str
    help: str
    add_arguments: Callable[[Arguments], object]
    run: Callable[[Values], int]


def _doctor_arguments(parser: Arguments) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(values: Values) -> int:
    from itertools import groupby

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mimo_megatron.doctor import TOPICS, as_json, examine, has_fault

    findings = examine()
    if values.json:
        print(as_json(findings))
        return int(has_fault(findings))
    table = Table(
        "", "name", "found", "why, and -> remedy", box=SIMPLE, title="mimo-megatron doctor", title_justify="left"
    )
    colours = {"ok": "green", "note": "yellow", "fault": "bold red"}
    for topic, group in groupby(sorted(findings, key=lambda one: TOPICS.index(one.topic)), key=lambda one: one.topic):
        table.add_section()
        table.add_row("", Text(topic, "bold"))
        for one in group:
            remark = one.why + (f"\n-> {one.remedy}" if one.remedy else "")
            table.add_row(Text(one.status, colours[one.status]), Text(one.name), Text(one.found), Text(remark))
    Console().print(table)
    return int(has_fault(findings))


def _recipe_arguments(parser: Arguments) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file, see docs/recipes.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of the recipe: train.steps=20"
    )


def _config_show_arguments(parser: Arguments) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--ranks", type=int, help="check also that the run fits this many ranks")


def _config_show(values: Values) -> int:
    from mimo_megatron.config.check import check
    from mimo_megatron.config.load import load_recipe, resolved_text

    config = load_recipe(values.recipe, values.overrides)
    if values.ranks:
        check(config, values.ranks)
    print(resolved_text(config), end="")
    return 0


def _config_explain_arguments(parser: Arguments) -> None:
    parser.add_argument("key", nargs="?", help="a dotted path such as train.schedule; all keys if left out")
    parser.add_argument("--markdown", action="store_true", help="as the table of docs/recipes.md")


def _config_explain(values: Values) -> int:
    from mimo_megatron.config.keys import explain, markdown_table

    found = explain(values.key)
    print(markdown_table(found) if values.markdown else "\n".join(map(str, found)))
    return 0


VERBS: tuple[Verb, ...] = (
    Verb("doctor", "what this machine offers, which backends follow, what to mend", _doctor_arguments, _doctor),
    Verb("config show", "every key of a recipe with the value it resolves to", _config_show_arguments, _config_show),
    Verb("config explain", "what a key of a recipe means", _config_explain_arguments, _config_explain),
)
_GROUPS = {
    "config": "recipes: show, explain",
    "data": "data sets: index, preview",
    "convert": "checkpoints: convert, verify",
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
    """The exit code: 0, 1 where the answer is bad news, 2 for a mistake that the user can mend."""
    values = parse(arguments)
    try:
        return values.verb.run(values)
    except MimoError as error:
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text

        title = f"{type(error).__name__} in mimo-megatron {values.verb.name}"
        Console(stderr=True).print(Panel(Text(str(error)), title=title, title_align="left", border_style="red"))
        return 2


if __name__ == "__main__":
    sys.exit(main())
