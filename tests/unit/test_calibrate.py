"""Costs from a run's steps: known coefficients are found again, and steps that cannot tell them are refused."""

import json

import numpy as np
import pytest

from mimo_megatron.cli import main
from mimo_megatron.data.calibrate import COLUMNS, calibrate, non_negative_least_squares
from mimo_megatron.errors import DataError

TRUE = {"per_token": 2e-6, "per_token_pair": 3e-10, "per_patch": 4e-6, "per_patch_pair": 5e-10}


def steps(num_steps=60, noise=0.0, **fixed):
    random = np.random.default_rng(0)
    rows = []
    for _ in range(num_steps):
        row = {
            "num_slots": 262_144,
            "segment_squares": int(random.uniform(1e9, 4e9)),
            "num_patches": int(random.uniform(1e5, 4e5)),
            "frame_squares": int(random.uniform(2e8, 2e9)),
            **fixed,
        }
        exact = sum(TRUE[name] * row[column] for name, column in COLUMNS.items())
        rows.append(row | {"seconds": exact * (1 + noise * random.standard_normal())})
    return rows


def test_the_coefficients_of_exact_steps_are_found():
    found = calibrate(steps())
    assert found.cost.model_dump() == pytest.approx(TRUE, rel=1e-6)
    assert found.residual_fraction < 1e-9 and sum(found.shares.values()) == pytest.approx(1)


def test_noise_of_one_per_cent_moves_the_coefficients_little_and_is_the_residual():
    found = calibrate(steps(400, noise=0.01))
    assert found.cost.model_dump() == pytest.approx(TRUE, rel=0.1)
    assert found.residual_fraction == pytest.approx(0.01, rel=0.2)


def test_steps_without_patches_give_no_cost_of_vision():
    found = calibrate(steps(num_patches=0, frame_squares=0))
    assert (found.cost.per_patch, found.cost.per_patch_pair) == (0, 0)
    assert found.cost.per_token == pytest.approx(TRUE["per_token"])


def test_a_term_that_would_be_negative_is_zero():
    matrix = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert non_negative_least_squares(matrix, np.array([3.0, 2.0, 1.0])).tolist() == pytest.approx([2.0, 0.0])
    assert non_negative_least_squares(matrix, np.array([1.0, 2.0, 3.0])).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (steps(10), "7 steps after the first 3; a calibration needs at least 20"),
        (steps(num_patches=200_000), "do not vary enough to be fitted: num_patches by 0.0%"),
        ([row | {"frame_squares": 5000 * row["num_patches"]} for row in steps()], "num_patches from frame_squares"),
        ([{"num_slots": 1, "num_patches": 1, "seconds": 1.0}] * 30, "have no frame_squares, segment_squares"),
        (steps(segment_squares=0), "count no segments"),
    ],
)
def test_steps_that_cannot_tell_are_refused_by_name(rows, words):
    with pytest.raises(DataError, match=words):
        calibrate(rows)


def test_the_verb_prints_what_a_recipe_takes(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps()), encoding="utf-8")
    assert main(["data", "calibrate", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "per_token_pair: 3e-10" in printed and "57 steps" in printed
    assert main(["data", "calibrate", str(tmp_path / "absent")]) != 0
