"""``mimo-megatron prove``: the short matrix passes, and every planted fault fails it under its own name."""

import json
import os
import signal
from pathlib import Path

import pytest

from mimo_megatron.cli import main
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.prove import run
from mimo_megatron.prove.cases import FEATURES, LAYOUTS, REFUSALS, cases, refusal
from mimo_megatron.prove.faults import FAULTS
from mimo_megatron.prove.report import support_matrix
from mimo_megatron.prove.run import prove, refused
from tests.repository import ROOT

CASES = {case.name: case for case in cases(quick=False)}


@pytest.mark.slow
def test_the_short_matrix_equals_one_process_and_is_written_down(tmp_path: Path) -> None:
    assert main(["prove", "--quick", "--json", str(tmp_path / "proof.json"), "--matrix", str(tmp_path / "m.md")]) == 0
    results = json.loads((tmp_path / "proof.json").read_text())
    assert len(results["cases"]) >= 20 and all(one["equal"] for one in results["cases"])
    assert {one["feature"] for one in results["cases"]} >= {"mixed", "zero-image ranks"}
    assert (tmp_path / "m.md").read_text() == support_matrix(results)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process's outcomes are kept: a fault is planted in the ranks only."""
    return tmp_path_factory.mktemp("references")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_and_its_kind_is_named(fault, references: Path) -> None:
    (verdict,) = prove([CASES[fault.case]], references, fault.name)
    assert verdict.problem.startswith(fault.verdict), verdict


def die(address: RankAddress, *_: object) -> None:
    if address.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_rank_that_dies_fails_its_case_and_the_next_one_is_proven(
    monkeypatch: pytest.MonkeyPatch, references: Path
) -> None:
    case = CASES["dp2 · only projector"]
    monkeypatch.setattr(run, "errors", die)
    (died,) = prove([case], references)
    monkeypatch.undo()
    assert (died.errors, died.problem) == (None, "the ranks failed: process 1 terminated with signal SIGSEGV")
    assert [verdict.problem for verdict in prove([case], references)] == [""]


def test_a_planted_fault_ends_the_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "--only", "dp2 · only projector", "--fault", "encoder gradient divided by dp"]) == 1
    assert "how the encoder's gradient is summed over ranks" in capsys.readouterr().out


def test_an_unknown_fault_and_an_empty_choice_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "--fault", "x"]) == 2
    assert "splice" in capsys.readouterr().err
    assert main(["prove", "--only", "cp99"]) == 2


def test_refused_together_are_fp8_tiles_cut_four_ways_and_an_fp8_encoder_on_ranks_that_repeat_images() -> None:
    found = {(layout.name, feature.name) for layout in LAYOUTS for feature in FEATURES if refusal(layout, feature)}
    fields = {layout.name: layout.fields for layout in LAYOUTS}
    repeating = {name for name, one in fields.items() if one.get("cp", 1) > 1 and "vision_placement" not in one}
    in_four = {name for name, one in fields.items() if 4 in (one.get("tp"), one.get("cp"))}
    encoder = {(name, f"fp8 of {part}") for name in repeating for part in ("all parts", "the encoder, delayed")}
    assert found == encoder | {(name, "fp8 blockwise") for name in in_four}


def test_what_cannot_be_right_is_refused_by_name() -> None:
    assert [one.layout.name for one, said in refused(REFUSALS) if not said] == []


def test_the_matrix_has_every_axis_alone_and_together() -> None:
    layouts = [ParallelConfig(**layout.fields) for layout in LAYOUTS]
    for axis in ("tp", "pp", "vpp", "cp"):
        assert any(getattr(layout, axis) > 1 for layout in layouts)
    assert any(layout.tp > 1 and layout.pp > 1 and layout.cp > 1 for layout in layouts)
    assert {layout.ranks // one.model_ranks for layout, one in zip(LAYOUTS, layouts, strict=True)} >= {1, 2, 4}
    assert len(CASES) >= 40


def test_the_support_matrix_marks_what_differs_what_is_refused_and_what_was_not_run() -> None:
    layout, feature, other = LAYOUTS[0].name, FEATURES[0].name, FEATURES[1].name
    row = {"layout": layout, "feature": feature, "equal": False}
    results = {"cases": [row], "refused": [], "date": "", "python": "", "torch": "", "megatron-core": "", "seconds": 60}
    page = support_matrix(results | {"tolerances": {}, "refused_together": [[layout, FEATURES[2].name]]})
    assert f"| {layout} | {LAYOUTS[0].ranks} | ✗ | · | – | · |" in page and other in page


def test_the_committed_matrix_is_of_the_layouts_and_features_of_today_and_all_compose() -> None:
    results = json.loads((ROOT / "benchmarks/results/prove.json").read_text())
    assert (ROOT / "docs/support-matrix.md").read_text() == support_matrix(results)
    assert {(one["layout"], one["feature"]) for one in results["cases"]} == {
        (case.layout.name, case.feature.name) for case in CASES.values()
    }
    assert [one for one in results["cases"] if not one["equal"]] == []
