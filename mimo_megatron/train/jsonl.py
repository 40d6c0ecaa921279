"""Append-only JSONL files of a run that may be killed at any byte and resumed.

Invariants, tested: a torn last line never spoils the row written after it; cutting keeps exactly the rows up to a step,
and happens whole or not at all.
"""

import json
import os
from pathlib import Path
from typing import TextIO

from mimo_megatron.errors import DataError
from mimo_megatron.log import get_logger


def open_to_append(path: Path) -> TextIO:
    """The file, at the start of a line: one torn when an earlier run was killed stays alone on its own."""
    file = path.open("a", encoding="utf-8")
    if _last_byte(path) not in (b"", b"\n"):
        file.write("\n")
    return file


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        return file.read(1)


def keep_rows_until(path: Path, step: int, *, without: int | None = None) -> None:
    """Cut off the rows of steps after ``step``, and with a remark a torn last line; nothing where there is no file.

    ``without`` is the step of rows that name none; left out, such a row is an error.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row_step = row["step"] if without is None else row.get("step", without)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise DataError(
                    f"{path} line {number} is not a row of a step ({error}); mend or move the file, then resume"
                ) from error
            get_logger().warning("%s: dropped its last line, torn when the run stopped", path)
            continue
        if row_step <= step:
            kept.append(line)
    aside = path.with_suffix(".jsonl.tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
