"""Several runs' held-out rewards side by side: what is averaged over what, and where a line ends."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mimo_megatron.errors import DataError
from mimo_megatron.report.rl_comparison import band, write_comparison


def make(run_dir: Path, num_evaluations: int, **gains: float) -> Path:
    """A run evaluated every 10 steps, each task's reward rising by its gain."""
    run_dir.mkdir(parents=True)
    rows = [
        dict(step=10 * i, rewards={task: 0.1 + gain * i for task, gain in gains.items()})
        for i in range(num_evaluations)
    ]
    (run_dir / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def texts(path: Path) -> list[str]:
    """matplotlib draws letters as shapes, and keeps the text as a comment before them."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return [(node.text or "").strip() for node in ElementTree.parse(path, parser).iter() if callable(node.tag)]


def test_a_line_is_the_mean_of_its_runs_and_ends_with_the_shortest():
    steps = np.array([0.0, 10, 20, 30])
    found = band([(steps, np.array([0.1, 0.2, 0.3, 0.4])), (steps[:3], np.array([0.3, 0.2, 0.7]))])
    assert found is not None and found.num_runs == 2
    np.testing.assert_array_equal(found.steps, [0, 10, 20])
    np.testing.assert_allclose(found.mean, [0.2, 0.2, 0.5])
    np.testing.assert_allclose(found.lowest, [0.1, 0.2, 0.3])
    np.testing.assert_allclose(found.highest, [0.3, 0.2, 0.7])


def test_only_steps_that_all_runs_were_evaluated_at_are_averaged():
    found = band([(np.array([0.0, 10]), np.array([0.1, np.nan])), (np.array([0.0, 10]), np.array([0.3, 0.9]))])
    assert found is not None and list(found.steps) == [0]
    assert band([(np.array([0.0]), np.array([0.1])), (np.array([5.0]), np.array([0.1]))]) is None


def test_runs_of_single_tasks_stand_beside_a_mix_and_not_in_the_mean(tmp_path):
    mixed = [make(tmp_path / f"mixed{seed}", 5 - seed, math=0.1, box=0.05) for seed in range(3)]
    alone = [
        make(tmp_path / "math", 4, math=0.12),
        make(tmp_path / "box", 4, box=0.1),
        make(tmp_path / "b", 4, box=0.2),
    ]
    found = texts(write_comparison({"mixed": mixed, "alone": alone}, tmp_path / "out" / "c.svg", title="A title"))
    assert {"A title", "math", "box", "mean of tasks"} <= set(found)
    assert (found.count("mixed (3 runs)"), found.count("alone (1 run)"), found.count("alone (2 runs)")) == (3, 1, 1)


def test_one_task_has_one_panel_and_the_same_runs_give_the_same_file(tmp_path):
    runs = {"a": [make(tmp_path / "a", 3, math=0.1)]}
    first, second = (write_comparison(runs, tmp_path / name) for name in ("1.svg", "2.svg"))
    assert first.read_bytes() == second.read_bytes()
    assert "mean of tasks" not in texts(first)
    assert Image.open(write_comparison(runs, tmp_path / "c.png")).format == "PNG"


def test_a_torn_last_line_is_warned_of_and_a_run_without_evaluations_refused(tmp_path, caplog):
    run_dir = make(tmp_path / "a", 3, math=0.1)
    with (run_dir / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 30, "rew')
    write_comparison({"a": [run_dir]}, tmp_path / "c.svg")
    assert "1 unreadable line(s)" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no evaluations; .*every_steps"):
        write_comparison({"a": [run_dir, tmp_path / "empty"]}, tmp_path / "c.svg")
