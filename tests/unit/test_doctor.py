"""What the doctor says of this machine, and of planted faults."""

import json
import sys
from pathlib import Path

import pytest

from mimo_megatron import doctor, platform
from mimo_megatron.cli import main
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.run import OptimizerConfig
from mimo_megatron.doctor import (
    TOPICS,
    Finding,
    as_json,
    examine,
    has_fault,
    judge_dali,
    judge_energon,
    judge_flash,
    judge_fp8,
    judge_gpu_package,
    judge_megatron,
    judge_memory,
    judge_python,
    judge_requirements,
    judge_torchvision,
)
from mimo_megatron.mcore import adam
from mimo_megatron.mcore.fp8 import rounding_name
from mimo_megatron.mcore.layers import fp8_engine, layer_backend


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def test_this_machine_can_run_the_package(findings: list[Finding]) -> None:
    assert [one for one in findings if one.status == "fault"] == []


def test_backends_are_those_the_package_chooses(findings: list[Finding]) -> None:
    found = {one.name: one.found for one in findings if one.topic == "backends"}
    here = platform.current()
    assert (found["device"], found["collectives"]) == (here.kind, here.backend)
    assert found["decoder layers"] == layer_backend()
    assert found["optimizer"] == f"auto is AdamW of {adam.chosen(OptimizerConfig())}"
    assert found["FP8 rounding"] == f"auto is {rounding_name(Fp8Config(), 'scaled_mm')}"
    assert found["FP8 products"].startswith(f"current: {fp8_engine(Fp8Config())}, delayed: ")


def test_every_finding_belongs_to_a_topic_and_every_fault_would_have_a_remedy(findings: list[Finding]) -> None:
    assert {one.topic for one in findings} == set(TOPICS)
    assert {"Python", "torch", "megatron-core", "C++ packing", "CPU cores", "memory", "disk"} <= {
        one.name for one in findings
    }


def test_json_holds_every_finding(findings: list[Finding]) -> None:
    assert [Finding(**row) for row in json.loads(as_json(findings))] == findings


def test_python_outside_the_tested_range_is_a_fault() -> None:
    assert [judge_python(version).status for version in ((3, 10), (3, 11), (3, 12), (3, 13))] == [
        "fault",
        "ok",
        "ok",
        "fault",
    ]


def test_megatron_on_python_311_is_explained() -> None:
    assert "0.17 and later ask for 3.12" in judge_megatron("0.16.1", (3, 11)).why
    assert judge_megatron("0.19.0", (3, 12)).why == ""
    assert judge_megatron(None, (3, 12)).status == "fault"


def test_a_torchvision_that_does_not_load_is_a_fault_with_a_remedy() -> None:
    bad = judge_torchvision("0.28.0", "2.13.0+cpu", "RuntimeError: operator torchvision::nms does not exist")
    assert bad.status == "fault" and "uninstall torchvision" in bad.remedy and "nms" in bad.why
    assert judge_torchvision("0.28.0", "2.13.0", None).status == judge_torchvision(None, "2.13.0", None).status == "ok"


def test_a_gpu_package_that_does_not_import_is_a_fault_and_a_missing_one_a_note() -> None:
    assert judge_gpu_package("flash-attn", "packed attention", "2.8", "undefined symbol").status == "fault"
    assert judge_gpu_package("flash-attn", "packed attention", None, None).status == "note"
    assert judge_gpu_package("flash-attn", "packed attention", "2.8", None).status == "ok"
    assert judge_gpu_package("apex", "", None, None).status == "ok"
    assert judge_gpu_package("apex", "", "0.1", "undefined symbol").status == "fault"


def test_whose_kernels_flash_is_and_what_was_passed_over_is_told() -> None:
    taken = judge_flash("text", "flash-attn 3 (3.0.0)", "flash-attn 4: flash_attn.cute is not installed")
    assert taken.status == "ok" and taken.found == "flash-attn 3 (3.0.0)"
    assert taken.why == "for text attention of mimo-vl-7b; flash-attn 4: flash_attn.cute is not installed"
    assert judge_flash("vision", None, "torch sees no GPU").found == "cannot run"


def test_little_memory_is_a_note_with_a_remedy() -> None:
    small = judge_memory("/dev/shm", 64e6, 1e9, "NCCL", "--shm-size=8g")
    assert small.status == "note" and small.remedy == "--shm-size=8g"
    assert judge_memory("/dev/shm", 2e9, 1e9, "NCCL", "").status == "ok"


def test_requirements_that_are_missing_or_too_old_are_faults() -> None:
    versions = {"numpy": "1.26.4", "rich": "15.0.0"}
    wanted = ["numpy>=2", "rich>=14", "torch>=2.11", 'pytest>=8; extra == "dev"']
    found = list(judge_requirements(wanted, versions.get))
    assert [(one.name, one.found, one.status) for one in found] == [
        ("numpy", "1.26.4", "fault"), ("torch", "not installed", "fault"),
    ]  # fmt: skip
    assert found[1].remedy == 'pip install "torch>=2.11"'
    assert [one.status for one in judge_requirements(["rich>=14"], versions.get)] == ["ok"]


def test_has_fault_decides_the_exit_code() -> None:
    fine = Finding("machine", "x", "y", "note")
    assert not has_fault([fine]) and has_fault([fine, Finding("machine", "x", "y", "fault")])


def test_a_package_that_crashes_on_import_does_not_crash_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object file')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = {one.name: one for one in doctor.examine()}
    assert found["torch"].status == found["all"].status == "fault"
    assert "libtorch.so" in found["torch"].why


def test_the_command_prints_a_table_or_json_and_fails_on_a_fault(
    findings: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: findings)  # found once for this module: a look takes seconds
    assert main(["doctor"]) == 0
    assert "megatron-core" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert {row["topic"] for row in json.loads(capsys.readouterr().out)} == set(TOPICS)
    monkeypatch.setattr(doctor, "examine", lambda: [*findings, judge_python((3, 9))])
    assert main(["doctor"]) == 1
    assert "-> make clean install" in capsys.readouterr().out


def test_dali_is_optional():
    assert [judge_dali(version).status for version in (None, "2.4.0")] == ["ok", "ok"]
    assert [judge_dali(version).found for version in (None, "2.4.0")] == ["not installed", "2.4.0"]


def test_energon_is_optional():
    assert judge_energon(None).status == judge_energon("7.4.1").status == "ok"
    assert (judge_energon(None).found, judge_energon("7.4.1").found) == ("not installed", "7.4.1")


def test_a_gpu_that_cannot_multiply_in_fp8_is_a_note_with_a_remedy():
    assert judge_fp8({"current": "scaled_mm", "blockwise": "transformer-engine"}, on_gpu=True).status == "ok"
    lacking = judge_fp8({"current": "scaled_mm", "blockwise": "none"}, on_gpu=True)
    assert lacking.status == "note" and lacking.remedy
