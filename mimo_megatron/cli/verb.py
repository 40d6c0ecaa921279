"""What a verb of the command is, and the arguments that several share."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mimo_megatron.lifetime import end_with_parent

Arguments = argparse.ArgumentParser
Values = argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """``name`` may be two words: verbs that share the first are shown under it."""

    name: str
    help: str
    add_arguments: Callable[[Arguments], object]
    run: Callable[[Values], int]


def count(text: str) -> int:
    """A whole number from 1; argparse names this function in its complaint."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def add_recipe(parser: Arguments) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file, see docs/recipes.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of the recipe: train.steps=20"
    )


def add_parent(parser: Arguments) -> None:
    parser.add_argument("--parent", type=int, metavar="PID", help="the process that started this one, and that ends it")


def mind_parent(values: Values) -> None:
    if values.parent is not None:
        end_with_parent(values.parent)


def add_layout(parser: Arguments) -> None:
    """A checkpoint and the layout in which it is used."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of ours, or a Hugging Face folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the layout: parallel.tp=2 parallel.pp=2")
    parser.add_argument("--ranks", type=count, help="processes on this machine (default: tp * pp * cp)")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer (default: the checkpoint's own)")
