"""A whole run with images shared out: it loses as the replicated one, and its metrics state the predicted imbalance."""

import json

import numpy as np
import pytest

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.loop import pretrain
from tests.data_fixtures import TINY
from tests.e2e.faults_run import write_data
from tests.samples import run_config


@pytest.mark.slow
def test_a_run_with_images_shared_out_loses_as_the_replicated_one_and_states_its_imbalance(tmp_path):
    data = write_data(tmp_path)
    rows = {}
    for placement in ("replicated", "balanced"):
        parallel = ParallelConfig(tp=2, vision_placement=placement)
        config = run_config(TINY, parallel=parallel, steps=3, packs_per_step=2)
        run_local(pretrain, 2, config.model_copy(update={"dir": tmp_path / placement, "data": data}))
        lines = (tmp_path / placement / "metrics.jsonl").read_text().splitlines()
        rows[placement] = [json.loads(line) for line in lines]
    losses = {placement: [row["loss"] for row in found] for placement, found in rows.items()}
    np.testing.assert_allclose(losses["balanced"], losses["replicated"], rtol=3e-6)
    assert [row["vision_imbalance"] for row in rows["replicated"]] == [None] * 3
    assert all(1 <= row["vision_imbalance"] <= 2 for row in rows["balanced"] if row["num_images"])
