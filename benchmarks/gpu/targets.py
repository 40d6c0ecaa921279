"""What the rows of a result file say about each target: value, aim and verdict, from the file alone.

A target whose rows are missing is not measured, and says why; nothing is estimated. Rows that failed, variants that
computed something else, and kernels that the section correctness found wrong count for nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]
Row = dict[str, Any]
FULL_WINDOWS, OURS, PART = "full windows", "triton", {"forward": "forward", "train": "forward and backward"}
FLASH, VARLEN, COMPILED = "flash-attn-2", "varlen", "torch.compile of the turn, flash"
HEADS_OF_OURS = ("triton", "chunked")
MOST_LOGITS, MOST_DEVIATION = 1 / 20, 0.10


class Missing(Exception):
    """Why a value cannot be told."""


@dataclass(frozen=True)
class Target:
    name: str
    aim: float
    find: Callable[[Tree], tuple[float, str]]
    """The value and what it is of; raises ``Missing``."""
    at_least: bool = True

    def judged(self, tree: Tree) -> Row:
        head = {"target": self.name, "aim": f"{'>=' if self.at_least else '<='} {self.aim:g}"}
        try:
            value, note = self.find(tree)
        except Missing as reason:
            return {**head, "value": None, "verdict": "not measured", "why": str(reason)}
        is_met = value >= self.aim if self.at_least else value <= self.aim
        verdict = "rehearsal" if tree["rehearsal"] else "met" if is_met else "missed"
        return {**head, "value": value, "verdict": verdict, "why": note}


def targets(tree: Tree) -> list[Row]:
    """In the order of the page."""
    return [target.judged(tree) for target in _TARGETS]


def rows_of(tree: Tree, section: str, kind: str = "rows") -> list[Row]:
    """``Missing`` where the section has none."""
    own = tree["sections"].get(section, {"status": "not asked for"})
    found = own.get("data", {}).get(kind, [])
    if not found:
        raise Missing(f"section {section} has no {kind}: {own['status']}{_because(own.get('error'))}")
    return found


def _because(reason: str | None) -> str:
    return f" ({reason[:200]})" if reason else ""


def _only(rows: Sequence[Row], what: str) -> Row:
    if not rows:
        raise Missing(f"no row of {what}")
    return rows[0]


# ---- attention -------------------------------------------------------------------------------------------------------


def _timed(tree: Tree, case: str) -> dict[str, Row]:
    """By way, those of a case of the encoder's attention that were timed."""
    rows = [row for row in rows_of(tree, "kernels") if row.get("case") == case and row["op"] == "vision attention"]
    _only(rows, f"vision attention of {case}")
    return {row["way"]: row for row in rows}


def _ours(found: dict[str, Row], tree: Tree, case: str) -> Row:
    own = found.get(OURS, {"failed": "no row"})
    if "forward" not in own:
        raise Missing(f"{OURS} was not timed on {case}{_because(own.get('failed') or own.get('absent'))}")
    checked = tree["sections"].get("correctness", {}).get("data", {}).get("rows", [])
    mine = [row for row in checked if row["op"] == "vision attention" and row["way"] == OURS and "absent" not in row]
    if not mine:
        raise Missing(f"whether {OURS} is right was not checked")
    wrong = [row for row in mine if not row.get("ok")]
    if wrong:
        raise Missing(f"{OURS} is wrong{_because(wrong[0].get('failed') or wrong[0].get('why'))}")
    return own


def _flash(found: dict[str, Row], *, faster_of_both: bool) -> dict[str, Row]:
    """The flash ways that were timed; torch's varlen counts always, or where flash-attn 2 is not there."""
    names = [FLASH, COMPILED]
    if faster_of_both or "forward" not in found.get(FLASH, {}):
        names.append(VARLEN)
    timed = {name: found[name] for name in names if "forward" in found.get(name, {})}
    if not timed:
        reasons = {name: found.get(name, {"absent": "no row"}) for name in (FLASH, VARLEN)}
        told = "; ".join(f"{name}: {row.get('absent') or row.get('failed')}" for name, row in reasons.items())
        raise Missing(f"neither flash-attn 2 nor torch's varlen was timed: {told}")
    return timed


def _milliseconds(row: Row, part: str) -> float:
    """Of the backward alone as the difference of what is measured."""
    return row["train"]["ms"] - row["forward"]["ms"] if part == "backward" else row[part]["ms"]


def _times_as_fast(case: str, part: str, *, faster_of_both: bool) -> Callable[[Tree], tuple[float, str]]:
    def find(tree: Tree) -> tuple[float, str]:
        found = _timed(tree, case)
        own, flash = _ours(found, tree, case), _flash(found, faster_of_both=faster_of_both)
        times = {name: _milliseconds(row, part) for name, row in flash.items()}
        name = min(times, key=lambda one: times[one])
        note = f"{_milliseconds(own, part):.4g} ms against {times[name]:.4g} of {name}"
        if "forward" not in found.get(FLASH, {}):
            note += "; flash-attn 2 is not installed, torch's varlen, the same kernels inside PyTorch, stands for it"
        return times[name] / _milliseconds(own, part), note

    return find


def _of_copy(part: str) -> Callable[[Tree], tuple[float, str]]:
    def find(tree: Tree) -> tuple[float, str]:
        own = _ours(_timed(tree, FULL_WINDOWS), tree, FULL_WINDOWS)[part]
        return own["of_copy"], f"{own['ms']:.4g} ms, {own['gbytes_per_second']:,.0f} GB/s"

    return find


# ---- the head's loss -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    name: str
    logits: float
    """Bytes at the most, over those of the table of all rows."""
    deviation: float
    """The largest, over the shares, of a row's time from that of a row where all slots are trained."""


def _heads(tree: Tree) -> list[_Head]:
    timed = [row for row in rows_of(tree, "head") if row["way"] in HEADS_OF_OURS and "ms" in row]
    found = []
    for key in dict.fromkeys((row["way"], row["head_logits"]) for row in timed):
        own = {row["fraction"]: row for row in timed if (row["way"], row["head_logits"]) == key}
        whole = own.pop(1.0, None)
        if whole is None or not own or whole["logits_bytes"] is None:
            continue
        per_row = {fraction: row["ms"] / fraction / whole["ms"] for fraction, row in own.items()}
        deviation = max(abs(share - 1) for share in per_row.values())
        logits = whole["logits_bytes"] / whole["table_bytes"]
        found.append(_Head(f"{key[0]}, head_logits {key[1]:,}", logits, deviation))
    if not found:
        reasons = [row.get("failed") or row.get("absent") for row in rows_of(tree, "head") if "ms" not in row]
        raise Missing(f"no way of ours was timed on all slots and on fewer{_because(next(iter(reasons), None))}")
    return found


def _chosen_head(tree: Tree) -> _Head:
    """One way for both targets: of those with few logits the most proportional; else the one with fewest."""
    found = _heads(tree)
    small = [one for one in found if one.logits <= MOST_LOGITS]
    return min(small, key=lambda one: one.deviation) if small else min(found, key=lambda one: one.logits)


def _head_memory(tree: Tree) -> tuple[float, str]:
    one = _chosen_head(tree)
    return one.logits, one.name


def _head_time(tree: Tree) -> tuple[float, str]:
    one = _chosen_head(tree)
    return one.deviation, f"{one.name}: the largest deviation of a row's time, of three shares"


# ---- steps -----------------------------------------------------------------------------------------------------------


def _right_steps(tree: Tree, packs: str) -> list[Row]:
    """``Missing`` where no variant of that class of packs was measured and right."""
    rows = [row for row in rows_of(tree, "train") if row["class"] == packs]
    right = [row for row in rows if "tokens_per_second" in row and not row["wrong"]]
    if not right:
        reasons = [row.get("failed") or row.get("skipped") or row.get("wrong") for row in rows]
        raise Missing(f"no step on {packs} packs was measured and right{_because(next(iter(reasons), None))}")
    return right


def _without_fp8(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["ways"]["fp8"] is None]


def _mfu(tree: Tree) -> tuple[float, str]:
    rows = _without_fp8(_right_steps(tree, "8K"))
    best = max(rows, key=lambda row: row["mfu_of_gemm"]) if rows else _only(rows, "a step on 8K packs without FP8")
    return best["mfu_of_gemm"], f"{best['variant']}; {best['layers']} decoder layers, not all of the model's"


def _against_text(tree: Tree) -> tuple[float, str]:
    text = _without_fp8(_right_steps(tree, "8K text"))
    pairs = [
        (row, other)
        for row in _without_fp8(_right_steps(tree, "8K"))
        for other in text
        if row["ways"] == other["ways"] and row["recompute"] == other["recompute"]
    ]
    if not pairs:
        raise Missing("no variant was measured and right on packs with images and on packs of text alone")
    vlm, alone = max(pairs, key=lambda pair: pair[0]["mfu_of_gemm"])
    note = f"{vlm['mfu_of_gemm']:.3f} with images, {alone['mfu_of_gemm']:.3f} of text alone; {vlm['variant']}"
    return vlm["mfu_of_gemm"] / alone["mfu_of_gemm"], note


def _fp8_step(tree: Tree) -> tuple[float, str]:
    rows = _right_steps(tree, "8K")
    pairs = list(_fp8_pairs(rows))
    if not pairs:
        told = [row for row in rows_of(tree, "train") if row["ways"]["fp8"] is not None]
        reasons = [row.get("failed") or row.get("skipped") or row.get("wrong") for row in told]
        raise Missing(f"no step in FP8 was measured and right, beside its like{_because(next(iter(reasons), None))}")
    ratio, name = max(pairs)
    return ratio, f"{name}, against the same without FP8"


def _fp8_pairs(rows: Sequence[Row]) -> Iterator[tuple[float, str]]:
    for row in rows:
        for other in _without_fp8(rows) if row["ways"]["fp8"] is not None else ():
            if other["ways"] == {**row["ways"], "fp8": None} and other["recompute"] == row["recompute"]:
                yield row["tokens_per_second"] / other["tokens_per_second"], row["variant"]


def _encoder_host(tree: Tree) -> tuple[float, str]:
    *_, last = rows_of(tree, "train", "encoder")
    if not last["device_ms"]:
        raise Missing("the profiler saw no kernel of the encoder")
    note = f"host {last['host_ms']:.4g} ms, kernels {last['device_ms']:.4g} ms; {last['variant']}"
    return last["host_ms"] / last["device_ms"], note


_TARGETS = (
    *(
        Target(
            f"windows of 64, turn included, {said}: times as fast as flash-attn 2",
            2.0,
            _times_as_fast(FULL_WINDOWS, part, faster_of_both=False),
        )
        for part, said in PART.items()
    ),
    *(
        Target(f"windows of 64, turn included, {said}: share of the copy's bytes/s", 0.70, _of_copy(part))
        for part, said in PART.items()
    ),
    *(
        Target(
            f"{case}, {part}: times as fast as the faster of flash-attn 2 and varlen",
            aim,
            _times_as_fast(case, part, faster_of_both=True),
        )
        for case in ("frames, 8K pack", "frames, 32K pack")
        for part, aim in (("forward", 1.15), ("backward", 1.10))
    ),
    Target("head's loss: logits in memory, of the table's", MOST_LOGITS, _head_memory, at_least=False),
    Target("head's loss: time of a trained row, deviation", MOST_DEVIATION, _head_time, at_least=False),
    Target("whole step on 8K packs, encoder trained: MFU of the measured product", 0.50, _mfu),
    Target("MFU with images over MFU of text alone, 8K slots", 0.92, _against_text),
    Target("step in FP8: times as fast as in bf16", 1.25, _fp8_step),
    Target("encoder: the host's time over its kernels'", 1.0, _encoder_host, at_least=False),
)
