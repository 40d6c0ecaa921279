"""A folder of pictures and clips with captions: beside each ``NAME.jpg`` a ``NAME.txt``, ``.caption`` or ``.json``.

Or one ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and a caption column, as Hugging Face's imagefolder has
it. The JSON beside a picture is ``{"caption": ...}``, or a conversation as in ShareGPT. A caption becomes the answer to
the prompt given on the command line, or to the bare picture.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mimo_megatron.data.formats import sharegpt
from mimo_megatron.data.formats.base import Format, Row, files_with
from mimo_megatron.data.formats.chat import Chat, Media, RowError, Turn, place
from mimo_megatron.data.formats.json_rows import json_rows
from mimo_megatron.types import MediaKind

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
TABLES = ("metadata.jsonl", "metadata.csv")
BESIDE = (".txt", ".caption", ".json")
CAPTIONS = ("caption", "text", "description")


def files(path: Path) -> list[Path]:
    """The tables of captions where there are some, else the media files themselves."""
    tables = [path] if path.is_file() else [one for one in files_with(path, *TABLES) if one.name in TABLES]
    return tables or files_with(path, *IMAGES, *VIDEOS)


def rows(file: Path) -> Iterator[Row]:
    """A row of the table each; for a media file the one row that it and its caption make."""
    if file.name == "metadata.csv":
        with file.open(encoding="utf-8-sig", newline="") as table:
            yield from (Row(file, number, tree) for number, tree in enumerate(csv.DictReader(table), start=1))
    elif file.name == "metadata.jsonl":
        yield from (Row(file, number, tree) for number, tree in enumerate(json_rows(file), start=1))
    else:
        yield Row(file, 1, _beside(file))


def _beside(file: Path) -> Any:
    """The row of a media file: its own keys from the file beside it."""
    found = [file.with_suffix(suffix) for suffix in BESIDE if file.with_suffix(suffix).is_file()]
    if len(found) != 1:
        names = " and ".join(one.name for one in found) or f"no {', '.join(file.stem + one for one in BESIDE)}"
        return RowError("caption", "columns", f"beside {file.name} there is {names}; one of them must be")
    if found[0].suffix == ".json":
        trees = list(json_rows(found[0]))
        tree = trees[0] if len(trees) == 1 else None
        if not isinstance(tree, dict):
            return RowError("caption", "json", f"{found[0].name} holds no JSON object")
        return {**tree, "file_name": file.name}
    return {"file_name": file.name, "caption": found[0].read_text(encoding="utf-8", errors="surrogateescape").strip()}


def read(tree: Any) -> Chat:
    """A question that is the picture alone, and its caption; or the conversation that the JSON holds."""
    if not isinstance(tree, Mapping):
        raise RowError("", "json", f"the row is a {type(tree).__name__}, not an object")
    name = tree.get("file_name")
    if not isinstance(name, str) or not name:
        raise RowError("file_name", "columns", f"{str(name)[:80]!r} is not the name of a file")
    kind: MediaKind = "video" if name.lower().endswith(VIDEOS) else "image"
    meta = {key: value for key, value in tree.items() if key not in ("file_name", "id")}
    if any(tree.get(key) is not None for key in ("conversations", "messages")):
        return sharegpt.read({**meta, "id": tree.get("id") or name, kind: name})
    given = [key for key in CAPTIONS if isinstance(tree.get(key), str)]
    if len(given) != 1:
        raise RowError("caption", "columns", f"it must have one of {', '.join(CAPTIONS)}; it has {sorted(tree)}")
    turns = (Turn("user", (place(kind),), "file_name"), Turn("assistant", (tree[given[0]],), given[0]))
    del meta[given[0]]
    return Chat(str(tree.get("id") or name), turns, (Media(kind, name, "file_name"),), meta)


FOLDER = Format("folder", files, rows, read)
