"""Points, counts and intervals: what is read, what is refused, and what is paid."""

import subprocess
import sys

import pytest

from mimo_megatron.reward.rules import RULES, score
from mimo_megatron.reward.wire import Meta
from tests.repository import ROOT
from tests.rule_cases import judge, meta_with, outcome

TARGET = [200, 160, 600, 480]  # stored pixels; 100, 80, 300, 240 as shown
UNITS = meta_with(units=["apples", "apple", "pièces"])
THINKING = Meta(thinking="required")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("[150, 100]", 1.0),
        ('{"point_2d": [150, 100]}', 1.0),
        ('```json\n[{"point_2d": [150.5, 100], "label": "OK"}]\n```', 1.0),
        ("[[150, 100]]", 1.0),
        ("Click [150, 100].", 1.0),
        pytest.param("[100, 80]", 1.0, id="on the corner"),
        pytest.param("[300, 240]", 1.0, id="on the other corner"),
        pytest.param("[99, 100]", 0.0, id="beside it"),
        pytest.param("[0.3, 0.25]", 0.0, id="0 to 1"),
        pytest.param("[400, 320]", 0.0, id="stored pixels"),
        pytest.param("[300, 300]", 0.0, id="0 to 1000"),
        pytest.param("[80, 290]", 0.0, id="y before x"),
        pytest.param("[501, 100]", "out_of_range", id="right of the image"),
        pytest.param("[150, -1]", "out_of_range", id="above the image"),
        pytest.param("[1e999, 100]", "out_of_range", id="infinite"),
        pytest.param("[NaN, 100]", "unreadable", id="NaN"),
        pytest.param("[true, true]", "unreadable", id="bools"),
        pytest.param('["150", "100"]', "unreadable", id="numbers in quotes"),
        pytest.param("[100, 80, 300, 240]", "unreadable", id="a box"),
        pytest.param('{"bbox_2d": [100, 80, 300, 240]}', "unreadable", id="a box by name"),
        pytest.param('{"point_2d": [1, 1], "other": [150, 100]}', "unreadable", id="a second point in the object"),
        pytest.param("[[150, 100], [1, 1]]", "several", id="spray"),
        pytest.param("[[150, 100], [150, 100]]", "several", id="the same point in a list"),
        pytest.param("[150, 100] or [1, 1]", "several", id="one or the other"),
        pytest.param("(150, 100)", "no_answer", id="round brackets"),
        pytest.param("[]", "no_answer", id="empty"),
        pytest.param("[x, y]", "unreadable", id="template"),
        pytest.param("<think>[150, 100]", "no_answer", id="unclosed think"),
    ],
)
def test_points(response: str, expected: str | float) -> None:
    assert outcome("point", response, TARGET) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{5}", 1.0),
        (r"There are \boxed{ 5 } of them.", 1.0),
        (r"\fbox{5}", 1.0),
        (r"\boxed{5 apples}", 1.0),
        (r"\boxed{5 Apples}", 1.0),
        (r"\boxed{5 pièces}", 1.0),
        pytest.param(r"\boxed{05}", 1.0, id="leading zero"),
        pytest.param(r"\boxed{５}", 1.0, id="full width"),
        pytest.param("\\boxed{\u200b5\u202e}", 1.0, id="zero width and RTL"),
        pytest.param(r"\boxed{4} no, \boxed{5}", 1.0, id="the last box counts"),
        pytest.param(r"\boxed{5} no, \boxed{4}", 0.0, id="only the last box counts"),
        pytest.param(r"\boxed{\boxed{5}}", 1.0, id="a box in a box"),
        pytest.param(r"\boxed{4}", 0.0, id="wrong"),
        pytest.param(r"<think>\boxed{5}</think>\boxed{4}", 0.0, id="right in think only"),
        pytest.param(r"\boxed{5 or 6}", "unreadable", id="5 or 6"),
        pytest.param(r"\boxed{5, 6}", "unreadable", id="5, 6"),
        pytest.param(r"\boxed{5-6}", "unreadable", id="a range"),
        pytest.param(r"\boxed{5 5}", "unreadable", id="twice"),
        pytest.param(r"\boxed{x+y=5}", "unreadable", id="an equation"),
        pytest.param(r"\boxed{2+3}", "unreadable", id="a sum"),
        pytest.param(r"\boxed{5.0}", "unreadable", id="decimal"),
        pytest.param(r"\boxed{5%}", "unreadable", id="percent"),
        pytest.param(r"\boxed{101_2}", "unreadable", id="another base"),
        pytest.param(r"\boxed{-5}", "unreadable", id="minus"),
        pytest.param("\\boxed{\u22125}", "unreadable", id="another minus"),
        pytest.param(r"\boxed{+5}", "unreadable", id="plus"),
        pytest.param(r"\boxed{1_0}", "unreadable", id="underscore"),
        pytest.param(r"\boxed{٥}", "unreadable", id="Arabic digit"),
        pytest.param(r"\boxed{five}", "unreadable", id="a word"),
        pytest.param(r"\boxed{5 pears}", "unreadable", id="another unit"),
        pytest.param(r"\boxed{5 apples or pears}", "unreadable", id="more than a unit"),
        pytest.param(r"\boxed{1234567}", "unreadable", id="seven digits"),
        pytest.param("\\boxed{5\x00}", "unreadable", id="NUL"),
        pytest.param("\\boxed{5\ud800}", "unreadable", id="lone surrogate"),
        pytest.param(r"\boxed{" + "9" * 10**5 + "}", "too_large", id="100,000 digits"),
        pytest.param(r"\boxed{}", "no_answer", id="empty box"),
        pytest.param("5", "no_answer", id="no box"),
        pytest.param("The answer is 5.", "no_answer", id="prose"),
        pytest.param(r"\boxed{5", "no_answer", id="open box"),
        pytest.param(r"\boxed{5} \boxed{6", "no_answer", id="the last box is open"),
        pytest.param(r"\boxed{5}</think>", "no_answer", id="a second end of think"),
        pytest.param(r"\boxed{5}<think>", "no_answer", id="thinks again"),
        pytest.param(r"\boxed{5}<|im_end|>", 1.0, id="special token after it"),
        pytest.param(r"\boxed{5<|im_end|>}", "unreadable", id="special token in it"),
        pytest.param("好的 " * 50_000 + r"\boxed{5}", 1.0, id="filler in another language"),
    ],
)
def test_counts(response: str, expected: str | float) -> None:
    assert outcome("count", response, 5, UNITS) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [("5", 1.0), (" 5 apples\n", 1.0), ("so</think>5", 1.0), (r"4 \boxed{5}", 1.0), ("6", 0.0), ("4 5", "unreadable"),
     ("It is 5.", "unreadable"), (r"5 \boxed{5", "unreadable"), ("5" * 65, "too_large"), ("5</think>", "no_answer")],
)  # fmt: skip
def test_a_bare_count_is_the_whole_answer_where_the_question_says_so(response: str, expected: str | float) -> None:
    assert outcome("count", response, 5, UNITS.model_copy(update={"bare_answer": True})) == expected


def test_a_required_think_tag_that_is_missing_leaves_no_answer() -> None:
    assert outcome("count", r"\boxed{5}", 5, THINKING) == "no_answer"
    assert outcome("count", r"ah</think>\boxed{5}", 5, THINKING) == 1.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("[01:00, 01:10]", 1.0),
        ("[1:00,1:10]", 1.0),
        ("[01:00 , 01:10]", 1.0),
        ("[ 01:00, 01:10 ]", 1.0),
        (r"\boxed{[01:00, 01:10]}", 1.0),
        ("It happens in [01:00, 01:10], I believe.", 1.0),
        ("[0:01:00, 00:01:10]", 1.0),
        ("[01:00, 01:10] [1:00,1:10]", 1.0),
        ("［０１：００，０１：１０］", 1.0),
        pytest.param(r"[00:00, 00:01] \boxed{[01:00, 01:10]}", 1.0, id="the box is what counts"),
        pytest.param("[01:00, 01:05]", 0.5, id="half"),
        pytest.param("[01:05, 01:15]", 1 / 3, id="a third"),
        pytest.param("[00:00, 00:10]", 0.0, id="apart"),
        pytest.param("[01:10, 01:20]", 0.0, id="touching"),
        pytest.param("[00:00, 03:20]", 0.05, id="the whole video"),
        pytest.param("[00:00, 03:21]", 10 / 201, id="a second late"),
        pytest.param("[00:00, 03:22]", "out_of_range", id="two seconds late"),
        pytest.param("[01:10, 01:00]", "degenerate", id="inverted"),
        pytest.param("[01:00, 01:00]", "degenerate", id="no length"),
        pytest.param("[00:60, 01:10]", "unreadable", id="sixty seconds"),
        pytest.param("[00:75, 01:10]", "unreadable", id="75 seconds"),
        pytest.param("[0:60:00, 1:01:10]", "unreadable", id="sixty minutes of an hour"),
        pytest.param("[0 1:00, 01:10]", "unreadable", id="a space inside a number"),
        pytest.param("[01:00.5, 01:10]", "unreadable", id="fractions"),
        pytest.param("[60, 70]", "unreadable", id="seconds"),
        pytest.param("[-01:00, 01:10]", "unreadable", id="negative"),
        pytest.param("[٠١:٠٠, 01:10]", "unreadable", id="Arabic digits"),
        pytest.param("[mm:ss, mm:ss]", "unreadable", id="copied template"),
        pytest.param("[1000:00, 1000:10]", "unreadable", id="four digits of minutes"),
        pytest.param("[01:00, 01:10] or [00:00, 00:10]", "several", id="one or the other"),
        pytest.param(r"\boxed{[01:00, 01:10] [00:00, 00:10]}", "several", id="two in the box"),
        pytest.param(r"\boxed{about [01:00, 01:10]}", "unreadable", id="words in the box"),
        pytest.param(r"\boxed{01:00, 01:10}", "unreadable", id="a box without brackets"),
        pytest.param(r"\boxed{[01:00, 01:10]", "unreadable", id="open box"),
        pytest.param("[[01:00, 01:10]]", "unreadable", id="nested"),
        pytest.param("[01:00, 01:10] [see above]", "unreadable", id="another bracket"),
        pytest.param("01:00, 01:10", "no_answer", id="no brackets"),
        pytest.param(r"\boxed{}", "no_answer", id="empty box"),
        pytest.param("<think>[01:00, 01:10]</think>", "no_answer", id="only in think"),
        pytest.param("[" * 9000, "too_large", id="9,000 brackets"),
    ],
)
def test_intervals(response: str, expected: str | float) -> None:
    assert outcome("time", response, "[01:00, 01:10]") == (
        pytest.approx(expected) if isinstance(expected, float) else expected
    )


def test_minutes_go_beyond_a_hundred_and_hours_are_read() -> None:
    meta = Meta(duration_seconds=20_000)
    assert outcome("time", "[120:00, 130:00]", [7200, 7800], meta) == 1.0
    assert outcome("time", "[2:00:00, 2:10:00]", "[120:00, 130:00]", meta) == 1.0


def test_a_short_gold_caps_what_the_best_answer_in_whole_seconds_earns() -> None:
    assert outcome("time", "[00:04, 00:05]", [4.2, 4.8]) == pytest.approx(0.6)


def test_without_a_duration_no_time_is_too_late() -> None:
    assert outcome("time", "[00:00, 999:59]", [0, 59_999], Meta()) == 1.0


@pytest.mark.parametrize(
    ("task", "gold", "right"),
    [("point", TARGET, "[150, 100]"), ("count", 5, r"\boxed{5}"), ("time", [0, 9], "[0:00, 0:09]")],
)
def test_cut_off_generation_counts_as_truncated_only_where_no_answer_stands(
    task: str, gold: object, right: str
) -> None:
    meta = meta_with(finish_reason="length")
    assert outcome(task, "<think>and then", gold, meta) == "truncated"
    assert outcome(task, right, gold, meta) == 1.0


def test_a_fault_of_a_rule_is_unknown_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(response: str, gold: object, meta: Meta) -> None:
        raise ZeroDivisionError

    rule = RULES["count"]
    monkeypatch.setitem(RULES, "count", type(rule)(rule.read_gold, broken))  # type: ignore[arg-type]
    verdict = score("count", r"\boxed{5}", 5, Meta())
    assert (verdict.status, verdict.reward, verdict.reason) == ("unknown", None, "internal")
    assert "ZeroDivisionError" in caplog.text


def test_a_bad_gold_is_unknown_whatever_was_answered() -> None:
    for task in RULES:
        assert judge(task, "[1, 1]", {"no": "gold"}).reason == "bad_gold"


def test_rules_checks_and_console_never_load_torch() -> None:
    modules = ("rules", "gold_check", "console.page", "console.table")
    code = "; ".join(f"import mimo_megatron.reward.{module}" for module in modules)
    code += "; import sys; assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
