"""Hugging Face's parquet: a column ``messages`` or ``conversations``, media as ``{"bytes": ..., "path": ...}``.

Read batch by batch. A file named ``train-00000-of-00004.parquet`` says its split. Where no text marks the places of the
images, they stand before the first question, as TRL puts them.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mimo_megatron.data.formats import sharegpt
from mimo_megatron.data.formats.base import Format, Row, files_with
from mimo_megatron.data.formats.chat import Chat, place
from mimo_megatron.errors import DataError

_SPLIT = re.compile(r"^(\w+)-\d+-of-\d+$")
_BATCH = 16
"""Rows held at once: with several screenshots each, some 100 MB."""


def rows(file: Path) -> Iterator[Row]:
    """The rows of the file, a few at a time."""
    found = _SPLIT.match(file.stem)
    split = found[1] if found else None
    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_BATCH):
                for tree in batch.to_pylist():
                    number += 1
                    yield Row(file, number, tree, split)
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a whole parquet file ({error}); fetch it again") from error


def read(tree: Any) -> Chat:
    """The row's conversation; unmarked media go before the first question."""
    chat = sharegpt.read({key: value for key, value in tree.items() if value is not None})
    if not chat.media or any(not isinstance(part, str) for turn in chat.turns for part in turn.parts):
        return chat
    first = next((number for number, turn in enumerate(chat.turns) if turn.role == "user"), None)
    if first is None:
        return chat
    turns = list(chat.turns)
    turns[first] = replace(turns[first], parts=(*(place(one.kind) for one in chat.media), *turns[first].parts))
    return replace(chat, turns=tuple(turns))


HF_PARQUET = Format("hf-parquet", lambda path: files_with(path, ".parquet"), rows, read)
