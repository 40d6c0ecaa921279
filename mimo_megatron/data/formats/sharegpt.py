"""ShareGPT as LLaMA-Factory has it: ``conversations`` (from, value) or ``messages`` (role, content), and ``images``.

Further columns: ``videos``, ``system``, ``chosen`` and ``rejected`` (of pairs). Text is taken as it stands: where that
trainer reads a mark, it puts the picture and strips nothing. Rows with tools are refused.
"""

from collections.abc import Mapping
from typing import Any

from mimo_megatron.data.formats.base import Format, annotation_files
from mimo_megatron.data.formats.chat import Chat, RowError, Turn, media_of, own_id, turn_of
from mimo_megatron.data.formats.llava import rows
from mimo_megatron.types import MediaKind

COLUMNS: Mapping[str, MediaKind] = {"image": "image", "images": "image", "video": "video", "videos": "video"}
_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_RESPONSES = ("chosen", "rejected")


def read(tree: Any) -> Chat:
    """The row's conversation, its media in the order of their columns."""
    if not isinstance(tree, Mapping):
        raise RowError("", "json", f"the row is a {type(tree).__name__}, not an object")
    columns = [key for key in _KEYS if tree.get(key) is not None]
    if len(columns) != 1:
        raise RowError("", "columns", f"it must have conversations or messages; it has {sorted(tree)}")
    (column,) = columns
    said = tree[column]
    if not isinstance(said, list) or not said:
        raise RowError(column, "columns", f"must be a non-empty list, not {str(said)[:80]!r}")
    if tree.get("tools"):
        raise RowError("tools", "role", "tool calls are not trained")
    turns = [_turn(one, f"{column}[{number}]", column) for number, one in enumerate(said)]
    if tree.get("system"):
        turns.insert(0, turn_of({"role": "system", "content": tree["system"]}, "system", **_spelling("messages")))
    used = {"id", "conversations", "messages", "system", "tools", *COLUMNS}
    responses = {key: _response(tree[key], key) for key in _RESPONSES if tree.get(key) is not None}
    if len(responses) == 1:
        raise RowError(next(iter(responses)), "columns", "a pair has both chosen and rejected")
    meta = {key: value for key, value in tree.items() if key not in used and key not in responses}
    return Chat(own_id(tree), tuple(turns), media_of(tree, COLUMNS), meta, responses)


def _spelling(column: str) -> dict[str, Any]:
    role_key, text_key = _KEYS[column]
    return {"role_key": role_key, "text_key": text_key, "trims": False}


def _turn(message: Any, field: str, column: str) -> Turn:
    if isinstance(message, Mapping) and column == "conversations" and "from" not in message and "role" in message:
        column = "messages"  # some sets call the column one way and its keys the other
    return turn_of(message, field, **_spelling(column))


def _response(value: Any, field: str) -> str:
    """Text, or one assistant message: alone as LLaMA-Factory has it, in a list as TRL has it."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, str):
        return value
    turn = _turn(value, field, "conversations")
    if turn.role != "assistant" or not all(isinstance(part, str) for part in turn.parts):
        raise RowError(field, "role", "a response is one turn of text by the assistant")
    return "".join(part for part in turn.parts if isinstance(part, str))


SHAREGPT = Format("sharegpt", annotation_files, rows, read)
