"""The run report: one file, nothing outside it, nothing invented, and written whatever the run folder holds."""

import json
import math
import re
from datetime import UTC, datetime
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_megatron.report.charts import (
    Marker,
    Series,
    compact,
    line_chart,
    log_ticks,
    percent,
    scientific,
    smooth,
    ticks,
)
from mimo_megatron.report.run_data import load_run, mean_of_ends
from mimo_megatron.report.run_report import write_journey, write_report
from tests.report_fixtures import JSON, Page, make_run


def evaluation(after: str) -> dict:
    rows = [["reading", "10%", after], ["counting", "25%", "50%"]]
    return dict(columns=["task", "chance", "after"], rows=rows, caption="held-out scenes")


def test_the_report_is_one_file_without_scripts_or_requests(tmp_path):
    run_dirs = [make_run(tmp_path / name, evaluation=evaluation("60%")) for name in ("a", "b")]
    reports = [write_report(run_dir) for run_dir in run_dirs]
    journey = write_journey(run_dirs, tmp_path / "journey.html")
    for page in map(Page, [*reports, journey]):
        assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
        assert not any("src" in attrs or any(name.startswith("on") for name in attrs) for _, attrs in page.tags)
        assert not re.search(r"url\(|@import|https?://", page.html)
        policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
        assert policy.startswith("default-src 'none'")
    assert "means of the first and the last 5% of a stage's steps" in journey.read_text()
    links = [attrs["href"] for tag, attrs in Page(journey).tags if tag == "a"]
    assert links == ["a/report.html", "b/report.html"]


def test_the_report_states_what_the_run_was_and_its_totals(tmp_path):
    page = Page(write_report(make_run(tmp_path)))
    text = " ".join(re.sub(r"<[^>]+>", " ", page.html).split())
    assert "stage 1 complete, 40 steps" in text
    assert "TP 2 × PP 1 × CP 1 × DP 2 (4 ranks)" in text
    assert "Commit def5678" in text and "torch 2.0, python 3.11" in text
    assert "vision 1e-5 , projector 1e-3 , text frozen" in text
    assert "3.85 → 0.05" in text  # means of the first and the last two steps, 5% of 40
    assert "36k 33.3% of them trained on" in text
    assert "1.8k useful ones; 1k patches" in text
    assert "Fill 90%" in text and "0:00:20" in text
    assert ["Samples", "200"] in page.rows() and ["Slots in packs", "40,000"] in page.rows()
    assert ["bad image", "2"] in page.rows() and "of 202 samples" in text
    assert "sample-1" in text


def test_the_log_tells_of_an_environment_only_what_changed(tmp_path):
    rows = Page(write_report(make_run(tmp_path))).rows()
    assert ["2026-03-01 10:00:00", "start", "0", "ranks 4, commit abc1234, torch 2.0, python 3.11"] in rows
    assert ["2026-03-01 10:05:00", "checkpoint", "20", "checkpoints/step_000020"] in rows
    assert ["2026-03-01 10:09:00", "resume", "20", "commit def5678"] in rows


def test_an_unfinished_run_says_how_far_it_came(tmp_path):
    assert "at step 25 of 40" in write_report(make_run(tmp_path, steps=25)).read_text()


@pytest.mark.parametrize(
    ("file", "headings"),
    [
        ("config.yaml", {"Configuration"}),
        ("metrics.jsonl", {"Curves", "Loss per trained token"}),
        ("events.jsonl", {"Log"}),
        ("evaluation.json", {"Evaluation"}),
    ],
)
def test_a_missing_file_leaves_its_section_out_and_no_other(tmp_path, file, headings):
    make_run(tmp_path, evaluation=evaluation("60%"))
    whole = set(Page(write_report(tmp_path)).headings)
    assert headings <= whole
    (tmp_path / file).unlink()
    rest = set(Page(write_report(tmp_path)).headings)
    assert not headings & rest
    assert {"Configuration", "Curves", "Log", "Evaluation", "Data"} - headings <= rest


def test_an_empty_folder_gives_a_page_with_its_name(tmp_path):
    page = Page(write_report(tmp_path))
    assert page.headings == [tmp_path.name]


def test_unreadable_lines_are_counted_and_shown_and_the_others_kept(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[4:6] = ["not json", '{"loss": 1}']
    path.write_text("\n".join(lines))
    (tmp_path / "evaluation.json").write_text('{"columns": ["a"]}')
    (tmp_path / "config.yaml").write_bytes(b"name: [unclosed\xff")
    assert len(load_run(tmp_path).metrics) == 38
    text = write_report(tmp_path).read_text()
    assert "metrics.jsonl: 2 unreadable line(s) left out, the first at line 5" in text
    assert "evaluation.json: not a table" in text
    assert "config.yaml: not YAML" in text and "config.yaml: invalid start byte" in text


def test_what_a_run_calls_things_never_becomes_markup(tmp_path):
    bad = "<script>alert(1)</script>\"'&"
    make_run(
        tmp_path,
        name=bad,
        events=[dict(time=bad, event="resume", step=5, detail=bad), dict(event=bad, detail={bad: bad})],
        skipped=[dict(id=bad, reason=bad, detail=bad)],
        evaluation=dict(columns=[bad, bad], rows=[[bad, bad]], caption=bad),
        lrs={},
    )
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"lrs": {}', '"lrs": ' + json.dumps({bad: 1e-3})))
    for path in (write_report(tmp_path), write_journey([tmp_path], tmp_path / "journey.html", title=bad)):
        page = Page(path)
        assert "script" not in {tag for tag, _ in page.tags}
        assert page.html.count("&lt;script&gt;") >= 2


def test_only_so_many_skipped_ids_are_listed_and_the_rest_counted(tmp_path):
    make_run(tmp_path, skipped=[dict(id=f"id-{i % 70}", reason="over-long", detail="") for i in range(100)])
    text = write_report(tmp_path).read_text()
    assert "over-long: 70 samples" in text and "and 20 more in" in text
    assert "id-49<" in text and "id-50<" not in text


METRIC_KEYS = ("loss", "grad_norm", "lrs", "skipped", "num_tokens", "num_slots", "seconds", "fill", "mfu")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metrics=st.lists(
        st.dictionaries(st.sampled_from(METRIC_KEYS), JSON | st.floats(0, 10)).flatmap(
            lambda row: (JSON | st.integers(0, 9)).map(lambda step: {**row, "step": step})
        ),
        max_size=5,
    ),
    events=st.lists(st.fixed_dictionaries(dict.fromkeys(("time", "event", "step", "detail"), JSON)), max_size=3),
    skipped=st.lists(st.fixed_dictionaries(dict.fromkeys(("id", "reason", "detail"), JSON)), max_size=3),
    config=st.dictionaries(st.sampled_from(("name", "train", "parallel", "model")), JSON),
    table=JSON,
)
def test_a_report_is_written_whatever_the_files_hold(tmp_path, metrics, events, skipped, config, table):
    for stem, rows in (("metrics", metrics), ("events", events), ("skipped", skipped)):
        (tmp_path / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "evaluation.json").write_text(json.dumps(dict(columns=table, rows=table)))
    for path in (write_report(tmp_path), write_journey([tmp_path, tmp_path], tmp_path / "journey.html")):
        html = Page(path).html
        assert not re.search(r'="[^"]*\b(nan|inf)\b', html), "a coordinate is not a number"


def test_a_journey_has_a_row_and_a_span_of_steps_for_each_stage_in_order(tmp_path):
    first = make_run(tmp_path / "1", name="warm-up", lrs={"projector": 1e-3}, evaluation=evaluation("40%"))
    second = make_run(tmp_path / "2", name="all parts", lrs={"text": 1e-5}, evaluation=evaluation("60%"))
    page = Page(write_journey([first, second], tmp_path / "out" / "journey.html", title="Two stages"))
    rows = page.rows()
    assert rows[1][:5] == ["warm-up", "complete, 40 steps", "frozen", "1e-3", "frozen"]
    assert rows[2][:5] == ["all parts", "complete, 40 steps", "frozen", "frozen", "1e-5"]
    assert ["task", "chance", "warm-up", "all parts", "after"] not in rows
    assert ["task", "chance", "warm-up", "all parts"] in rows
    assert ["reading", "10%", "40%", "60%"] in rows
    spans = re.findall(r"step (\d+)\n(warm-up|all parts) ", page.html)
    assert spans[0] == ("1", "warm-up") and ("40", "warm-up") in spans
    assert ("41", "all parts") in spans and spans[-1] == ("80", "all parts")


def test_evaluations_of_different_tasks_stay_with_their_stage(tmp_path):
    other = dict(columns=["task", "score"], rows=[["video", "7%"]])
    first = make_run(tmp_path / "1", name="one", evaluation=evaluation("40%"))
    second = make_run(tmp_path / "2", name="two", evaluation=other)
    rows = Page(write_journey([first, second], tmp_path / "journey.html")).rows()
    assert ["task", "chance", "after"] in rows and ["video", "7%"] in rows


# ---- charts ----


def chart_paths(svg: str) -> list[list[tuple[str, float, float]]]:
    """The (command, x, y) of each line in the chart; parsing it as XML shows that it is well formed."""
    lines = [path for path in ElementTree.fromstring(svg).iter("path") if path.get("class", "").startswith("line")]
    return [
        [(command, float(x), float(y)) for command, x, y in re.findall(r"([ML])([-\d.]+) ([-\d.]+)", path.get("d"))]
        for path in lines
    ]


def draw(ys: list[float], **settings) -> str:
    xs = np.arange(1.0, len(ys) + 1)
    return str(line_chart([Series("s", xs, np.array(ys), "c1")], label="test", **settings))


def test_points_lie_in_proportion_between_the_axes():
    (points,) = chart_paths(draw([0.0, 5.0, 10.0], y_limits=(0.0, 10.0), width=566, height=240))
    assert points == [("M", 52, 214), ("L", 302, 114), ("L", 552, 14)]


def test_a_log_axis_gives_equal_ratios_equal_distances():
    (points,) = chart_paths(draw([1.0, 10.0, 100.0], is_log=True))
    heights = [y for _, _, y in points]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


def test_a_missing_value_is_a_gap_not_a_bridge():
    (points,) = chart_paths(draw([1.0, 2.0, math.nan, 2.0, 1.0]))
    assert [command for command, _, _ in points] == ["M", "L", "M", "L"]


def test_thinning_a_long_run_keeps_a_spike_of_one_step():
    ys = np.ones(100_000)
    ys[[54_321, 77_777]] = 9.0, -3.0
    (points,) = chart_paths(draw(list(ys), y_limits=(-3.0, 9.0)))
    assert len(points) < 2000
    assert {y for _, _, y in points} == {14.0, 127.3, 184.0}  # the spike, a third of the height, the dip


def test_hover_says_the_exact_value_of_each_series_once():
    xs = np.array([1.0, 2.0])
    both = [Series("a", xs, np.array([0.123456, 1.0]), "c1"), Series("b", xs, np.array([math.nan, 20_000.4]), "c2")]
    titles = [title.text for title in ElementTree.fromstring(line_chart(both, label="t")).iter("title")]
    assert titles == ["step 1\na 0.12346", "step 2\na 1\nb 20,000"]


def test_a_stage_label_is_cut_to_its_span():
    markers = [
        Marker(1, "a very long stage name", "stage"),
        Marker(2, "b", "stage"),
        Marker(50, "checkpoint", "checkpoint"),
    ]
    tree = ElementTree.fromstring(draw([1.0] * 100, markers=markers))
    assert [text.text for text in tree.iter("text") if text.get("class") == "stage"] == ["…", "b"]
    assert "checkpoint" in [title.text for title in tree.iter("title")]


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 12))
def test_ticks_are_round_few_and_inside(low, span, max_ticks):
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return  # narrower than the figures of a tick label
    found = ticks(low, high, max_ticks)
    assert 1 <= len(found) <= max_ticks + 1
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in found)
    step = (found[-1] - found[0]) / (len(found) - 1) if len(found) > 1 else None
    if step:
        digit = float(f"{step:.3e}".split("e")[0])
        assert digit in (1, 2, 5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1e-6, 1e-3, [1e-6, 1e-5, 1e-4, 1e-3]), (0.9, 30, [1, 2, 5, 10, 20]), (2e-5, 2.2e-5, [2e-5])],
)
def test_log_ticks_are_decades_or_their_2s_and_5s(low, high, expected):
    assert log_ticks(low, high) == pytest.approx(expected)


def test_smoothing_weighs_both_sides_alike_and_keeps_gaps():
    ys = np.array([4.0, math.nan, 1.0, 7.0])
    expected = [(4 + 1 / 2 + 7 / 4) / 1.75, math.nan, (4 / 2 + 1 + 7 / 2) / 2, (4 / 4 + 1 / 2 + 7) / 1.75]
    np.testing.assert_allclose(smooth(ys, 3), expected)  # weights halve with every step away


def test_smoothing_does_not_lag_behind_a_straight_fall():
    ys = np.linspace(9, 1, 101)
    assert smooth(ys, 10)[50] == pytest.approx(5.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(2, 50))
def test_smoothing_stays_between_the_lowest_and_the_highest_value(ys, num_steps):
    smoothed = smooth(np.array(ys), num_steps)
    assert smoothed.min() >= min(ys) - 1e-6 and smoothed.max() <= max(ys) + 1e-6


def test_ends_are_means_of_finite_values_only():
    values = np.array([math.nan, 2.0, *[5.0] * 17, 3.0, math.nan])
    assert mean_of_ends(values) == (2.0, 3.0)
    assert mean_of_ends(np.array([math.nan])) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_500, "12.5k"), (3e6, "3M"), (0.25, "0.25"), (1e-5, "1e-5"), (2.5e-5, "2.5e-5"), (-4e9, "-4G")],
)
def test_axis_numbers_are_short(value, text):
    assert compact(value) == text


def test_rates_and_shares_have_one_spelling():
    assert (scientific(1e-3), scientific(2.5e-5), scientific(0)) == ("1e-3", "2.5e-5", "0")
    assert (percent(1), percent(0.973), percent(0.05)) == ("100%", "97.3%", "5%")


def test_times_are_shown_in_utc_whether_iso_or_seconds(tmp_path):
    seconds = datetime(2026, 3, 1, 10, tzinfo=UTC).timestamp()
    events = [dict(time=seconds, event="a"), dict(time="2026-03-01T12:00:00+02:00", event="b"), dict(event="c")]
    rows = Page(write_report(make_run(tmp_path, events=events))).rows()
    shown = {row[1]: row[0] for row in rows if len(row) == 4 and row[1] in "abc"}
    assert shown == {"a": "2026-03-01 10:00:00", "b": "2026-03-01 10:00:00", "c": ""}
