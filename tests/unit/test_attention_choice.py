"""What ``auto`` chooses and why; the flash kernels of PyTorch asked for as they want it; both keys in a model."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.table import put_into, rows_of
from mimo_megatron.attention import varlen
from mimo_megatron.attention.choice import TABLE, Choice, Measured, choose, measured, parse
from mimo_megatron.attention.packed import Piece, causal_attention, varlen_attention
from mimo_megatron.attention.reference import reference_attention
from mimo_megatron.config.check import check, varlen_attention_is_possible
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
FREE = {"sdpa": None, "varlen": None, "triton": None}


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
    ways = {"sdpa": 2.0, "triton": 1.0, "flash-attn-2": 0.5}
    rows: list[dict[str, Any]] = [{"key": key, "way": way, "train": {"ms": ms}} for way, ms in ways.items()]
    rows += [{"key": key, "way": "varlen", "failed": "no image"}, {"way": "ops", "train": {"ms": 3.0}}]
    sections = {"kernels": {"data": {"rows": rows}}}
    return {"rehearsal": rehearsal, "device": {"name": H200}, "sections": sections}


def test_a_result_file_becomes_rows_and_newer_ones_replace_them(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"rows": []}')
    put_into(path, rows_of(result(), "first.json"))
    assert parse(path.read_text()) == (
        Measured(H200, "vision windows", 80, 8192, {"sdpa": 2.0, "triton": 1.0}, "first.json"),
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


def test_a_recipe_with_auto_gets_what_the_table_says(monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    text = Measured(H200, "text causal", 128, 8192, {"sdpa": 2.0, "varlen": 1.0}, "b.json")
    monkeypatch.setattr(attention, "measured", lambda: (*ROWS, text))
    monkeypatch.setattr(attention, "device_name", lambda: H200)
    monkeypatch.setattr(varlen, "problem", lambda: None)
    monkeypatch.setattr(attention, "vision_kernel", lambda: None)
    asked = ("train.vision_attention=auto", "train.text_attention=auto")
    assert attention.chosen(recipe(*asked)) == ("triton", "varlen")
    assert any(line.startswith("train.text_attention=auto: varlen (measured on NVIDIA H200") for line in log_lines)
    # What the table prefers and this run cannot have.
    assert attention.chosen(recipe(*asked, "train.precision=fp32"))[1] == "sdpa"
    assert attention.chosen(recipe(*asked, "parallel.cp=2"))[1] == "sdpa"
    assert attention.chosen(recipe()) == ("sdpa", "sdpa")


def test_without_a_gpu_auto_is_sdpa_and_varlen_is_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert attention.chosen(recipe("train.vision_attention=auto", "train.text_attention=auto")) == ("sdpa", "sdpa")
    with pytest.raises(ConfigError, match=r"train\.text_attention=varlen, and torch sees no GPU: set train\.text_att"):
        attention.chosen(recipe("train.text_attention=varlen"))


def test_what_varlen_cannot_compute_is_a_mistake_of_the_recipe() -> None:
    def found(*overrides: str) -> list[str]:
        return list(varlen_attention_is_possible(recipe(*overrides), 2))

    assert not found("train.text_attention=varlen", "train.vision_attention=varlen")
    assert "half precision" in found("train.vision_attention=varlen", "train.precision=fp32")[0]
    assert "parallel.cp (2) above 1" in found("train.text_attention=varlen", "parallel.cp=2")[0]
    assert "has no vision encoder" in found("train.vision_attention=varlen", "model.vision=null")[0]
    with pytest.raises(ConfigError, match=r"parallel\.cp \(2\) above 1"):
        check(recipe("train.text_attention=varlen", "parallel.cp=2"), 2560)


def test_a_model_without_an_encoder_has_a_choice_for_its_text() -> None:
    assert attention.vision_choice(preset("mimo-7b-base"), 8192, H200, True).why == "the model has no vision encoder"


# ---- PyTorch's flash kernels -----------------------------------------------------------------------------------------


def stand_in(**accepted: Any) -> Callable[..., Tensor]:
    """The definition behind the signature of one of torch's releases: the kernels themselves need a GPU."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert set(options) <= set(accepted), options
        assert cu_q.dtype == cu_k.dtype == torch.int32 and query.is_contiguous() and key.is_contiguous()
        assert query.shape[1] == key.shape[1] or options.get("enable_gqa")
        pieces = [Piece(start, end, start, end) for start, end in pairwise(cu_q.tolist())]
        assert max_q == max_k == max(piece.q_end - piece.q_start for piece in pieces)
        causal = options.get("is_causal", options.get("window_size") == (-1, 0))
        return reference_attention(query, key, value, pieces, causal=causal)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in accepted]
    attend.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return attend


RELEASES = {
    "2.10": dict(is_causal=False),
    "2.11": dict(scale=None, window_size=(-1, -1)),
    "2.12": dict(window_size=(-1, -1), enable_gqa=False),
}


@pytest.mark.parametrize("accepted", RELEASES.values(), ids=RELEASES)
def test_varlen_is_asked_for_as_each_torch_wants_it(accepted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in(**accepted))
    draw = torch.Generator().manual_seed(1)
    bounds = (0, 5, 5, 6, 19)
    q, k, v = (torch.randn(19, heads, 8, dtype=torch.float64, generator=draw) for heads in (4, 2, 2))
    pieces = [Piece(start, end, start, end) for start, end in pairwise(bounds)]
    got = causal_attention(q, k, v, pieces, backend="varlen")
    torch.testing.assert_close(got, causal_attention(q, k, v, pieces, backend="reference"))
    wide = torch.randn(19, 3, 4, 8, dtype=torch.float64, generator=draw)
    parts = wide.unbind(1)
    got = varlen_attention(*parts, bounds, backend="varlen")
    torch.testing.assert_close(got, varlen_attention(*parts, bounds, backend="reference"))
    assert varlen_attention(q[:0], k[:0], v[:0], (0,), backend="varlen").shape == (0, 4, 8)


def test_a_piece_of_a_segment_is_not_given_to_varlen() -> None:
    rows = torch.zeros(4, 1, 8)
    with pytest.raises(AssertionError, match="whole segments only"):
        causal_attention(rows[:2], rows, rows, [Piece(0, 2, 0, 4)], backend="varlen")


@pytest.mark.gpu
def test_varlen_on_a_gpu_is_near_the_definition() -> None:
    draw = torch.Generator("cuda").manual_seed(1)
    bounds = (0, 700, 701, 1300)
    for width, heads, key_heads in ((80, 16, 16), (128, 32, 8)):
        q, k, v = (
            torch.randn(1300, count, width, device="cuda", generator=draw).bfloat16()
            for count in (heads, key_heads, key_heads)
        )
        pieces = [Piece(start, end, start, end) for start, end in pairwise(bounds)]
        for got, want in (
            (
                causal_attention(q, k, v, pieces, backend="varlen"),
                causal_attention(q, k, v, pieces, backend="reference"),
            ),
            (
                varlen_attention(q, k, v, bounds, backend="varlen"),
                varlen_attention(q, k, v, bounds, backend="reference"),
            ),
        ):
            assert (got.double() - want.double()).norm() < 1e-2 * want.double().norm()
