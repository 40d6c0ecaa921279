"""Targets from rows: met, missed or not measured with the reason; rows that are wrong or missing count for nothing."""

import copy
from typing import Any

import pytest

from benchmarks.gpu import case
from benchmarks.gpu.targets import COMPILED, FULL_WINDOWS, targets

Tree = dict[str, Any]
WAYS = {"vision": "sdpa", "text": "sdpa", "head": "logits", "fp8": None}


def attention(name: str, way: str, forward: float, train: float, of_copy: float = 0.8) -> Tree:
    parts = {"forward": forward, "train": train}
    timed = {part: {"ms": ms, "of_copy": of_copy, "gbytes_per_second": 3000.0} for part, ms in parts.items()}
    return {"op": "vision attention", "case": name, "way": way, **timed}


def head(way: str, head_logits: int | None, fraction: float, ms: float, logits: int) -> Tree:
    counted = logits if fraction == 1 else None
    sizes = {"table_bytes": 1000, "logits_bytes": counted}
    return {"way": way, "head_logits": head_logits, "fraction": fraction, "ms": ms, **sizes}


def step(packs: str, rate: float, mfu: float, wrong: str = "", **ways: str) -> Tree:
    name = f"{packs}, {ways or 'baseline'}"
    return {
        "class": packs, "variant": name, "ways": {**WAYS, **ways}, "recompute": "none", "tokens_per_second": rate,
        "mfu_of_gemm": mfu, "wrong": wrong, "layers": 8,
    }  # fmt: skip


def tree() -> Tree:
    """Of a run in which every target is met."""
    rows = {
        "correctness": {"rows": [{"op": "vision attention", "way": "triton", "ok": True, "why": ""}]},
        "kernels": {
            "rows": [
                attention("full windows", "triton", 1.0, 3.0),
                attention("full windows", "flash-attn-2", 2.2, 6.5),
                attention("full windows", COMPILED, 2.1, 6.1),
                attention("full windows", "varlen", 1.5, 4.0),
                *(attention(f"frames, {size} pack", "triton", 1.0, 3.0) for size in ("8K", "32K")),
                *(attention(f"frames, {size} pack", "flash-attn-2", 1.4, 3.9) for size in ("8K", "32K")),
                *(attention(f"frames, {size} pack", "varlen", 1.2, 3.5) for size in ("8K", "32K")),
            ]
        },
        "head": {
            "rows": [
                *(head("logits", None, part, 8 * part, 3000) for part in (1.0, 0.5)),
                *(head("triton", 64, part, 10 * part, 40) for part in (1.0, 0.5)),
                *(head("chunked", 64, part, 12 * part + (part < 1), 45) for part in (1.0, 0.5)),
            ]
        },
        "train": {
            "rows": [
                step("8K", 100, 0.45),
                step("8K", 120, 0.54, vision="triton"),
                step("8K", 900, 0.99, wrong="tokens 5e-01 over 5e-02", text="triton"),
                step("8K text", 130, 0.57, vision="triton"),
                step("8K", 153.6, 0.7, vision="triton", fp8="scaled_mm"),
            ],
            "encoder": [
                {"variant": "baseline", "host_ms": 9.0, "device_ms": 5.0},
                {"variant": "best", "host_ms": 4.0, "device_ms": 5.0},
            ],
        },
    }
    sections = {name: {"status": "done", "data": data} for name, data in rows.items()}
    return {"rehearsal": False, "sections": sections}


def found(of: Tree, words: str) -> Tree:
    (one,) = [one for one in targets(of) if words in one["target"]]
    return one


def test_every_target_is_met_where_its_rows_say_so() -> None:
    values = {one["target"]: (one["verdict"], one["value"]) for one in targets(tree())}
    assert {verdict for verdict, _ in values.values()} == {"met"}, values
    assert [pytest.approx(value) for _, value in values.values()] == [
        2.1, 6.1 / 3, 0.8, 0.8, 1.2, 2.3 / 2, 1.2, 2.3 / 2, 0.04, 0.0, 0.54, 0.54 / 0.57, 1.28, 0.8,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "section", "change", "value"),
    [
        ("windows of 64, turn included, forward: times", "kernels", {0: {"ms": 1.1}}, 2.1 / 1.1),
        ("windows of 64, turn included, forward: share", "kernels", {0: {"of_copy": 0.69}}, 0.69),
        ("frames, 8K pack, forward", "kernels", {4: {"ms": 1.1}}, 1.2 / 1.1),
        ("frames, 8K pack, backward", "kernels", {4: {"ms": 0.5}}, 2.3 / 2.5),
    ],
)
def test_a_slower_kernel_misses(words: str, section: str, change: dict[int, Tree], value: float) -> None:
    one = tree()
    for number, values in change.items():
        one["sections"][section]["data"]["rows"][number]["forward"] |= values
    judged = found(one, words)
    assert judged["verdict"] == "missed" and judged["value"] == pytest.approx(value)


def test_varlen_stands_for_flash_attention_where_that_is_not_installed_and_is_named() -> None:
    one = tree()
    rows = one["sections"]["kernels"]["data"]["rows"]
    rows[1] = {"op": "vision attention", "case": FULL_WINDOWS, "way": "flash-attn-2", "absent": "not installed"}
    judged = found(one, "windows of 64, turn included, forward: times")
    assert judged["value"] == pytest.approx(1.5) and judged["verdict"] == "missed"
    assert "varlen, the same kernels inside PyTorch, stands for it" in judged["why"]
    for number in (2, 3):
        rows[number] = {**rows[1], "way": rows[number]["way"], "absent": "needs a GPU"}
    judged = found(one, "windows of 64, turn included, forward: times")
    assert judged["verdict"] == "not measured" and "varlen: needs a GPU" in judged["why"]


def test_a_wrong_kernel_meets_no_target() -> None:
    one = tree()
    one["sections"]["correctness"]["data"]["rows"][0] |= {"ok": False, "why": "gradient 0 1e-1 over 1e-2"}
    of_kernels = [judged for judged in targets(one) if "windows" in judged["target"] or "frames" in judged["target"]]
    assert len(of_kernels) == 8
    assert {judged["verdict"] for judged in of_kernels} == {"not measured"}
    assert all("triton is wrong (gradient 0 1e-1 over 1e-2)" in judged["why"] for judged in of_kernels)
    one["sections"]["correctness"]["data"]["rows"] = [{"op": "RMSNorm", "way": "ops", "ok": True}]
    assert "was not checked" in found(one, "windows of 64, turn included, forward: share")["why"]


def test_one_way_of_the_head_is_judged_for_memory_and_for_time() -> None:
    one = tree()
    rows = one["sections"]["head"]["data"]["rows"]
    rows[2]["logits_bytes"] = 60  # of triton, where all slots are trained: now chunked alone is small enough
    memory, time = found(one, "logits in memory"), found(one, "a trained row")
    assert memory["value"] == pytest.approx(0.045) and memory["verdict"] == "met" and "chunked" in memory["why"]
    assert time["value"] == pytest.approx(1 / 6) and time["verdict"] == "missed" and "chunked" in time["why"]
    rows[4]["logits_bytes"] = 80
    assert found(one, "logits in memory")["verdict"] == "missed"
    del rows[1:]
    assert "no way of ours was timed on all slots and on fewer" in found(one, "a trained row")["why"]


def test_wrong_variants_and_those_in_fp8_do_not_count_as_mfu() -> None:
    one = tree()
    rows = one["sections"]["train"]["data"]["rows"]
    assert found(one, "MFU of the measured product")["value"] == 0.54
    rows[1]["wrong"] = "loss 1e-1 over 2e-3"
    assert found(one, "MFU of the measured product")["value"] == 0.45
    assert found(one, "MFU of the measured product")["verdict"] == "missed"
    assert "no variant" in found(one, "MFU of text alone")["why"]
    assert "beside its like" in found(one, "step in FP8")["why"]


def test_the_encoders_host_is_that_of_the_last_look_at_it() -> None:
    one = tree()
    one["sections"]["train"]["data"]["encoder"].pop()
    judged = found(one, "the host's time")
    assert judged["value"] == pytest.approx(1.8) and judged["verdict"] == "missed"


@pytest.mark.parametrize("section", ["kernels", "head", "train"])
def test_what_was_not_run_is_not_measured_and_says_why(section: str) -> None:
    one = tree()
    one["sections"][section] = {"status": "failed", "error": "ended after 190 s"}
    judged = [judged for judged in targets(one) if judged["verdict"] != "met"]
    assert judged and {one["verdict"] for one in judged} == {"not measured"}
    assert all(f"section {section} has no" in one["why"] and "ended after 190 s" in one["why"] for one in judged)
    del one["sections"][section]
    assert "not asked for" in next(judged for judged in targets(one) if judged["verdict"] != "met")["why"]


def test_failed_rows_say_why_nothing_was_measured() -> None:
    one = tree()
    rows = one["sections"]["train"]["data"]["rows"]
    head = {"class": "8K", "recompute": "none", "variant": "8K, fp8 scaled_mm"}
    rows[:] = [{**head, "ways": {**WAYS, "fp8": "scaled_mm"}, "failed": "ConfigError: no FP8 products"}]
    assert "ConfigError: no FP8 products" in found(one, "MFU of the measured product")["why"]
    rows.append(step("8K", 100, 0.45))
    assert "ConfigError: no FP8 products" in found(one, "step in FP8")["why"]


def test_a_rehearsal_meets_nothing() -> None:
    one = {**tree(), "rehearsal": True}
    assert {judged["verdict"] for judged in targets(one)} == {"rehearsal"}


def test_targets_change_no_row() -> None:
    one = tree()
    before = copy.deepcopy(one)
    targets(one)
    assert one == before


def test_names_are_those_of_the_rows() -> None:
    assert (FULL_WINDOWS, COMPILED) == (case.FULL_WINDOWS, case.COMPILED_FLASH)
