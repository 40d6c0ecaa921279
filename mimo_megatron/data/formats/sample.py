"""From what a row says to a sample of ours: turns checked, media read and their headers looked at, boxes marked.

Invariants: what is written passes the strict reading of ``records``; the i-th file of a kind stands at the i-th place
of that kind; a row that cannot be used is a ``RowError`` with one of the ``REASONS``, never a sample that says less.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from PIL import Image

from mimo_megatron.data.formats.boxes import RESIZED_PIXELS, BoxFrame, holds_boxes, mark_boxes
from mimo_megatron.data.formats.chat import Chat, Media, RowError, Turn
from mimo_megatron.data.records import SampleError, record_of
from mimo_megatron.data.shards import ShardSample

_SUFFIX_OF_FORMAT = {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}
_OUR_MARKS = ("<|box|>", "<|box image", "<|/box", "<|point|>", "<|point image", "<|/point")


@dataclass(frozen=True)
class Reading:
    """How rows become samples, whatever their format."""

    roots: tuple[Path, ...] = ()
    """Folders that relative paths of media may count from; tried in order, before the folder of the row's file."""
    boxes: BoxFrame | None = None
    resized_pixels: tuple[int, int] = RESIZED_PIXELS
    prompt: str | None = None
    """Asked where a caption's question is a bare picture."""


def sample_of(
    chat: Chat, sample_id: str, key: str, file: Path, split: str | None, reading: Reading
) -> tuple[ShardSample, set[str]]:
    """The sample, and the names of keys that JSON cannot hold and that were left out of its meta."""
    _check_turns(chat)
    _check_counts(chat)
    members: dict[str, bytes] = {}
    opened = {kind: _opened(chat, kind, file, reading.roots, members) for kind in ("image", "video")}
    messages = list(_messages(chat, opened, reading))
    meta, left_out = _json_only(chat.meta)
    if taken := sorted({"id", "messages"} & set(meta)):  # ours: another conversation, say, than the one that was read
        raise RowError(taken[0], "columns", f"this format has no {taken[0]!r}, and in a sample it would replace ours")
    found_split = meta.pop("split", None) or split
    record = {"id": sample_id, "messages": messages, **meta, **chat.responses}
    if isinstance(found_split, str):
        record["split"] = found_split
    try:
        json.dumps(record, ensure_ascii=False).encode()
        record_of(record, sample_id)
    except UnicodeEncodeError as error:
        raise RowError("", "text", f"text that UTF-8 cannot hold: {error.reason} at {error.start}") from error
    except SampleError as error:
        raise RowError("", "columns", error.detail) from error
    return ShardSample(key, record, members), left_out


def _check_turns(chat: Chat) -> None:
    turns = list(chat.turns)
    if turns and turns[0].role == "system":
        del turns[0]
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            what = "two answers in a row" if number and turn.role == turns[number - 1].role == "assistant" else ""
            raise RowError(turn.field, "order", what or f"{turn.role} speaks where {expected} must")
    for turn in chat.turns:
        if not any(not isinstance(part, str) or part.strip() for part in turn.parts):
            raise RowError(turn.field, "empty", f"{turn.role} says nothing")
        if any(mark in part for part in turn.parts if isinstance(part, str) for mark in _OUR_MARKS):
            raise RowError(turn.field, "text", "holds our own marks for coordinates, which would be read as such")
    for field, response in chat.responses.items():
        if not response.strip():
            raise RowError(field, "empty", "the response says nothing")
    last = turns[-1].role if turns else "nobody"
    if last != ("user" if chat.responses else "assistant"):
        raise RowError(turns[-1].field if turns else "", "unanswered", f"the last turn is by {last}")


def _check_counts(chat: Chat) -> None:
    places = Counter(part["type"] for turn in chat.turns for part in turn.parts if not isinstance(part, str))
    files = Counter(one.kind for one in chat.media)
    for kind in ("image", "video"):
        if places[kind] != files[kind]:
            raise RowError(kind, "mark_count", f"{places[kind]} places in the text for {files[kind]} {kind} files")


@dataclass(frozen=True)
class _Opened:
    name: str
    size: tuple[int, int] | None
    """(height, width) of an image as stored."""


def _opened(chat: Chat, kind: str, file: Path, roots: Sequence[Path], members: dict[str, bytes]) -> Iterator[_Opened]:
    """The media of one kind in order; their bytes are put into ``members``."""
    found = []
    for number, media in enumerate(one for one in chat.media if one.kind == kind):
        content = media.content if isinstance(media.content, bytes) else _bytes_of(media, media.content, file, roots)
        suffix, size = _image_header(content, media) if kind == "image" else (_video_suffix(content, media), None)
        name = f"{kind}{number}.{suffix}"
        members[name] = content
        found.append(_Opened(name, size))
    return iter(found)


def _bytes_of(media: Media, name: str, file: Path, roots: Sequence[Path]) -> bytes:
    name = name.removeprefix("file://")
    if "://" in name[:16] or name.startswith("data:"):
        raise RowError(media.field, "media_kind", f"{name[:80]!r} is an address; fetch the file first")
    places = [Path(root, name) for root in (*roots, file.parent)]
    for path in places:
        if path.is_file():
            try:
                return path.read_bytes()
            except OSError as error:
                raise RowError(media.field, "media_unreadable", str(error)) from error
    raise RowError(
        media.field, "media_missing", f"{name!r} is in none of {', '.join(str(one.parent) for one in places)}"
    )


def _image_header(content: bytes, media: Media) -> tuple[str, tuple[int, int]]:
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = (image.format or "image").lower()
            return _SUFFIX_OF_FORMAT.get(kind, kind), (image.height, image.width)
    except Exception as fault:  # Pillow raises many kinds on damaged bytes
        raise RowError(media.field, "media_unreadable", f"an image of {len(content)} bytes: {fault}") from fault


def _video_suffix(content: bytes, media: Media) -> str:
    try:
        with av.open(io.BytesIO(content)) as container:
            if container.streams.video:
                names = container.format.name.split(",")
                return "mp4" if "mp4" in names else "webm" if "webm" in names else names[0]
    except av.FFmpegError as fault:
        raise RowError(media.field, "media_unreadable", f"a video of {len(content)} bytes: {fault}") from fault
    raise RowError(media.field, "media_unreadable", f"a file of {len(content)} bytes has no video stream")


def _messages(chat: Chat, opened: Mapping[str, Iterator[_Opened]], reading: Reading) -> Iterator[dict[str, Any]]:
    has_images = any(one.kind == "image" for one in chat.media)
    stored: tuple[int, int] | None = None
    for turn in chat.turns:
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, str):
                said = _with_boxes(part, stored, turn, reading) if has_images else part
                parts.append({"type": "text", "text": said})
            else:
                one = next(opened[part["type"]])
                stored = one.size or stored
                parts.append({"type": part["type"], part["type"]: one.name})
        if turn.role == "user" and reading.prompt and all(part["type"] != "text" for part in parts):
            parts.append({"type": "text", "text": reading.prompt})
        texts = [part["text"] for part in parts if part["type"] == "text"]
        yield {"role": turn.role, "content": texts[0] if len(texts) == len(parts) == 1 else parts}


def _with_boxes(text: str, stored: tuple[int, int] | None, turn: Turn, reading: Reading) -> str:
    if reading.boxes is not None:
        return mark_boxes(text, reading.boxes, stored, turn.field, reading.resized_pixels)
    if holds_boxes(text):
        raise RowError(turn.field, "box_frame", f"{text[:80]!r} holds boxes; say with --boxes what they count in")
    return text


def _json_only(meta: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The keys whose values JSON can hold, and the names of the others. Empty values say nothing and are left out."""
    kept, left_out = {}, set()
    for key, value in meta.items():
        if value is None:
            continue
        try:
            json.dumps(value, allow_nan=False)
            kept[str(key)] = value
        except (TypeError, ValueError):
            left_out.add(str(key))
    return kept, left_out
