"""The page of a result file, from the file alone. What was not measured is told where its number would stand."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.gpu.targets import targets

Tree = dict[str, Any]


def markdown(tree: Tree) -> str:
    """The whole page."""
    parts = [_head(tree), f"## Targets\n{_targets(tree)}"]
    for name, section in tree["sections"].items():
        if section["status"] == "not asked for":
            continue
        title, body = _SECTIONS[name]
        parts.append(f"## {title}\n{_status(section)}")
        if section.get("data"):
            parts.append(body(section["data"]))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def summary(tree: Tree) -> str:
    """A few lines for a terminal: the state of each section, the rates of the training steps, the targets."""
    kind = "rehearsal, no measurement: " if tree["rehearsal"] else ""
    kind = "rehearsal, no measurement: " if tree["rehearsal"] else ""
    lines = [kind + str(tree.get("device", {}).get("name", "no device"))]
    for name, section in tree["sections"].items():
        error = f": {section['error']}" if section.get("error") else ""
        lines.append(f"  {name:12} {section['status']:14} {section.get('seconds', '')}{error[:300]}")
    for row in tree["sections"]["train"].get("data", {}).get("rows", []):
        if "tokens_per_second" in row:
            rate, share = f"{row['tokens_per_second']:,.0f} tokens/s", f"{row['mfu_of_gemm']:.1%}"
            wrong = f"; WRONG: {row['wrong']}" if row["wrong"] else ""
            lines.append(f"  {row['variant']}: {rate}, {share} of the measured matrix product{wrong}")
    for one in targets(tree):
        value = "" if one["value"] is None else f"{one['value']:.4g}, "
        lines.append(f"  {one['verdict']:12} {one['target']}: {value}aim {one['aim']} ({one['why']})")
    return "\n".join(lines)


def _targets(tree: Tree) -> str:
    return table(
        ["target", "value", "aim", "", "of"],
        ([one["target"], one["value"], one["aim"], one["verdict"], one["why"]] for one in targets(tree)),
    )


def _head(tree: Tree) -> str:
    device = tree.get("device", {})
    facts = {
        "device": device.get("name"),
        "commit": tree.get("commit"),
        "started (UTC)": tree.get("started"),
        "versions": ", ".join(f"{name} {version}" for name, version in tree.get("versions", {}).items()),
        "command": f"`{tree.get('command')}`",
    }
    title = f"# GPU suite: {device.get('name', 'no device')}"
    warning = (
        "\n\n**A rehearsal of the suite at tiny size: no number on this page is a measurement of anything.**"
        if tree["rehearsal"]
        else ""
    )
    return f"{title}{warning}\n\n" + table(["", ""], ([name, value] for name, value in facts.items()))


def _status(section: Tree) -> str:
    text = f"{section['status']}"
    if "seconds" in section:
        text += f", {section['seconds']} s of at most {section['budget_seconds']}"
    if section.get("error"):
        text += f". **{section['error']}**"
    states = [section.get(key) for key in ("gpu_before", "gpu_after")]
    clocks = [f"{one['clocks.sm']}, {one['power.draw']}, {one['temperature.gpu']} °C" for one in states if one]
    return text + (f". Before and after: {'; '.join(clocks)}." if clocks else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _ceilings(data: Tree) -> str:
    measured, sheet = data.get("ceilings", {}), data.get("sheet", {})
    names = {
        "bytes_per_second": ("copy, read and written", 1e9, "GB/s"),
        "flops_per_second": ("matrix product", 1e12, "TFLOP/s"),
        "fp8_flops_per_second": ("FP8 matrix product", 1e12, "TFLOP/s"),
    }
    return table(
        ["ceiling", "measured", "data sheet", ""],
        (
            [title, measured[name] / unit, sheet[name] / unit if name in sheet else None, suffix]
            for name, (title, unit, suffix) in names.items()
            if name in measured
        ),
    )


def _present(data: Tree) -> tuple[list[Tree], str]:
    """Rows of ways that were there, and a line that names the others."""
    rows = data.get("rows", [])
    names = [
        f"{one['op']} by {one['way']} ({one['absent']})" if "op" in one else f"{one['way']} ({one['absent']})"
        for one in rows
        if one.get("absent")
    ]
    absent = dict.fromkeys(names)
    return [one for one in rows if not one.get("absent")], f"\nAbsent: {'; '.join(absent)}." if absent else ""


def _correctness(data: Tree) -> str:
    def row(one: Tree) -> list[Any]:
        if one.get("failed"):
            return [one["op"], one["shape"], one["way"], "**failed**", None, one["failed"]]
        shares = [error / limit if limit else None for error, limit in _pairs(one)]
        worst = max((share for share in shares if share is not None), default=None)
        verdict = "yes" if one["ok"] else "**no**"
        return [one["op"], one["shape"], one["way"], verdict, worst, one["why"]]

    rows, absent = _present(data)
    text = (
        "Error from float64 as a share of what is allowed: 1.5 times that of the definition in the same dtype, "
        "3 times for PyTorch's attention.\n\n"
    )
    return text + table(["operation", "sizes", "way", "right", "worst share", ""], map(row, rows)) + absent


def _pairs(one: Tree) -> list[tuple[float, float]]:
    """Error and limit of each part; an error that was no number counts as infinite."""
    return [
        (float("inf") if error is None else error, one["limits"][part] or 0.0) for part, error in one["errors"].items()
    ]


def _packs(data: Tree) -> str:
    rows = data.get("packs", [])
    made = data.get("made", {})
    text = f"{made.get('samples')} samples with {made.get('jpegs')} JPEGs, written in {made.get('seconds')} s.\n\n"
    return text + table(
        ["pack", "slots", "tokens", "trained", "samples", "longest", "images", "patches", "TFLOP a step", "encoder"],
        (
            [one["class"], one["slots"], one["tokens"], one["trained"], one["samples"], one["longest"], one["images"],
             one["patches"], one["flops"]["total"] / 1e12, one["flops"]["vision"] / one["flops"]["total"]]
            for one in rows
        ),
    )  # fmt: skip


def _train(data: Tree) -> str:
    def row(one: Tree) -> list[Any]:
        if "tokens_per_second" not in one:
            return [one["variant"], *[None] * 10, one.get("failed") or one["skipped"]]
        peak = one["peak_bytes"]["allocated"] / 2**30 if one["peak_bytes"] else None
        flops, moved = one["flops"], one["differences"]
        said = f"loss {sum(one['first_losses']) / one['packs']:.3f} to {sum(one['last_losses']) / one['packs']:.3f}"
        said += f"; of {one['compared_with']}: " if one["compared_with"] != one["variant"] else ""
        said += ", ".join(f"{name} {value:.1e}" for name, value in moved.items()) if any(moved.values()) else ""
        return [
            one["variant"], one["tokens_per_second"], one["step_seconds"], one["encoder_seconds"],
            flops["vision"] / one["packs"] / 1e12, flops["text"] / one["packs"] / 1e12, one["tflops"],
            one["mfu_of_gemm"], one["mfu_of_sheet"], peak, one["planned_bytes"] / 2**30,
            f"**wrong: {one['wrong']}** {said}" if one["wrong"] else said,
        ]  # fmt: skip

    columns = ["variant", "tokens/s", "s a step", "s encoder alone", "TFLOP encoder", "TFLOP decoder", "TFLOP/s",
               "MFU of measured product", "MFU of data sheet", "GiB peak", "GiB planned", ""]  # fmt: skip
    text = (
        "Baseline: attention of encoder and decoder by sdpa, logits in a table, bf16. Behind a variant's losses: how "
        "far it is from the baseline, from the same weights on the same packs.\n\n"
    )
    parts = [text + table(columns, map(row, data.get("rows", [])))]
    refused = [one for one in data.get("attempts", []) if "failed" in one or "skipped" in one]
    for one in refused:
        parts.append(f"{one['class']}, recompute {one['recompute']}: {one.get('failed') or one['skipped']}")
    for one in data.get("encoder", []):
        parts.append(
            f"Encoder, forward and backward, {one['variant']}: {one['host_ms']:.4g} ms of the host, "
            f"{one['device_ms']:.4g} ms of kernels"
        )
    for one in data.get("profiles", []):
        if "failed" in one:
            parts.append(f"No profile of {one['variant']}: {one['failed']}")
            continue
        title = f"Top kernels, {one['variant']}: {one['device_ms']:.1f} ms of device time"
        kernels = table(
            ["kernel", "calls", "ms", "share"],
            ([f"`{k['name']}`", k["calls"], k["ms"], k["share"]] for k in one["kernels"]),
        )
        parts.append(f"{title}\n\n{kernels}")
    return "\n\n".join(parts)


def _kernels(data: Tree) -> str:
    def row(one: Tree) -> list[Any]:
        head = [one["op"], one["shape"], one["way"]]
        if "forward" not in one:
            return [*head, *[None] * 8, f"**{one['failed']}**"]
        found: list[Any] = []
        for part in ("forward", "train"):
            rates = one[part]
            found += [rates["ms"], rates.get("tflops"), rates["gbytes_per_second"], rates["of_ceiling"]]
        slow_host = [part for part in ("forward", "train") if one[part]["host_ms"] > one[part]["ms"]]
        return [*head, *found, f"bound by the host in {', '.join(slow_host)}" if slow_host else None]

    units = ["ms", "TFLOP/s", "GB/s", "of ceiling"]
    columns = [
        "operation",
        "sizes",
        "way",
        *(f"forward {unit}" for unit in units),
        *(f"both {unit}" for unit in units),
        "",
    ]
    rows, absent = _present(data)
    return table(columns, map(row, rows)) + absent


def _head_loss(data: Tree) -> str:
    rows, absent = _present(data)
    whole = {(one["way"], one["head_logits"]): one.get("ms") for one in rows if one["fraction"] == 1}

    def row(one: Tree) -> list[Any]:
        key = (one["way"], one["head_logits"])
        if "failed" in one:
            return [*key, one["fraction"], *[None] * 5, f"**{one['failed']}**"]
        per_row = one["ms"] / one["fraction"] / whole[key] if whole.get(key) else None
        counted, allocated = one["logits_bytes"], one["beside_gradients_bytes"]
        return [
            *key, one["fraction"], one["ms"], per_row,
            counted / one["table_bytes"] if counted is not None else None,
            allocated / one["table_bytes"] if allocated is not None else None, one["difference"], None,
        ]  # fmt: skip

    text = (
        "Forward and backward, from hidden states to both gradients. Memory over that of the logits of all rows in "
        "the measured dtype: logits as they were counted, and all that was allocated beside both gradients.\n\n"
    )
    columns = ["way", "head_logits", "slots trained", "ms", "a row's time, of all trained", "logits", "allocated",
               "difference from the table", ""]  # fmt: skip
    return text + table(columns, map(row, rows)) + absent


def _optimizer(data: Tree) -> str:
    rows, absent = _present(data)
    columns = ["way", "parameters", "ms", "times as fast", "GB/s", "of the copy", "difference of changes", ""]
    return table(
        columns,
        (
            [one["way"], one["parameters"], one.get("ms"), one.get("times_as_fast"), one.get("gbytes_per_second"),
             one.get("of_copy"), one.get("difference"), one.get("failed")]
            for one in rows
        ),
    ) + absent  # fmt: skip


def _fp8(data: Tree) -> str:
    def row(one: Tree) -> list[Any]:
        plain, ours, kernels, engine = one["bf16"], one["fp8"], one["kernels"], one["transformer_engine_fp8"]
        if "failed" in ours:
            return [one["linear"], one["shape"], plain["ms"], *[None] * 5, ours["failed"]]
        speed = [plain["ms"] / ours[kind]["ms"] for kind in ("products", "with_casts")]
        with_casts = [
            plain["ms"] / way["with_casts"]["ms"] if "with_casts" in way else None for way in (kernels, engine)
        ]
        said = {"kernels": kernels, "Transformer Engine": engine}
        notes = [f"{name}: {why}" for name, way in said.items() if (why := way.get("absent") or way.get("failed"))]
        error = max(value for way in (ours, kernels) for value in way.get("errors", {}).values())
        return [one["linear"], one["shape"], plain["ms"], *speed, *with_casts, error, "; ".join(notes) or None]

    columns = ["linear", "rows, inputs, outputs", "bf16 ms", "FP8 times as fast, products", "with casts",
               "by kernels", "Transformer Engine", "worst error", ""]  # fmt: skip
    rows, skipped = data.get("rows", []), data.get("skipped", [])
    text = table(columns, map(row, rows)) + (f"\nSkipped: {'; '.join(skipped)}." if skipped else "")
    rounding = [
        [one["linear"], name, way.get("ms"), way.get("gbytes_per_second"), way.get("of_copy")]
        for one in rows
        for name, way in one["kernels"].get("rounding", {}).items()
    ]
    if not rounding:
        return text
    columns = ["input of", "rounding", "ms", "GB/s of what must be moved", "of the copy"]
    return f"{text}\n\nRounding one operand, by kernel:\n\n{table(columns, rounding)}"


_SECTIONS: dict[str, tuple[str, Callable[[Tree], str]]] = {
    "ceilings": ("Ceilings", _ceilings),
    "correctness": ("Correctness", _correctness),
    "packs": ("Packs", _packs),
    "train": ("Training steps, 7B shape at reduced depth", _train),
    "kernels": ("Kernels", _kernels),
    "head": ("The head's loss", _head_loss),
    "optimizer": ("The optimizer's step", _optimizer),
    "fp8": ("FP8 against bf16, forward and backward", _fp8),
}
