"""What a picture or a video looks like, small enough for a page: data URIs of JPEGs, and what went wrong instead.

A file that is gone, damaged or too large is a remark on the page, never an error. Pixels are taken as stored.
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from PIL import Image

from mimo_megatron.errors import DataError

LONGEST_SIDE = 320
"""Pixels of a still on the page; larger ones are shown smaller."""
_MOST_BYTES = 64 * 2**20  # of a file that is read for the page
_MOST_PIXELS = 2**26  # of a picture that is decoded for it
_MOST_DECODED = 300  # frames, to come from a key frame to the one that is shown


@dataclass(frozen=True)
class Still:
    src: str
    width: int
    height: int
    """As stored, before it was made smaller."""
    caption: str = ""


def stills(reference: Any) -> tuple[Still, ...]:
    """The picture, or a video's first, middle and last frame. ``reference``: [kind, path, offset, bytes], as
    ``rollouts.jsonl`` has it. ``DataError`` where it names nothing that can be shown."""
    match reference:
        case ["image" | "video" as kind, str(path), int(offset), int(num_bytes)]:
            data = _bytes(Path(path), offset, num_bytes)
        case _:
            raise DataError("a medium whose place is not written as it should be")
    try:
        frames = [(_picture(data), "")] if kind == "image" else [(image, f"{at:.1f} s") for at, image in _frames(data)]
        return tuple(_still(image, caption) for image, caption in frames)
    # FFmpeg's errors, what PIL raises on damage, and what either makes of sizes that are not ones.
    except (av.FFmpegError, OSError, ValueError, SyntaxError, OverflowError, Image.DecompressionBombError) as error:
        raise DataError(f"{Path(path).name} cannot be read: {error}") from error


def _bytes(path: Path, offset: int, num_bytes: int) -> bytes:
    if not (0 <= offset < 2**62 and 0 < num_bytes <= _MOST_BYTES):
        raise DataError(f"{path.name}: {num_bytes:,} bytes at {offset:,} are not shown; the most is {_MOST_BYTES:,}")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)
    except (OSError, ValueError) as error:  # a path may hold what no file system takes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path.name} is not there any more ({reason})") from error


def _picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    _check_size(image.width, image.height)
    return image


def _frames(data: bytes) -> Iterator[tuple[float, Image.Image]]:
    """(seconds, frame): first, middle and last, each once; the first alone where the file tells no duration."""
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise DataError("a file without a video stream")
        stream = container.streams.video[0]
        _check_size(stream.codec_context.width, stream.codec_context.height)
        start, duration = container.start_time or 0, container.duration or 0
        shown: set[float] = set()
        for share in (0.0, 0.5, 1.0) if duration else (0.0,):
            at, image = _frame_at(container, stream, int(start + share * duration))
            if at not in shown:
                shown.add(at)
                yield at, image


def _frame_at(
    container: av.container.InputContainer, stream: av.VideoStream, microseconds: int
) -> tuple[float, Image.Image]:
    """The first frame at or after that time, or the last one before the stream or our patience ends."""
    container.seek(microseconds)
    found = None
    for number, frame in enumerate(container.decode(stream)):
        found = frame
        if (frame.time or 0.0) * 1e6 >= microseconds or number == _MOST_DECODED:
            break
    if found is None:
        raise DataError("a video without a frame that can be decoded")
    return found.time or 0.0, found.to_image()


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise DataError(f"a picture of {width:,} x {height:,} pixels is too large for the page")


def _still(image: Image.Image, caption: str) -> Still:
    width, height = image.size
    shown = image.convert("RGB")
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=85)
    return Still("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), width, height, caption)
