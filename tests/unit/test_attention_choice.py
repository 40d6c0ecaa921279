"""What ``auto`` chooses and why; what a recipe that names a back end gets, and what is logged and refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.table import put_into, rows_of
from mimo_megatron import log
from mimo_megatron.attention import libraries
from mimo_megatron.attention.choice import TABLE, Choice, Measured, choose, measured, parse
from mimo_megatron.attention.libraries import Library
from mimo_megatron.config.check import check, library_attention_is_possible
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import RunConfig
from mimo_megatron.errors import ConfigError
from mimo_megatron.train import attention
from tests.repository import ROOT

H200 = "NVIDIA H200"
WINDOWS = Measured(H200, "vision windows", 80, 8192, {"sdpa": 1.0, "varlen": 0.9, "triton": 0.2}, "a.json")
FRAMES = Measured(H200, "vision frames", 80, 8192, {"sdpa": 2.0, "varlen": 3.0, "triton": 4.0}, "a.json")
LONG_FRAMES = replace(FRAMES, slots=32_768, milliseconds={"sdpa": 20.0, "varlen": 30.0, "triton": 99.0})
ROWS = (WINDOWS, FRAMES, LONG_FRAMES)
LAYERS = {"vision windows": 28, "vision frames": 4}
FREE = {"sdpa": None, "varlen": None, "flash": None, "triton": None}


def choice(**changes: Any) -> Choice:
    asked = dict(layers=LAYERS, head_width=80, slots=8192, device=H200, hindrances=FREE, rows=ROWS)
    return choose(**{**asked, **changes})


def test_the_least_time_over_all_layers_is_chosen() -> None:
    assert choice() == Choice(
        "triton", f"measured on {H200}, ms of a pack's layers: triton 21.6, sdpa 36, varlen 37.2 (a.json)"
    )
    assert choice(layers={"vision windows": 1, "vision frames": 4}).backend == "sdpa"


def test_the_row_of_the_nearest_pack_counts() -> None:
    assert choice(slots=16_000).backend == "triton"  # nearer to 8,192 by ratio
    assert choice(slots=32_768).backend == "sdpa"


def test_what_cannot_run_is_passed_over_and_told() -> None:
    found = choice(hindrances={**FREE, "triton": "triton is not installed"})
    assert found.backend == "sdpa" and found.why.endswith("triton would be faster, but triton is not installed")
    assert choice(hindrances={"sdpa": None}).backend == "sdpa"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": None}, "there is no GPU"),
        ({"device": "NVIDIA H100"}, "no row for vision windows with heads of 80 on NVIDIA H100"),
        ({"head_width": 64}, "no row for vision windows with heads of 64"),
        ({"rows": (WINDOWS,)}, "no row for vision frames"),
        ({"rows": ()}, "the default: the table has no row"),
    ],
)
def test_without_a_row_the_default_is_named(changes: dict[str, Any], why: str) -> None:
    found = choice(**changes)
    assert found.backend == "sdpa" and why in found.why


def test_the_committed_table_is_one() -> None:
    assert all(row.source for row in measured())


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"device": "x"}]}', '{"rows": [3]}'])
def test_a_file_that_is_no_table_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{TABLE.name}: not a table"):
        parse(text)


def test_a_row_without_the_default_is_refused() -> None:
    row = vars(replace(WINDOWS, milliseconds={"triton": 1.0}))
    with pytest.raises(ConfigError, match="that of sdpa among them"):
        parse(json.dumps({"rows": [row]}))


# ---- from a result file ----------------------------------------------------------------------------------------------


def result(rehearsal: bool = False) -> dict[str, Any]:
    key = ["vision windows", 80, 8192]
    ways = {"sdpa": 2.0, "triton": 1.0, "flash-attn-2": 0.5, "flash": 0.6}
    rows: list[dict[str, Any]] = [{"key": key, "way": way, "train": {"ms": ms}} for way, ms in ways.items()]
    rows += [{"key": key, "way": "varlen", "failed": "no image"}, {"way": "ops", "train": {"ms": 3.0}}]
    sections = {"kernels": {"data": {"rows": rows}}}
    return {"rehearsal": rehearsal, "device": {"name": H200}, "sections": sections}


def test_a_result_file_becomes_rows_and_newer_ones_replace_them(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"rows": []}')
    put_into(path, rows_of(result(), "first.json"))
    assert parse(path.read_text()) == (
        Measured(H200, "vision windows", 80, 8192, {"sdpa": 2.0, "triton": 1.0, "flash": 0.6}, "first.json"),
    )
    put_into(path, [{**vars(FRAMES)}, *rows_of(result(), "second.json")])
    assert [(row.op, row.source) for row in parse(path.read_text())] == [
        ("vision frames", "a.json"),
        ("vision windows", "second.json"),
    ]


def test_a_rehearsal_and_a_file_without_attention_enter_no_table() -> None:
    with pytest.raises(ConfigError, match="is a rehearsal"):
        rows_of(result(rehearsal=True), "x.json")
    with pytest.raises(ConfigError, match="no times of attention"):
        rows_of({**result(), "sections": {"kernels": {"status": "not run"}}}, "x.json")


# ---- in a run --------------------------------------------------------------------------------------------------------


def recipe(*overrides: str) -> RunConfig:
    return load_recipe(ROOT / "examples" / "recipes" / "mimo_vl_7b" / "stage2.yaml", overrides)


def found_library(backend: str, head_width: int, causal: bool) -> Library:
    """In the place of ``libraries.find``: all that are asked for."""
    return Library(f"{backend} for {head_width}", lambda q, *_: q, "flash-attn 4: no" if causal else "")


def test_a_recipe_with_auto_gets_what_the_table_says(monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    log.once.cache_clear()
    text = Measured(H200, "text causal", 128, 8192, {"sdpa": 2.0, "varlen": 1.5, "flash": 1.0}, "b.json")
    monkeypatch.setattr(attention, "measured", lambda: (*ROWS, text))
    monkeypatch.setattr(attention, "device_name", lambda: H200)
    monkeypatch.setattr(libraries, "find", found_library)
    monkeypatch.setattr(attention, "vision_kernel", lambda: None)
    asked = ("train.vision_attention=auto", "train.text_attention=auto")
    assert attention.chosen(recipe(*asked)) == ("triton", "flash")
    assert attention.chosen(recipe(*asked, "parallel.cp=2"))[1] == "flash"
    assert any(line.startswith("train.text_attention=auto: flash (measured on NVIDIA H200") for line in log_lines)
    assert "train.text_attention=flash: flash for 128 (flash-attn 4: no)" in log_lines
    # What the table prefers and this run cannot have.
    assert attention.chosen(recipe(*asked, "train.precision=fp32"))[1] == "sdpa"
    monkeypatch.setattr(libraries, "hindrance", lambda backend, *_: "no" if backend == "flash" else None)
    assert attention.chosen(recipe(*asked))[1] == "varlen"
    assert attention.chosen(recipe()) == ("sdpa", "sdpa")


def test_whose_kernels_a_named_back_end_is_goes_into_the_log_once(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    log.once.cache_clear()
    monkeypatch.setattr(libraries, "find", found_library)
    for _ in range(2):
        assert attention.chosen(recipe("train.vision_attention=flash", "train.text_attention=varlen")) == (
            "flash",
            "varlen",
        )
    assert log_lines == [
        "train.vision_attention=flash: flash for 80",
        "train.text_attention=varlen: varlen for 128 (flash-attn 4: no)",
    ]


@pytest.mark.parametrize(
    ("device", "changes", "is_warned"),
    [
        (H200, ("parallel.cp=2",), True),
        (H200, (), False),
        (H200, ("parallel.cp=2", "train.text_attention=varlen"), False),
        (None, ("parallel.cp=2",), False),
    ],
)
def test_sdpa_on_context_parallel_ranks_of_gpus_is_warned_of(
    device: str | None, changes: tuple[str, ...], is_warned: bool, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    log.once.cache_clear()
    monkeypatch.setattr(libraries, "find", found_library)
    monkeypatch.setattr(attention, "device_name", lambda: device)
    attention.chosen(recipe(*changes))
    assert any("masks pieces of context-parallel ranks" in line for line in log_lines) is is_warned


def test_without_a_gpu_auto_is_sdpa_and_varlen_and_flash_are_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert attention.chosen(recipe("train.vision_attention=auto", "train.text_attention=auto")) == ("sdpa", "sdpa")
    with pytest.raises(ConfigError, match=r"train\.text_attention=varlen, and torch sees no GPU: set train\.text_att"):
        attention.chosen(recipe("train.text_attention=varlen"))
    with pytest.raises(ConfigError, match=r"vision_attention=flash, and torch sees no GPU: install flash-attn-4"):
        attention.chosen(recipe("train.vision_attention=flash"))


def test_what_a_library_cannot_compute_is_a_mistake_of_the_recipe() -> None:
    def found(*overrides: str) -> list[str]:
        return list(library_attention_is_possible(recipe(*overrides), 2))

    for name in ("varlen", "flash"):
        both = (f"train.text_attention={name}", f"train.vision_attention={name}")
        assert not found(*both, "parallel.cp=2")
        assert [line.split(":")[-1] for line in found(*both, "train.precision=fp32")] == [
            " set train.vision_attention=sdpa",
            " set train.text_attention=sdpa",
        ]
        assert "has no vision encoder" in found(both[1], "model.vision=null")[0]
        wide = ("model.text.head_width=264", "model.text.mrope_section=[44, 44, 44]")
        assert "a multiple of 8, at most 256, and these are 264 wide" in found(both[0], *wide)[0]
    with pytest.raises(ConfigError, match="takes half precision"):
        check(recipe("train.text_attention=flash", "train.precision=fp32"), 2560)


def test_a_model_without_an_encoder_has_a_choice_for_its_text() -> None:
    assert attention.vision_choice(preset("mimo-7b-base"), 8192, H200, True).why == "the model has no vision encoder"
