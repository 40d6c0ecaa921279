"""LLaVA's JSON: ``id``, ``image`` (a path, or several), ``conversations`` of ``from`` human or gpt and ``value``.

The file is one JSON array. ``<image>`` in a question is the place of the picture; the line break that LLaVA writes
beside it is no part of the question.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mimo_megatron.data.formats.base import Format, Row, annotation_files
from mimo_megatron.data.formats.chat import Chat, RowError, media_of, own_id, turn_of
from mimo_megatron.data.formats.json_rows import json_rows
from mimo_megatron.types import MediaKind

COLUMNS: Mapping[str, MediaKind] = {"image": "image", "video": "video"}


def rows(file: Path) -> Iterator[Row]:
    """The elements of the array, or the lines, of one file."""
    return (Row(file, number, tree) for number, tree in enumerate(json_rows(file), start=1))


def read_conversations(tree: Any, columns: Mapping[str, MediaKind]) -> Chat:
    """A row of ``conversations``, with media in these columns and every other key as meta."""
    if not isinstance(tree, Mapping):
        raise RowError("", "json", f"the row is a {type(tree).__name__}, not an object")
    said = tree.get("conversations")
    if not isinstance(said, list) or not said:
        raise RowError("conversations", "columns", f"must be a non-empty list, not {str(said)[:80]!r}")
    turns = tuple(
        turn_of(one, f"conversations[{number}]", role_key="from", text_key="value", trims=True)
        for number, one in enumerate(said)
    )
    used = {"id", "conversations", *columns}
    meta = {key: value for key, value in tree.items() if key not in used}
    return Chat(own_id(tree), turns, media_of(tree, columns), meta)


LLAVA = Format("llava", annotation_files, rows, lambda tree: read_conversations(tree, COLUMNS))
