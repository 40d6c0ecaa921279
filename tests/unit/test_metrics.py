"""The run's records: one row a step whatever happens to the process, readable by any JSON reader and by TensorBoard."""

import json
import math
import subprocess
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimo_megatron import log
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, RunConfig, SourceConfig, TrainConfig
from mimo_megatron.errors import DataError
from mimo_megatron.train.jsonl import keep_rows_until
from mimo_megatron.train.metrics import MetricsWriter, StepRecord, status_line
from mimo_megatron.train.provenance import provenance, source_commit

RECORD = StepRecord(
    step=1, loss=2.5, grad_norm=0.75, lrs={"text": 1e-4, "projector": 1e-3}, num_tokens=900, num_trained_tokens=300,
    num_slots=1000, num_patches=400, num_images=3, num_samples=5, seconds=0.5, skipped=Counter({"bad image": 2}),
    model_flops=10**12,
)  # fmt: skip


def make_config(run_dir: Path, log_every: int = 1) -> RunConfig:
    data = DataConfig(sources=(SourceConfig(path="x"),), tokenizer="x", pack_tokens=1000, pack_patches=800)
    train = TrainConfig(steps=10, packs_per_step=1, log_every=log_every)
    return RunConfig(name="tiny run", dir=run_dir, model=preset("tiny-vl"), data=data, train=train)


def write_steps(run_dir: Path, first: int, last: int, **settings) -> None:
    """Steps first..last, as a process that begins (or resumes) at first - 1 would write them."""
    with MetricsWriter(run_dir, make_config(run_dir), 10, False, **settings).open_for(first - 1) as metrics:
        for step in range(first, last + 1):
            metrics.write(replace(RECORD, step=step, loss=1 / step))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_holds_the_record_and_rates_of_useful_work(tmp_path):
    with MetricsWriter(tmp_path, make_config(tmp_path), 10, False, peak_flops=1e13).open_for(0) as metrics:
        metrics.write(RECORD)
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row.pop("time").endswith("+00:00")
    assert row == vars(RECORD) | dict(fill=0.9, tokens_per_second=1800.0, patches_per_second=800.0, mfu=0.2)


def test_mfu_is_unknown_without_a_peak_or_a_flop_count(tmp_path):
    with MetricsWriter(tmp_path, make_config(tmp_path), 10, False, peak_flops=1e13).open_for(0) as metrics:
        metrics.write(replace(RECORD, model_flops=0))
    write_steps(tmp_path, 2, 2)
    assert [row["mfu"] for row in rows(tmp_path / "metrics.jsonl")] == [None, None]


def test_a_resumed_runs_file_holds_every_step_once(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 10)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == list(range(1, 11))


def test_a_new_start_in_an_old_folder_drops_the_old_rows(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 1, 2)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(0, 50), st.integers(0, 30))
def test_cutting_keeps_exactly_the_rows_up_to_the_step(tmp_path_factory, steps, step, torn_bytes):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    torn = json.dumps({"step": 1, "loss": 0.123456789012345678901})[:torn_bytes]
    path.write_text("".join(json.dumps({"step": one}) + "\n" for one in steps) + torn)
    keep_rows_until(path, step)
    assert [row["step"] for row in rows(path)] == [one for one in steps if one <= step]


def test_a_torn_last_line_is_dropped_and_said(tmp_path, log_lines):
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    write_steps(tmp_path, 3, 4)
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]
    assert any("torn" in line for line in log_lines)


def test_a_broken_row_inside_the_file_stops_the_resume_by_its_line_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"stp": 2}\n{"step": 3}\n')
    with (
        pytest.raises(DataError, match=r"metrics\.jsonl line 2 is not a row of a step"),
        MetricsWriter(tmp_path, make_config(tmp_path), 10, False) as metrics,
    ):
        metrics.open_for(3)
    assert path.read_text().count("\n") == 3


def test_values_that_are_not_finite_are_null_in_standard_json(tmp_path):
    with MetricsWriter(tmp_path, make_config(tmp_path), 10, False).open_for(0) as metrics:
        metrics.write(replace(RECORD, loss=math.nan, grad_norm=math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is None and row["grad_norm"] is None


def test_rows_reach_the_disk_before_the_run_ends_and_files_close_on_an_error(tmp_path):
    with (
        pytest.raises(RuntimeError, match="died"),
        MetricsWriter(tmp_path, make_config(tmp_path), 10, False).open_for(0) as metrics,
    ):
        metrics.write(RECORD)
        assert len(rows(tmp_path / "metrics.jsonl")) == 1
        raise RuntimeError("died")
    with pytest.raises(ValueError, match="closed file"):
        metrics.write(replace(RECORD, step=2))


def test_events_tell_starts_and_resumes_with_ranks_and_versions(tmp_path):
    write_steps(tmp_path, 1, 2, num_ranks=4)
    (tmp_path / "events.jsonl").open("a").write('{"time": "torn by a ki')
    write_steps(tmp_path, 2, 3, num_ranks=2)
    first, torn, second = (tmp_path / "events.jsonl").read_text().splitlines()
    first, second = json.loads(first), json.loads(second)
    assert (first["event"], first["step"], first["detail"]["ranks"]) == ("start", 0, 4)
    assert (second["event"], second["step"], second["detail"]["ranks"]) == ("resume", 1, 2)
    assert torn == '{"time": "torn by a ki'
    assert {"python", "torch"} <= first["detail"]["versions"].keys()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write_steps(tmp_path, 1, 4)
    write_steps(tmp_path, 3, 5)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "lr/text", "lr/projector", "data/fill"} <= set(board.Tags()["scalars"])
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert {event.value for event in board.Scalars("speed/tokens_per_second")} == {1800.0}


def test_a_log_line_comes_at_the_first_the_last_and_every_kth_step(tmp_path, log_lines):
    with MetricsWriter(tmp_path, make_config(tmp_path, log_every=4), 10, False).open_for(0) as metrics:
        for step in range(1, 11):
            metrics.write(replace(RECORD, step=step))
    assert [line.split(" · ")[0] for line in log_lines] == ["step 1/10", "step 4/10", "step 8/10", "step 10/10"]
    assert log_lines[0].endswith("0.50 s · ETA 0:00:04") and log_lines[-1].endswith("ETA 0:00:00")


def test_the_status_line_states_useful_rates_not_capacity():
    line = status_line(RECORD, 0.412, timedelta(seconds=90))
    assert line == (
        "loss 2.5000 · grad norm 0.75 · lr text 1.00e-04 projector 1.00e-03 · 1,800 tokens/s · 800 patches/s · "
        "fill 90.0% · MFU 41.2% · skipped 2 · 0.50 s · ETA 0:01:30"
    )


def test_the_status_line_shows_the_vision_imbalance_where_images_are_shared_out():
    line = status_line(replace(RECORD, vision_imbalance=1.254), None, timedelta(seconds=90))
    assert "fill 90.0% · vision imbalance 1.25 · skipped 2" in line


def test_the_loss_of_multi_token_prediction_stands_beside_the_loss():
    assert status_line(replace(RECORD, mtp_loss=3.0), None, timedelta(seconds=90)).startswith(
        "loss 2.5000 · mtp loss 3.0000 · grad norm"
    )


def test_a_terminal_gets_a_bar_with_log_lines_above_it(tmp_path, capsys, monkeypatch, log_lines):
    monkeypatch.setenv("COLUMNS", "240")
    log.set_up()
    with MetricsWriter(tmp_path, make_config(tmp_path), 10, True).open_for(0) as metrics:
        metrics.write(RECORD)
        log.get_logger().warning("a remark")
        metrics.write(replace(RECORD, step=7))
    shown = capsys.readouterr().err
    assert "tiny run" in shown and "step 7/10" in shown and "1,800 tokens/s" in shown
    assert shown.index("a remark") < shown.index("step 7/10")
    assert "\x1b[2K" in shown  # the bar was redrawn in place
    log.get_logger().warning("after the bar")
    assert "after the bar" in capsys.readouterr().err


def test_the_commit_is_that_of_the_tree_that_tracks_the_file_and_says_dirty(tmp_path):
    def git(*args: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(
            ["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    tracked, stray = tmp_path / "tracked.py", tmp_path / "stray.py"
    tracked.write_text("1")
    stray.write_text("1")
    assert source_commit(tracked) is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-qm", "one")
    assert source_commit(tracked) == git("rev-parse", "--short", "HEAD")
    assert source_commit(stray) is None
    tracked.write_text("2")
    assert source_commit(tracked).endswith("-dirty")


def test_provenance_is_plain_json():
    assert json.loads(json.dumps(provenance())) == provenance()
