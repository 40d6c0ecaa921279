"""Golds are read when data is built: bad ones are listed with row and reason, poor ones named, none is scored."""

import json
from pathlib import Path
from typing import Any

import pytest

from mimo_megatron.cli import main
from mimo_megatron.reward.gold_check import Finding, GoldRow, check_golds, read_rows
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.rules import RULES
from mimo_megatron.reward.service.offline import Offline
from mimo_megatron.reward.wire import ImageMeta, Meta, ScoreItem
from tests.rule_cases import META, judge, meta_with


def no_math(gold: Any, meta: Meta) -> str:
    raise AssertionError("no math gold is in these rows")


NO_IMAGE = Meta()
THIN = meta_with(image=ImageMeta(size=(1000, 800), shown=(28, 28)))


@pytest.mark.parametrize(
    ("task", "gold", "meta"),
    [
        ("box", [[200, 160, 600, 480]], META),
        ("box", [200, 160, 600, 480], META),
        ("box", [[0, 0, 1000, 800]], META),
        ("box", [[0.5, 0, 2.25, 3], [5, 5, 9, 9]], META),
        ("point", [200, 160, 600, 480], META),
        ("count", 0, NO_IMAGE),
        ("count", 999_999, NO_IMAGE),
        ("time", "[00:10, 00:20]", NO_IMAGE),
        ("time", [10.5, 20], META),
        ("time", [0, 201], META),
        ("gui", {"action": "wait"}, NO_IMAGE),
        ("gui", {"action": "input", "text": "a"}, NO_IMAGE),
        ("gui", {"action": "scroll", "direction": "up", "scroll_distance": 300}, NO_IMAGE),
    ],
)
def test_good_golds_are_read(task: str, gold: Any, meta: Meta) -> None:
    assert RULES[task].read_gold(gold, meta) is not None


@pytest.mark.parametrize(
    ("task", "gold", "meta", "words"),
    [
        ("box", [[200, 160, 600, 480]], NO_IMAGE, "meta.image"),
        ("box", [], META, "not a box"),
        ("box", None, META, "not a box"),
        ("box", "[[200, 160, 600, 480]]", META, "not a box"),
        ("box", [[200, 160, 600]], META, "not a box"),
        ("box", [[200, 160, 600, True]], META, "not a box"),
        ("box", [[200, 160, 600, float("nan")]], META, "not a box"),
        ("box", [[200, 160, float("inf"), 480]], META, "not a box"),
        ("box", [[0, 0, 10**400, 10]], META, "not a box"),
        ("box", [[600, 160, 200, 480]], META, "x1 < x2"),
        ("box", [[200, 160, 200, 480]], META, "x1 < x2"),
        ("box", [[-1, 160, 600, 480]], META, "leaves the stored image"),
        ("box", [[200, 160, 1000.5, 480]], META, "leaves the stored image"),
        ("box", [[200, 160, 200.5, 161]], META, "smaller than one pixel"),
        ("box", [[200, 160, 210, 170]], THIN, "smaller than one pixel"),
        ("box", [[20, 16, 60, 48], [20, 16, 60, 48]], META, "twice"),
        ("box", [[n, n, n + 9, n + 9] for n in range(17)], META, "at most 16"),
        ("point", [[200, 160, 600, 480]], META, "not a box"),
        ("point", [200, 160], META, "not a box"),
        ("point", [200, 160, 600, 480], NO_IMAGE, "meta.image"),
        ("count", -1, META, "not a count"),
        ("count", 1_000_000, META, "not a count"),
        ("count", 5.0, META, "not a count"),
        ("count", "5", META, "not a count"),
        ("count", True, META, "not a count"),
        ("count", None, META, "not a count"),
        ("time", [10, 10], META, "start < end"),
        ("time", "[00:10, 00:10]", META, "start < end"),
        ("time", [20, 10], META, "start < end"),
        ("time", [-1, 10], META, "start < end"),
        ("time", [0, 201.5], META, "ends after the video"),
        ("time", "[00:10, 00:75]", META, "not an interval"),
        ("time", [0, float("inf")], META, "not an interval"),
        ("time", [1, 2, 3], META, "not an interval"),
        ("time", None, META, "not an interval"),
        ("gui", "click", META, "not an action"),
        ("gui", {"action": "tap"}, META, "not an action"),
        ("gui", {"action": ["click"]}, META, "not an action"),
        ("gui", {"action": "click"}, META, "lacks start_box"),
        ("gui", {"action": "click", "start_point": [1, 1]}, META, "unknown keys"),
        ("gui", {"action": "click", "start_box": [5, 5, 1, 1]}, META, "x1 < x2"),
        ("gui", {"action": "click", "start_box": [1, 1, 5, 5]}, NO_IMAGE, "meta.image"),
        ("gui", {"action": "drag", "start_box": [1, 1, 5, 5]}, META, "lacks end_box"),
        ("gui", {"action": "scroll", "direction": "north"}, META, "direction"),
        ("gui", {"action": "press", "keys": "enter"}, META, "keys"),
        ("gui", {"action": "input", "text": " "}, META, "empty text"),
        ("gui", {"action": "input", "text": 5}, META, "not a string"),
    ],
)
def test_bad_golds_are_refused_with_a_reason_and_never_scored(task: str, gold: Any, meta: Meta, words: str) -> None:
    with pytest.raises(GoldError, match=words):
        RULES[task].read_gold(gold, meta)
    verdict = judge(task, "[1, 1, 9, 9]", gold, meta)
    assert (verdict.status, verdict.reward, verdict.reason) == ("unknown", None, "bad_gold")


@pytest.mark.parametrize(
    ("task", "gold", "meta", "words"),
    [
        ("time", [4.2, 4.8], META, "short"),
        ("time", [0, 120], META, "60% of the video"),
        ("time", [0, 10], NO_IMAGE, "duration_seconds"),
        ("box", [[0, 0, 1000, 600]], META, "75% of the image"),
        ("point", [0, 0, 1000, 600], META, "75% of the image"),
    ],
)
def test_poor_golds_are_named_and_still_scored(task: str, gold: Any, meta: Meta, words: str) -> None:
    report = check_golds([(1, GoldRow(id="a", task=task, gold=gold, meta=meta))], no_math)
    assert [finding.kind for finding in report.findings] == ["doubtful"] and report.num_bad == 0
    assert words in report.findings[0].problem
    assert judge(task, "", gold, meta).reason == "no_answer"


def test_score_items_can_be_checked_as_they_are() -> None:
    item = ScoreItem(id="a", task="count", response="", gold=-1)
    assert check_golds([(7, item)], no_math).findings == [
        Finding(7, "a", "count", "bad", "-1 is not a count: give a whole number from 0 to 999,999")
    ]


def test_math_golds_are_read_by_a_worker_and_what_kills_it_is_bad() -> None:
    golds = [r"\frac{1}{2}", r"\frac{", float("nan"), ["3", "4"], "9^{9^{9^9}}"]
    rows = [(number, GoldRow.model_construct(id=str(number), task="math", gold=gold, meta=Meta()))
            for number, gold in enumerate(golds, start=1)]  # fmt: skip
    with Offline() as offline:
        report = check_golds(rows, offline.math_problem)
    assert [finding.row for finding in report.findings] == [2, 3, 5] and report.num_bad == 3


def test_what_constant_answers_earn_is_measured_on_the_good_golds() -> None:
    rows = [GoldRow(id=str(count), task="count", gold=min(count, 4)) for count in range(8)]
    rows += [GoldRow(id="i", task="box", gold=[[0, 0, 500, 800]], meta=meta_with(thinking="required"))]
    rows += [GoldRow(id="j", task="box", gold="bad", meta=META)]
    rows += [GoldRow(id="k", task="time", gold=[0, 50], meta=META)]
    rows += [GoldRow(id="l", task="point", gold=[400, 300, 600, 500], meta=META)]
    report = check_golds(enumerate(rows, start=1), no_math)
    assert report.constant_rewards == {
        "count: always 4": 0.5,
        "box: the whole image": 0.5,
        "box: the middle quarter": pytest.approx(1 / 30),
        "time: the whole video": 0.25,
        "time: the middle half": 0.0,
        "point: the middle": 1.0,
    }


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_the_command_lists_bad_rows_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(
        tmp_path / "rows.jsonl",
        {"id": "good", "task": "count", "gold": 2, "response": "kept out", "result": None},
        {"id": "bad", "task": "count", "gold": "[red]two[/red]"},
        "{not json",
        {"id": "x", "task": "poem"},
        {"id": "good", "task": "count", "gold": 3},
        {"id": "rm", "task": "rm_text"},
        {"id": "mistyped", "task": "count", "gold": 1, "meta": {"durations": 3}},
        "",
    )
    out = tmp_path / "findings.jsonl"
    assert main(["rewards", "check", str(file), "--out", str(out)]) == 1
    found = {row["row"]: row["problem"] for row in map(json.loads, out.read_text().splitlines())}
    assert set(found) == {2, 3, 4, 5, 7}
    assert found[5] == "row 1 has the same id" and "meta.durations" in found[7]
    shown = capsys.readouterr().out
    assert "[red]two[/red]" in shown and "5 bad" in shown


def test_the_command_exits_with_0_where_every_gold_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "rows.jsonl", {"id": "a", "task": "time", "gold": [0, 2]})
    assert main(["rewards", "check", str(file)]) == 0
    assert "0 bad, 1 doubtful" in capsys.readouterr().out


def test_a_missing_file_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["rewards", "check", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl" in capsys.readouterr().err


def test_rows_keep_their_line_numbers_over_empty_lines(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", "", {"id": "a", "task": "count", "gold": 1})
    assert [number for number, _ in read_rows(file)] == [2]
