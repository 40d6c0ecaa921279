"""The door under torchrun does what the local ranks do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mimo_megatron.config.load import dump_resolved
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.train.run_folder import RunFolder
from tests.data_fixtures import TINY
from tests.e2e.faults_run import events_of, rows_of, run_of, write_data
from tests.repository import ROOT
from tests.samples import run_config


@pytest.mark.slow
def test_the_door_trains_under_torchrun(tmp_path):
    data = write_data(tmp_path, count=12)
    config = run_config(TINY, steps=2, packs_per_step=2, parallel=ParallelConfig(tp=2))
    config = config.model_copy(update={"dir": tmp_path / "run", "data": data})
    dump_resolved(config, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "pretrain_vlm.py"), str(tmp_path / "recipe.yaml"), "train.steps=3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_its_ranks_which_save_and_end(tmp_path):
    config = run_of(write_data(tmp_path), tmp_path / "run", 500, checkpoint={"every_steps": 0})
    dump_resolved(config, tmp_path / "recipe.yaml")
    command = [sys.executable, str(ROOT / "examples" / "torchrun.py"), "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "pretrain_vlm.py"), str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 120
        while len(rows_of(config)) < 2:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGTERM, said[-3000:]
    (row,) = [row for row in events_of(config) if row["event"] == "interrupted"]
    assert RunFolder(config.dir).checkpoint_steps() == [row["step"]]
    assert len(rows_of(config)) == row["step"] and "start the run again" in said
