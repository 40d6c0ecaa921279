"""The GPU suite: sections lose nothing to each other, mock data and wrong kernels are refused, work is counted."""

import json
import os
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the suite measures the kernels: pip install triton")

from benchmarks import gpu_suite
from benchmarks.gpu import correctness, fp8, kernels, machine, pictures, rounding, worker
from benchmarks.gpu.case import FULL_WINDOWS, LATE, Case, in_order
from benchmarks.gpu.cases import row_cases, table_cases
from benchmarks.gpu.packs import PackClass, pack_class, require_real
from benchmarks.gpu.peers import Unavailable
from benchmarks.gpu.report import markdown, summary
from benchmarks.gpu.setting import Bench, Setting
from benchmarks.gpu.timing import measure
from benchmarks.gpu.writing import Results
from mimo_megatron.data.shards import ShardSample, write_shards
from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.train.flops import step_flops
from mimo_triton_kernels import fp8_rounding
from tests.repository import ROOT

SETTING = Setting(torch.device("cpu"), is_rehearsal=True)
Rows = list[dict[str, Any]]


def bench() -> Bench:
    return Bench(SETTING, ceilings={"bytes_per_second": 1e9, "flops_per_second": 1e9})


def saved(section: Callable[..., Any], *args: Any) -> Rows:
    rows: Rows = []
    section(*args, lambda **found: rows.extend(found.get("rows", [])))
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackClass, dict[str, ShardSample]]:
    folder = tmp_path_factory.mktemp("suite")
    stored = {one.key: one for one in pictures.samples(8, 3, pictures.REHEARSAL)}
    write_shards(stored.values(), folder / "source", 64)
    return pack_class("32K", SETTING, stored, folder), stored


# ---- packs -----------------------------------------------------------------------------------------------------------


def test_random_pixels_are_refused(made: tuple[PackClass, dict[str, ShardSample]]) -> None:
    packs, stored = made
    batch = packs.batches[0]
    require_real(batch, stored, packs.config)
    mock = replace(batch, pixels_Y=torch.randint(0, 256, batch.pixels_Y.shape, dtype=torch.uint8))
    with pytest.raises(DataError, match="refuses mock data"):
        require_real(mock, stored, packs.config)


def test_samples_of_no_shard_and_packs_without_their_images_are_refused(
    made: tuple[PackClass, dict[str, ShardSample]],
) -> None:
    packs, stored = made
    batch = packs.batches[0]
    with pytest.raises(DataError, match=r"in no shard: 'sample-0'.*refuses mock data"):
        require_real(replace(batch, sample_ids=("sample-0", *batch.sample_ids[1:])), stored, packs.config)
    with pytest.raises(DataError, match="images are not those of its samples"):
        require_real(replace(batch, vision=None), stored, packs.config)


def test_samples_are_a_function_of_the_seed() -> None:
    first, again, other = ([*pictures.samples(6, seed, pictures.REHEARSAL)] for seed in (3, 3, 4))
    assert first == again != other
    assert any(one.members for one in first) and any(not one.members for one in first)
    assert not any(one.members for one in pictures.samples(6, 3, pictures.REHEARSAL, text_alone=True))


# ---- work ------------------------------------------------------------------------------------------------------------


def test_attention_of_the_tables_is_that_of_the_flop_formula(made: tuple[PackClass, dict[str, ShardSample]]) -> None:
    packs, _ = made
    batch, model = packs.batches[0], packs.config.model
    assert batch.vision is not None and model.vision is not None
    full, windows, frames, text, *_ = table_cases(SETTING, [packs])
    assert full.name == FULL_WINDOWS and full.work.forward_flops == 4 * 64 * 64 * 80 * SETTING.sizes.num_windows
    want = step_flops(model, batch.segment_lengths, batch.vision.grids_I3, ("vision", "projector", "text"))
    num_full = len(model.vision.full_attention_layers)
    vision = num_full * frames.work.train_flops + (model.vision.depth - num_full) * windows.work.train_flops
    assert vision == want.vision_attention
    padding = [end - start for start, end in zip(batch.segment_bounds, batch.segment_bounds[1:], strict=False)]
    padding = padding[len(batch.sample_ids) :]
    unit = 3 * 2 * model.text.num_heads * model.text.head_width * sum(length**2 for length in padding)
    assert model.text.num_layers * (text.work.train_flops - unit) == want.text_attention


def test_late_ways_come_last_and_every_way_once(made: tuple[PackClass, dict[str, ShardSample]]) -> None:
    cases = table_cases(SETTING, [made[0]])
    order = [(case.op, case.shape, name) for case, names in in_order(cases) for name in names]
    assert sorted(order) == sorted((case.op, case.shape, name) for case in cases for name in case.ways)
    first_late = min(order.index(one) for one in order if one[2] in LATE)
    assert all(name in LATE for *_, name in order[first_late:])


# ---- correctness and times -------------------------------------------------------------------------------------------


def cases_with(way: Callable[..., torch.Tensor]) -> list[Case]:
    return [
        replace(case, ways={"ops": way, "eager": case.ways["eager"]}) for case in row_cases(SETTING, 5, 8, 8, 4, 9)[:1]
    ]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda x, w: right_norm(x, w) * 1.0001, "output"),
        (lambda x, w: right_norm(x, w.detach()) + w * 0, "gradient 1"),
        (lambda x, w: right_norm(x, w) + float("nan"), "output nan"),
    ],
)
def test_a_wrong_kernel_fails_its_section_and_keeps_all_rows(
    fault: Callable[..., torch.Tensor], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "small_cases", lambda setting: cases_with(fault))
    rows: Rows = []
    with pytest.raises(correctness.WrongResult, match=f"RMSNorm by ops .*{found}"):
        correctness.section(bench(), lambda **more: rows.extend(more["rows"]))
    assert [(row["way"], row["ok"]) for row in rows if row["op"] == "RMSNorm"] == [("ops", False), ("eager", True)]


def test_a_rounding_whose_bits_are_others_fails_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly(x_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        return fp8_rounding.round_two_ways(x_MK, scale * 1.001, dtype)

    rows: Rows = []
    monkeypatch.setattr(correctness, "small_cases", lambda setting: cases_with(right_norm))
    correctness.section(bench(), lambda **more: rows.extend(more["rows"]))
    judged = [row for row in rows if row["op"] == rounding.OP]
    assert len(judged) == 4 and all(row["ok"] and not any(row["errors"].values()) for row in judged)
    with monkeypatch.context() as faulty, pytest.raises(correctness.WrongResult, match="largest magnitude differ"):
        faulty.setattr(rounding, "largest_magnitude", lambda x: fp8_rounding.largest_magnitude(x) * 1.001)
        correctness.section(bench(), lambda **_: None)
    monkeypatch.setattr(rounding, "round_two_ways", nearly)
    with pytest.raises(correctness.WrongResult, match=r"FP8 rounding by triton .*values differ.*transposed differ"):
        correctness.section(bench(), lambda **_: None)


def right_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return row_cases(SETTING, 5, 8, 8, 4, 9)[0].definition(x, w)


def test_a_way_with_another_output_is_not_timed(
    made: tuple[PackClass, dict[str, ShardSample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(cases_with(lambda x, w: right_norm(x, w) * 1.01)[0], trusted="eager")
    case = replace(case, ways={**case.ways, "gone": Unavailable("not installed"), "broken": broken})
    monkeypatch.setattr(kernels, "table_cases", lambda setting, packs: [case])
    one = bench()
    one.kept["packs"] = [made[0]]
    rows = {row["way"]: row for row in saved(kernels.section, one)}
    assert "from that of eager" in rows["ops"]["failed"] and "forward" not in rows["ops"]
    assert rows["gone"]["absent"] == "not installed"
    assert rows["broken"]["failed"] == "RuntimeError: no kernel image"
    eager = rows["eager"]["forward"]
    assert eager["bound_by"] == "bytes"
    assert eager["of_ceiling"] == pytest.approx(2 * 5 * 8 * 4 / (eager["ms"] * 1e-3) / 1e9, rel=0.05, abs=1e-4)


def broken(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


def test_a_time_is_that_of_the_call() -> None:
    timing = measure(lambda: time.sleep(0.02), SETTING, budget_ms=100)
    assert timing.repeats == 5
    assert 20 <= timing.low_ms <= timing.median_ms <= timing.high_ms


def test_fp8_gradients_are_those_of_the_linear_layer_within_its_rounding() -> None:
    row = fp8.row("a layer", 16, 32, 48, bench())
    assert set(row["fp8"]["errors"]) == {"forward", "input gradient", "weight gradient"}
    for way in ("fp8", "kernels"):
        assert all(0.005 < error < 0.06 for error in row[way]["errors"].values()), row[way]
    kernels = row["kernels"]["rounding"]
    assert kernels.keys() == {
        "largest magnitude", "both", "as it stands", "transposed", "torch.compile, magnitude and both",
    }  # fmt: skip
    moved = 16 * 32 * (4 + 2)  # float32 in a rehearsal, read once; two orientations written
    assert kernels["both"]["gbytes_per_second"] == pytest.approx(moved / kernels["both"]["ms"] / 1e6, rel=0.1, abs=2e-3)


# ---- sections --------------------------------------------------------------------------------------------------------

FAKE_WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu.writing import Results
results = Results.read(Path(sys.argv[1]))
for name, section in results.tree["sections"].items():
    if section["status"] != "waiting":
        continue
    results.set(name, status="running")
    results.saver(name)(rows=[name + " began"])
    if name == "train":
        os._exit(9)
    if name == "kernels":
        time.sleep(60)
    results.set(name, status="done")
"""


def running(tmp_path: Path, **budgets: float) -> Path:
    args = gpu_suite.arguments(["--device", "cpu", "--tiny"])
    results = Results(tmp_path / "results.json", gpu_suite.beginning(args))
    for name, seconds in budgets.items():
        results.section(name)["budget_seconds"] = seconds
    results.write()
    return results.path


def supervised(path: Path, tmp_path: Path, script: str, seconds: float = 60) -> dict[str, Any]:
    (tmp_path / "worker.py").write_text(script.format(root=str(ROOT)))
    command = (sys.executable, str(tmp_path / "worker.py"))
    results = gpu_suite.supervise(path, tmp_path, dict(os.environ), time.monotonic() + seconds, command)
    return results.tree["sections"]


def test_a_crash_and_a_hang_lose_no_other_section(tmp_path: Path) -> None:
    sections = supervised(running(tmp_path, kernels=1.0), tmp_path, FAKE_WORKER)
    done = {name for name, one in sections.items() if one["status"] == "done"}
    assert done == {"ceilings", "correctness", "packs", "head", "optimizer", "fp8"}
    assert sections["train"]["error"] == "the process ended with code 9"
    assert "its time is over" in sections["kernels"]["error"]
    assert sections["kernels"]["data"]["rows"] == ["kernels began"]


def test_a_worker_that_begins_nothing_ends_the_suite(tmp_path: Path) -> None:
    sections = supervised(running(tmp_path), tmp_path, "import sys\nsys.exit('no torch here')")
    assert {one["status"] for one in sections.values()} == {"failed"}
    assert sections["ceilings"]["log"] == ["no torch here"]


def test_when_the_time_is_over_the_rest_is_not_run(tmp_path: Path) -> None:
    script = FAKE_WORKER.replace('name == "kernels"', 'name == "packs"')
    sections = supervised(running(tmp_path), tmp_path, script, seconds=3)
    assert "the time of the suite is over" in sections["packs"]["error"]
    assert {sections[name]["status"] for name in ("train", "kernels", "head", "optimizer", "fp8")} == {"not run"}


def test_a_section_that_raises_is_told_with_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_bench: Bench, save: Any, _folder: Path) -> None:
        save(rows=[1, 2])
        raise ValueError("a row of three")

    monkeypatch.setitem(worker.SECTIONS, "ceilings", fails)
    results = Results.read(running(tmp_path))
    worker.run("ceilings", bench(), results, tmp_path)
    section = Results.read(results.path).section("ceilings")
    assert section["status"] == "failed" and section["error"] == "ValueError: a row of three"
    assert section["data"]["rows"] == [1, 2] and any(
        "save(rows" in line or "raise" in line for line in section["traceback"]
    )
    worker.run("train", bench(), results, tmp_path)
    assert "needs real packs" in results.section("train")["error"]


def test_after_an_error_the_device_does_not_survive_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worker.SECTIONS, "ceilings", lambda *_: 1 / 0)
    monkeypatch.setattr(Setting, "synchronize", lambda self: 1 / 0)
    results = Results.read(running(tmp_path))
    with pytest.raises(SystemExit) as ended:
        worker.run("ceilings", bench(), results, tmp_path)
    assert ended.value.code == worker.DEVICE_LOST
    assert Results.read(results.path).section("ceilings")["status"] == "failed"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--device", "cpu"], "a CPU can only rehearse: add --tiny"),
        (["--tiny", "--out", str(gpu_suite.RESULTS)], "not written into benchmarks/results"),
        (["--tiny", "--out", str(gpu_suite.RESULTS / "own")], "not written into benchmarks/results"),
    ],
)
def test_a_rehearsal_is_never_taken_for_a_measurement(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.arguments(words)
    assert complaint in capsys.readouterr().err


def test_without_a_gpu_the_measuring_process_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="torch sees no GPU; `--device cpu --tiny`"):
        worker.setting_of({"asked": {"device": "cuda", "tiny": False, "seed": 1}})


def test_carried_wheels_are_unpacked_for_the_path(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.whl there"):
        machine.unpacked(tmp_path / "wheels", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "wheels" / "carried_thing-1.5-py3-none-any.whl", "w") as wheel:
        info = "carried_thing-1.5.dist-info"
        wheel.writestr("carried_thing.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.5\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    found = machine.unpacked(tmp_path / "wheels", tmp_path / "out")
    assert (found / "carried_thing.py").read_text() == "VALUE = 7\n"


def test_names_of_result_files() -> None:
    assert machine.short_name("NVIDIA H200") == "nvidia-h200"
    assert machine.short_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_every_budget_has_a_section_and_a_page() -> None:
    assert list(gpu_suite.BUDGETS) == list(worker.SECTIONS)
    tree = gpu_suite.beginning(gpu_suite.arguments(["--device", "cpu", "--tiny"]))
    assert "no number on this page is a measurement" in markdown(tree)
    for name in tree["sections"]:
        tree["sections"][name] |= {"status": "failed", "error": f"why {name}", "data": {}}
    assert all(f"why {name}" in markdown(tree) and f"why {name}" in summary(tree) for name in tree["sections"])


def test_all_sections_are_expected_to_fit_into_the_time_of_the_suite() -> None:
    assert gpu_suite.EXPECTED.keys() == gpu_suite.BUDGETS.keys()
    assert all(gpu_suite.EXPECTED[name] < worker.USABLE * seconds for name, seconds in gpu_suite.BUDGETS.items())
    total = gpu_suite.EXPECTED_START + sum(gpu_suite.EXPECTED.values())
    assert total < gpu_suite.TOTAL_SECONDS - worker.LAST_SECONDS


def test_a_section_whose_time_is_over_names_the_rows_it_leaves_out(
    made: tuple[PackClass, dict[str, ShardSample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Bench(
        SETTING, {"bytes_per_second": 1e9, "flops_per_second": 1e9}, {"packs": [made[0]]}, ends=time.monotonic()
    )
    assert {row["absent"] for row in saved(kernels.section, late)} == {"no time was left"}
    monkeypatch.setattr(correctness, "small_cases", lambda setting: cases_with(right_norm))
    with pytest.raises(correctness.WrongResult, match="RMSNorm by ops: no time was left"):
        correctness.section(late, lambda **_: None)


def test_only_brings_what_a_section_needs() -> None:
    tree = gpu_suite.beginning(gpu_suite.arguments(["--device", "cpu", "--tiny", "--only", "fp8"]))
    waiting = [name for name, section in tree["sections"].items() if section["status"] == "waiting"]
    assert waiting == ["ceilings", "packs", "fp8"]


def test_a_number_that_is_none_is_null_in_the_file(tmp_path: Path) -> None:
    results = Results(tmp_path / "x.json", {"sections": {"a": {}}})
    results.saver("a")(rows=[{"error": float("nan"), "rate": float("inf"), "count": np.int64(3).item()}])
    row = json.loads((tmp_path / "x.json").read_text())["sections"]["a"]["data"]["rows"][0]
    assert row == {"error": None, "rate": None, "count": 3}
