"""What a stored sample may say: the strict reading of its JSON, the same for tar shards and JSONL files.

A record is ``{"messages": [{"role": ..., "content": ...}, ...]}`` with an optional ``id`` and ``split``; every other
key is kept as ``meta``. Content is a string or a list of parts ``{"type": "text", "text": ...}``, ``{"type": "image",
"image": NAME}``, ``{"type": "video", "video": NAME}``. Anything else is refused: a key that is silently ignored is a
sample that is silently something else.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_megatron.data.reading import ReadError
from mimo_megatron.errors import DataError
from mimo_megatron.types import MediaKind

ROLES = ("system", "user", "assistant")


class SampleError(DataError):
    """A sample that cannot be used: names it, and gives a one-word reason under which it is counted."""

    def __init__(self, sample_id: str, reason: str, detail: str) -> None:
        super().__init__(f"sample {sample_id!r}: {detail}")
        self.sample_id = sample_id
        self.reason = reason
        self.detail = detail


@contextlib.contextmanager
def blame(sample_id: str, reason: str) -> Iterator[None]:
    """Any ``DataError`` inside becomes a ``SampleError`` of this sample and reason; a failed read has its own."""
    try:
        yield
    except SampleError:
        raise
    except ReadError as error:
        raise SampleError(sample_id, error.reason, str(error)) from error
    except DataError as error:
        raise SampleError(sample_id, reason, str(error)) from error


@dataclass(frozen=True)
class Record:
    """A sample's JSON after checks. ``media`` are the kinds and names of the image and video parts, in order."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    media: tuple[tuple[MediaKind, str], ...]
    split: str | None
    meta: Mapping[str, Any]


def parse_record(text: bytes, default_id: str) -> Record:
    """The record in ``text``. Without an ``id`` of its own it is called ``default_id``."""
    with blame(default_id, "json"):
        tree = strict_json(text)
    return record_of(tree, default_id)


def record_of(tree: Mapping[str, Any], default_id: str) -> Record:
    """The record that the JSON object says."""
    tree = dict(tree)
    with blame(default_id, "json"):
        sample_id = tree.pop("id", default_id)
        if not isinstance(sample_id, str) or not sample_id:
            raise DataError(f'"id" is {sample_id!r}; it must be a non-empty string')
        split = tree.pop("split", None)
        if not (split is None or (isinstance(split, str) and split)):
            raise DataError(f'"split" is {split!r}; it must be a non-empty string')
    with blame(sample_id, "messages"):
        media: list[tuple[MediaKind, str]] = []
        messages = _messages(tree.pop("messages", None), media)
    return Record(sample_id, messages, tuple(media), split, tree)


def strict_json(text: bytes) -> dict[str, Any]:
    """The JSON object in ``text``. ``DataError`` for anything else, NaN and half surrogate pairs among it."""

    def refuse(constant: str) -> None:
        raise DataError(f"{constant} is not JSON")

    try:
        tree = json.loads(text.decode("utf-8"), parse_constant=refuse)
        if b"\\ud" in text.lower():  # an escaped surrogate: half a pair would fail later, in the tokenizer
            json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DataError(f"unreadable JSON: {error}") from error
    if not isinstance(tree, dict):
        raise DataError(f"the JSON is a {type(tree).__name__}; it must be an object with messages")
    return tree


def _messages(found: Any, media: list[tuple[MediaKind, str]]) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(found, list) or not found:
        raise DataError('"messages" must be a non-empty list')
    messages = []
    for number, message in enumerate(found):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            keys = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise DataError(f"message {number} must hold exactly role and content, not {keys}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise DataError(f"message {number} has role {role!r}; known are {', '.join(ROLES)}")
        if isinstance(content, list):
            content = tuple(_part(part, number, media) for part in content)
        elif not isinstance(content, str):
            raise DataError(f"message {number} has content of type {type(content).__name__}; give a string or parts")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _part(part: Any, number: int, media: list[tuple[MediaKind, str]]) -> Mapping[str, str]:
    match part:
        case {"type": "text", "text": str(text)} if len(part) == 2:
            return {"type": "text", "text": text}
        case {"type": "image", "image": str(name)} if len(part) == 2 and name:
            media.append(("image", name))
            return {"type": "image"}
        case {"type": "video", "video": str(name)} if len(part) == 2 and name:
            media.append(("video", name))
            return {"type": "video"}
    raise DataError(
        f"message {number} has the part {str(part)[:120]!r}; a part is "
        '{"type": "text", "text": ...}, {"type": "image", "image": NAME} or {"type": "video", "video": NAME}'
    )
