"""The rows of a JSON array or of JSON lines, one at a time: a gigabyte of annotations is never held in memory.

A bad line of a JSONL file is a bad row. A bad element of an array ends the file: what follows it has no known start.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimo_megatron.data.formats.chat import RowError
from mimo_megatron.errors import DataError

_CHUNK = 1 << 16
_LONGEST_ROW = 1 << 26
"""Characters; a longer "row" is a file that lost a bracket, and would be read to its end to find out."""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def json_rows(path: Path) -> Iterator[Any]:
    """The elements of the array, or the objects of the lines, in order; a ``RowError`` in place of a bad line."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        if is_array(path):
            yield from _elements(path, file)
            return
        for line in file:
            if line.strip():
                try:
                    yield _DECODER.decode(line)
                except (ValueError, RecursionError) as error:
                    yield RowError("", "json", f"unreadable JSON: {error}")


def is_array(path: Path) -> bool:
    """Whether the file is one JSON array, by its first character."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        while character := file.read(1):
            if not character.isspace():
                return character == "["
    return False


def _elements(path: Path, file: io.TextIOBase) -> Iterator[Any]:
    reader = _Reader(path, file)
    reader.expect("[")
    if reader.peek() == "]":
        return
    while True:
        yield reader.value()
        if reader.expect(",]") == "]":
            break
    if reader.peek():
        reader.fail(f"text after the array: {reader.peek()!r}")


class _Reader:
    """A window over the text that holds the row being read."""

    def __init__(self, path: Path, file: io.TextIOBase) -> None:
        self._path, self._file = path, file
        self._text, self._at, self._num_rows = "", 0, 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def expect(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            self.fail(f"{' or '.join(characters)} expected, found {found!r}" if found else "the file ends here")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value; more text is read, twice as much each time, until it is whole."""
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
                # A number at the end of the window may go on, with digits, a point or an exponent.
                is_whole = not isinstance(found, int | float) or self._text[end : end + 1] in {*", ]", "\t", "\n", "\r"}
                if is_whole or not self._more():
                    self._at, self._num_rows = end, self._num_rows + 1
                    return found
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at > _LONGEST_ROW:
                    self.fail(f"no end within {_LONGEST_ROW:,} characters ({error})")
                if not self._more():
                    self.fail(str(error))

    def fail(self, problem: str) -> None:
        raise DataError(
            f"{self._path}: broken JSON after row {self._num_rows}: {problem}; mend it, or write JSON lines"
        )

    def _more(self) -> bool:
        more = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
