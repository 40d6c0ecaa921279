"""What ``auto`` chooses: the back end that was fastest on this device, by the committed table of measurements.

``measured.json`` holds one row for each device, operation and pack size: milliseconds of forward and backward by back
end, written from a result file of the GPU suite (docs/gpu-suite.md). Where the device has no row the choice is sdpa,
and says so; nothing is guessed from another device.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mimo_megatron.errors import ConfigError

TABLE = Path(__file__).with_name("measured.json")
DEFAULT = "sdpa"
Op = Literal["vision windows", "vision frames", "text causal"]


@dataclass(frozen=True)
class Measured:
    """Times on one device of one operation over one real pack."""

    device: str
    """As torch names it."""
    op: Op
    head_width: int
    slots: int
    """Of the pack: what a recipe's ``data.pack_tokens`` is compared with."""
    milliseconds: Mapping[str, float]
    """Forward and backward of one layer, by back end."""
    source: str
    """The result file."""


@dataclass(frozen=True)
class Choice:
    backend: str
    why: str


@cache
def measured() -> tuple[Measured, ...]:
    """The committed table. ``ConfigError`` where the file is not one."""
    return parse(TABLE.read_text(encoding="utf-8"))


def parse(text: str) -> tuple[Measured, ...]:
    try:
        rows = tuple(Measured(**row) for row in json.loads(text)["rows"])
        bad = [row for row in rows if DEFAULT not in row.milliseconds or min(row.milliseconds.values()) <= 0]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{TABLE}: not a table of measurements: {error}; restore it") from error
    if bad:
        raise ConfigError(f"{TABLE}: a row needs times above 0, that of {DEFAULT} among them: {bad[0]}")
    return rows


def choose(
    layers: Mapping[Op, int],
    head_width: int,
    slots: int,
    device: str | None,
    hindrances: Mapping[str, str | None],
    rows: Sequence[Measured],
) -> Choice:
    """The back end with the least time over ``layers`` (how many compute each operation), of those that can run.

    ``hindrances`` has every back end that the caller offers, with the reason where it cannot run here. ``device`` is
    None where there is no GPU.
    """
    if device is None:
        return Choice(DEFAULT, "there is no GPU")
    found = {op: _nearest(op, head_width, slots, device, rows) for op, count in layers.items() if count}
    missing = [op for op, row in found.items() if row is None]
    if missing or not found:
        what = f"{missing[0]} with heads of {head_width}" if missing else "this model"
        return Choice(DEFAULT, f"the default: the table has no row for {what} on {device}")
    chosen = {op: row for op, row in found.items() if row is not None}
    common = set.intersection(*(set(row.milliseconds) for row in chosen.values())) & set(hindrances)
    total = {name: sum(layers[op] * row.milliseconds[name] for op, row in chosen.items()) for name in common}
    ranking = sorted(total, key=lambda name: (total[name], name))
    best = next(name for name in ranking if hindrances[name] is None)
    sources = ", ".join(sorted({row.source for row in chosen.values()}))
    times = ", ".join(f"{name} {total[name]:.3g}" for name in ranking)
    faster = [f"{name} would be faster, but {hindrances[name]}" for name in ranking[: ranking.index(best)]]
    return Choice(best, "; ".join([f"measured on {device}, ms of a pack's layers: {times} ({sources})", *faster]))


def _nearest(op: Op, head_width: int, slots: int, device: str, rows: Sequence[Measured]) -> Measured | None:
    """The row whose pack is nearest in size, by ratio."""
    own = [row for row in rows if (row.device, row.op, row.head_width) == (device, op, head_width)]
    return min(own, key=lambda row: abs(math.log(row.slots / slots)), default=None)
