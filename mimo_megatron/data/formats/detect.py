"""Which format a path holds, told from its content; where that leaves two, their names are given and one must be said.

The first rows of every file are looked at. A format is *shown* by what only it has, and the reason is said aloud.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mimo_megatron.data.formats.base import Format, annotation_files, files_with
from mimo_megatron.data.formats.folder import BESIDE, FOLDER, IMAGES, TABLES, VIDEOS
from mimo_megatron.data.formats.hf_parquet import HF_PARQUET
from mimo_megatron.data.formats.json_rows import is_array, json_rows
from mimo_megatron.data.formats.llava import LLAVA
from mimo_megatron.data.formats.qwen_vl import QWEN_VL
from mimo_megatron.data.formats.sharegpt import SHAREGPT
from mimo_megatron.errors import DataError

FORMATS: Mapping[str, Format] = {one.name: one for one in (LLAVA, SHAREGPT, QWEN_VL, HF_PARQUET, FOLDER)}
_NUM_ROWS = 200
_LISTS = ("images", "videos")
_SHAREGPT_ROLES = {"user", "assistant", "chatgpt", "bing", "bard", "observation", "function_call", "tool"}


def detect(path: Path) -> tuple[Format, str]:
    """The format, and what showed it. ``DataError`` where nothing does, or where several are shown."""
    if not path.exists():
        raise DataError(f"{path} does not exist")
    shown: dict[str, str] = {}
    for name, reason in _evidence(path):
        shown.setdefault(name, reason)
    if len(shown) == 1:
        ((name, reason),) = shown.items()
        return FORMATS[name], reason
    if not shown:
        raise DataError(
            f"{path} shows none of the formats {', '.join(FORMATS)} (looked for conversations or messages in .json, "
            ".jsonl and .parquet, and for pictures with captions beside them); say it with --format"
        )
    listed = "; ".join(f"{name}: {reason}" for name, reason in shown.items())
    raise DataError(f"{path} may be of several formats ({listed}); choose with --format {' or --format '.join(shown)}")


def _evidence(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_file() and path.suffix not in (".json", ".jsonl", ".csv", ".parquet"):
        return
    if path.name in TABLES:
        yield "folder", f"{path.name} is a table of captions"
    elif path.suffix == ".parquet":
        yield "hf-parquet", "the file is parquet"
    elif path.is_file():
        yield from _of_annotations(path)
    else:
        if parquet := files_with(path, ".parquet"):
            yield "hf-parquet", f"it holds {len(parquet)} parquet files"
        for file in annotation_files(path):
            if file.name not in TABLES and not _is_beside(file):
                yield from _of_annotations(file)
        if captioned := _captioned(path):
            yield "folder", captioned


def _is_beside(file: Path) -> bool:
    return any(file.with_suffix(suffix).exists() for suffix in (*IMAGES, *VIDEOS))


def _captioned(path: Path) -> str | None:
    for one in files_with(path, *IMAGES, *VIDEOS, *TABLES):
        if one.name in TABLES:
            return f"{one.name} is a table of captions"
        if beside := next((suffix for suffix in BESIDE if one.with_suffix(suffix).is_file()), None):
            return f"{one.stem}{beside} lies beside {one.name}"
    return None


def _of_annotations(file: Path) -> Iterator[tuple[str, str]]:
    in_array, has_shown, has_talked = is_array(file), False, False
    for number, tree in enumerate(itertools.islice(json_rows(file), _NUM_ROWS), start=1):
        has_talked |= isinstance(tree, Mapping) and isinstance(tree.get("conversations"), list)
        for name, reason in _of_row(tree, in_array):
            has_shown = True
            yield name, f"row {number} of {file.name} has {reason}"
    if has_talked and not has_shown:
        yield "sharegpt", f"{file.name} has conversations of text alone"


def _of_row(tree: Any, in_array: bool) -> Iterator[tuple[str, str]]:
    if isinstance(tree, list) and tree and isinstance(tree[0], Mapping) and "conversations" in tree[0]:
        yield "qwen-vl", "a list of rows, to be packed together"
    if not isinstance(tree, Mapping):
        return
    said = tree.get("conversations")
    if isinstance(tree.get("messages"), list):
        yield "sharegpt", "messages"
    elif isinstance(said, list):
        yield from _of_conversations(tree, said, in_array)


def _of_conversations(tree: Mapping[str, Any], said: list[Any], in_array: bool) -> Iterator[tuple[str, str]]:
    keys = [key for key in (*_LISTS, "system", "tools", "chosen") if tree.get(key)]
    roles = {one.get("from", one.get("role")) for one in said if isinstance(one, Mapping)}
    if roles & _SHAREGPT_ROLES:
        yield "sharegpt", f"the roles {', '.join(sorted(roles & _SHAREGPT_ROLES))}"
    elif keys:
        yield "sharegpt", f"the column {keys[0]}"
        if set(keys) <= set(_LISTS):
            yield "qwen-vl", f"the column {keys[0]} with human and gpt"
    elif tree.get("image") or tree.get("video"):
        key = "image" if tree.get("image") else "video"
        if "id" in tree:
            yield "llava", f"id, {key} and conversations"
        if "id" not in tree or not in_array or key == "video":
            yield "qwen-vl", f"{key} and conversations" + (" in JSON lines" if not in_array else "")
