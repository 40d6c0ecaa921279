"""What a format is: how its rows are found, and what a row says. Each format is one small file with one such object."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_megatron.data.formats.chat import Chat


@dataclass(frozen=True)
class Row:
    """One row of a file, as yet unread. ``number`` counts from 1, as editors count lines."""

    file: Path
    number: int
    tree: Any
    split: str | None = None
    """The split that the file's name says, as Hugging Face names its files."""


@dataclass(frozen=True)
class Format:
    """``name`` is what ``--format`` takes. ``read`` raises ``RowError`` for a row that is not of the format."""

    name: str
    files: Callable[[Path], list[Path]]
    """Its files under a path, in the order in which they are converted."""
    rows: Callable[[Path], Iterator[Row]]
    """The rows of one file, streamed. A bad row's ``tree`` may be a ``RowError``."""
    read: Callable[[Any], Chat]


def files_with(path: Path, *suffixes: str) -> list[Path]:
    """The file itself, or the files under a folder with these suffixes, sorted by path; hidden ones left out."""
    if path.is_file():
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".") and name.lower().endswith(suffixes)]
    return sorted(found)


def annotation_files(path: Path) -> list[Path]:
    """The file itself, or the .json and .jsonl files that lie directly in a folder."""
    return [path] if path.is_file() else sorted(one for one in path.iterdir() if one.suffix in (".json", ".jsonl"))
