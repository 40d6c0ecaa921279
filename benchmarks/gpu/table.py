"""From a result file to the rows by which ``auto`` chooses a back end (``mimo_megatron/attention/choice.py``)."""

import json
from pathlib import Path
from typing import Any

from mimo_megatron.errors import ConfigError

BACKENDS = ("sdpa", "varlen", "flash", "triton")
"""Ways of the kernel table that a recipe can name."""
_SAME = ("device", "op", "head_width", "slots")


def rows_of(tree: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """One row for each attention and pack of the file. ``ConfigError`` for a rehearsal, or where none was timed."""
    if tree["rehearsal"]:
        raise ConfigError(f"{source} is a rehearsal: it measures nothing")
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in tree["sections"]["kernels"].get("data", {}).get("rows", []):
        if "key" in row and "train" in row and row["way"] in BACKENDS:
            found.setdefault(tuple(row["key"]), {})[row["way"]] = row["train"]["ms"]
    if not found:
        raise ConfigError(f"{source} has no times of attention: its section kernels is needed")
    device = tree["device"]["name"]
    return [
        {"device": device, "op": op, "head_width": width, "slots": slots, "milliseconds": times, "source": source}
        for (op, width, slots), times in found.items()
        if "sdpa" in times
    ]


def put_into(table: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of the same device, operation and size are replaced."""
    new = {tuple(row[key] for key in _SAME) for row in rows}
    kept = [row for row in json.loads(table.read_text())["rows"] if tuple(row[key] for key in _SAME) not in new]
    table.write_text(json.dumps({"rows": [*kept, *rows]}, indent=1) + "\n", encoding="utf-8")
