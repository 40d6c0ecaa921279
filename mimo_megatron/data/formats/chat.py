"""What a row of any format says before its media are opened, and the reasons for which a row is refused.

A reader of a format turns a row into a ``Chat``; ``sample.py`` turns a ``Chat`` into a sample of ours. So roles, marks,
media and boxes are judged in one place, whatever the format.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_megatron.errors import DataError
from mimo_megatron.types import MediaKind

REASONS: Mapping[str, str] = {
    "json": "the row is not JSON, or not an object",
    "columns": "a key is missing, or holds another kind of value than the format says",
    "role": "who speaks is neither system, user nor assistant (tool calls are not trained)",
    "order": "the turns are not user and assistant by turns, or a system message is not the first",
    "empty": "a turn says nothing",
    "unanswered": "the last turn is no answer",
    "mark_count": "the text has more or fewer <image> or <video> marks than the row has files",
    "mark_in_answer": "an answer holds an <image> or <video> mark",
    "media_missing": "the file of an image or video does not exist",
    "media_unreadable": "an image's header, or a video's container, cannot be read",
    "media_kind": "audio, an address in the net, or frames in place of a video",
    "box_frame": "an answer holds boxes or points, and --boxes does not say in which frame such are",
    "coordinates": "a box or point lies outside of its image, or there is no image before it",
    "text": "text that UTF-8 cannot hold, or that holds our own coordinate marks",
}

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_MARK = re.compile(r"<(image|video)>")


class RowError(DataError):
    """A row that cannot be used: the field at fault, a one-word reason of ``REASONS``, and what was found."""

    def __init__(self, field: str, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Media:
    """An image or video as a row gives it: the path of a file, or its bytes."""

    kind: MediaKind
    content: str | bytes
    field: str


@dataclass(frozen=True)
class Turn:
    """What one side says: text, and the kinds of the media that stand in it, in order."""

    role: str
    parts: tuple[str | Mapping[str, MediaKind], ...]
    field: str


@dataclass(frozen=True)
class Chat:
    """A row as it stands in its file. The media of each kind fill that kind's places in order."""

    id: str | None
    turns: tuple[Turn, ...]
    media: tuple[Media, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    responses: Mapping[str, str] = field(default_factory=dict)
    """``chosen`` and ``rejected`` of a preference pair; then the last turn is the user's."""


def place(kind: MediaKind) -> Mapping[str, MediaKind]:
    """Where an image or video stands inside a turn."""
    return {"type": kind}


def turn_of(message: Any, field_name: str, *, role_key: str, text_key: str, trims: bool) -> Turn:
    """The turn that a message of a conversation says. With ``trims``, white space beside marks is dropped."""
    if not isinstance(message, Mapping) or role_key not in message or text_key not in message:
        found = sorted(message) if isinstance(message, Mapping) else type(message).__name__
        raise RowError(field_name, "columns", f"a turn must have {role_key!r} and {text_key!r}; this has {found}")
    name, said = message[role_key], message[text_key]
    if name not in _ROLES:
        raise RowError(f"{field_name}.{role_key}", "role", f"{name!r} is not one of {', '.join(_ROLES)}")
    role, text_field = _ROLES[name], f"{field_name}.{text_key}"
    if message.get("tool_calls"):
        raise RowError(f"{field_name}.tool_calls", "role", "tool calls are not trained")
    if isinstance(said, str):
        return Turn(role, tuple(_marked(said, role, text_field, trims)), text_field)
    if isinstance(said, Sequence) and not isinstance(said, bytes):
        return Turn(role, tuple(_part(part, text_field) for part in said), text_field)
    raise RowError(text_field, "columns", f"is of type {type(said).__name__}; give text or a list of parts")


def _marked(text: str, role: str, field_name: str, trims: bool) -> Iterator[str | Mapping[str, MediaKind]]:
    pieces = _MARK.split(text)
    if len(pieces) > 1 and role == "assistant":
        raise RowError(field_name, "mark_in_answer", f"the answer {text[:80]!r} holds a mark")
    for number, piece in enumerate(pieces):
        if number % 2:
            yield place("image" if piece == "image" else "video")
        elif said := piece.strip() if trims and len(pieces) > 1 else piece:
            yield said


def _part(part: Any, field_name: str) -> str | Mapping[str, MediaKind]:
    """A part as Hugging Face and OpenAI write it; Arrow fills keys that a part lacks with None."""
    match {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image" | "image_url"}:
            return place("image")
        case {"type": "video"}:
            return place("video")
    raise RowError(field_name, "columns", f"the part {str(part)[:80]!r} is neither text, image nor video")


def listed(value: Any) -> list[Any]:
    """A column that holds one thing, several or none, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def media_of(tree: Mapping[str, Any], columns: Mapping[str, MediaKind]) -> tuple[Media, ...]:
    """The images and videos that these columns hold: paths, or ``{"bytes": ..., "path": ...}`` as in parquet."""
    for column in ("audio", "audios"):
        if listed(tree.get(column)):
            raise RowError(column, "media_kind", "audio is not supported")
    found = []
    for column, kind in columns.items():
        for number, one in enumerate(listed(tree.get(column))):
            name = f"{column}[{number}]" if isinstance(tree[column], list | tuple) else column
            if isinstance(one, Mapping):
                one = next((one[key] for key in ("bytes", "path") if one.get(key)), None)
                if one is None:  # how parquet says that a row has none
                    continue
            if isinstance(one, list | tuple):
                raise RowError(name, "media_kind", f"a {kind} of {len(one)} files; join its frames into one video file")
            if not isinstance(one, str | bytes) or not one:
                raise RowError(name, "columns", f"{str(one)[:80]!r} is neither a path nor bytes")
            found.append(Media(kind, one, name))
    return tuple(found)


def own_id(tree: Mapping[str, Any]) -> str | None:
    """The row's own id as text; None where it has none."""
    found = tree.get("id")
    if found is None or found == "":
        return None
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise RowError("id", "columns", f"{str(found)[:80]!r} is neither text nor a whole number")
    return str(found)
