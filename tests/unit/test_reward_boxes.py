"""Box answers: what is read, what is refused, and what is paid. The stored image is twice the shown one."""

import json

import pytest

from mimo_megatron.reward.boxes import read_boxes
from mimo_megatron.reward.wire import ImageMeta
from tests.rule_cases import judge, meta_with, outcome

GOLD = [[200, 160, 600, 480]]
RIGHT = [100, 80, 300, 240]
TWO_GOLDS = [[0, 0, 200, 200], [400, 400, 800, 800]]
TWO_RIGHT = [[0, 0, 100, 100], [200, 200, 400, 400]]


@pytest.mark.parametrize(
    "response",
    [
        "[100, 80, 300, 240]",
        "[[100, 80, 300, 240]]",
        '{"bbox_2d": [100, 80, 300, 240]}',
        '[{"bbox_2d": [100, 80, 300, 240], "label": "cat"}]',
        '```json\n[{"bbox_2d": [100, 80, 300, 240], "label": "a [cat]"}]\n```',
        '```\n{"bbox_2d": [100.0, 80.0, 300.0, 240.0]}\n```',
        "The cat is here: [100, 80, 300, 240].",
        "<think>Perhaps [1, 2, 3, 4]?</think>[100, 80, 300, 240]",
        "[100, 80, 300, 240]\nAgain: [100, 80, 300, 240]",
        "[100, 80, 300, 240]",
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,80),(300,240)<|box_end|>",
        "<|box_start|>( 100 , 80.0 ),(300,240)<|box_end|>",
        "<box>[[100, 80, 300, 240]]</box>",
        '[{"bbox_2d": [100, 80, 300, 240], "label": "猫<|im_end|><|image_pad|>"}]',
    ],
)
def test_accepted_forms_of_the_right_box_earn_one(response: str) -> None:
    assert outcome("box", response, GOLD) == 1.0


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        pytest.param("", "no_answer", id="empty"),
        pytest.param("The cat is on the left.", "no_answer", id="prose"),
        pytest.param("[]", "no_answer", id="no box at all"),
        pytest.param("<think>[100, 80, 300, 240]</think>", "no_answer", id="only in think"),
        pytest.param("<think>so [100, 80, 300, 240]", "no_answer", id="unclosed think"),
        pytest.param("[100, 80, 300, 240]</think>", "no_answer", id="a second end of think"),
        pytest.param("[100, 80, 300, 240]</think>It is there.", "no_answer", id="answer before the last end of think"),
        pytest.param('[{"bbox_2d": [x1, y1, x2, y2], "label": "{label_name}"}]', "unreadable", id="copied template"),
        pytest.param("[300, 240, 100, 80]", "degenerate", id="inverted"),
        pytest.param("[300, 80, 100, 240]", "degenerate", id="inverted in x"),
        pytest.param("[100, 240, 300, 80]", "degenerate", id="inverted in y"),
        pytest.param("[100, 80, 100, 240]", "degenerate", id="zero area"),
        pytest.param("[100, 80, 100.9, 81]", "degenerate", id="below one pixel"),
        pytest.param("[-5, 80, -1, 240]", "degenerate", id="nothing left after the clip"),
        pytest.param("[1000, 800, 0, 0]", "degenerate", id="the inverted frame that paid 20.5"),
        pytest.param("[1e9, 1e9, -1e9, -1e9]", "out_of_range", id="the inverted frame that paid 1e14"),
        pytest.param("[100, 80, 506, 240]", "out_of_range", id="more than 1 % outside"),
        pytest.param("[100, -5, 300, 240]", "out_of_range", id="more than 1 % above"),
        pytest.param("[0, 0, 1e999, 1e999]", "out_of_range", id="infinite by exponent"),
        pytest.param("[0, 0, 1e308, 1e308]", "out_of_range", id="1e308"),
        pytest.param(f"[0, 0, {'9' * 400}, 10]", "out_of_range", id="400 digits"),
        pytest.param(f"[0, 0, {'9' * 5000}, 10]", "unreadable", id="5,000 digits"),
        pytest.param("[NaN, 0, 1, 1]", "unreadable", id="NaN"),
        pytest.param("[-Infinity, 0, Infinity, 1]", "unreadable", id="infinity"),
        pytest.param("[" * 4000 + "]" * 4000, "unreadable", id="4,000 deep"),
        pytest.param("[" * 100_000, "too_large", id="100,000 deep"),
        pytest.param("[[[[[100, 80, 300, 240]]]]]", "too_large", id="5 deep"),
        pytest.param("[[100, 80, 300, 240]" + " " * 9000 + "]", "too_large", id="9,000 characters"),
        pytest.param(str([RIGHT] * 17), "too_large", id="17 boxes"),
        pytest.param("<|box_start|>(1,1),(9,9)<|box_end|>" * 17, "too_large", id="17 boxes in tokens"),
        pytest.param('{"bbox_2d": [1, 1, 9, 9], "bbox_2d": [100, 80, 300, 240]}', "unreadable", id="a key twice"),
        pytest.param('{"bbox_2d": [1, 1, 9, 9], "or": [100, 80, 300, 240]}', "unreadable", id="a second list"),
        pytest.param('{"bbox": [100, 80, 300, 240]}', "unreadable", id="another key"),
        pytest.param("[true, false, 300, 240]", "unreadable", id="bools"),
        pytest.param('["100", "80", "300", "240"]', "unreadable", id="numbers in quotes"),
        pytest.param("[100, 80, 300]", "unreadable", id="three numbers"),
        pytest.param("[100, 80, 300, 240, 0.9]", "unreadable", id="five numbers"),
        pytest.param("[100, 80, 300, 240", "unreadable", id="cut off"),
        pytest.param('[{"bbox_2d": [100, 80, 300, 240]}, {"bbox_2d": [1', "unreadable", id="cut off after a box"),
        pytest.param("(100, 80), (300, 240)", "no_answer", id="pairs without tokens"),
        pytest.param(r"\boxed{[100, 80, 300, 240]}", "unreadable", id="boxed"),
        pytest.param("[100, 80, 300, 240\x00]", "unreadable", id="NUL"),
        pytest.param("[١٠٠, 80, 300, 240]", "unreadable", id="Arabic digits"),
        pytest.param("<|box_start|>(100,80),(300,240)", "unreadable", id="tokens cut off"),
        pytest.param("<|box_start|>(100,80),(300,240)<|box_end|> [1,2,3,4]", "unreadable", id="tokens and JSON"),
        pytest.param("[100, 80, 300, 240] or [1, 1, 9, 9]", "several", id="one or the other"),
        pytest.param("```json\n[100, 80, 300, 240]\n```\n```json\n[1, 1, 9, 9]\n```", "several", id="two blocks"),
        pytest.param(str([RIGHT, [1, 1, 9, 9]]), "several", id="two boxes where one is asked"),
        pytest.param(str([RIGHT] * 4), "several", id="the same box repeated"),
        pytest.param("[100, 80, 300, 240]" + "\u0315\u0300" * 100, "too_large", id="a tower of marks"),
    ],
)
def test_refused_answers_say_why(response: str, reason: str) -> None:
    assert outcome("box", response, GOLD) == reason


def test_an_answer_that_generation_cut_off_is_truncated() -> None:
    assert outcome("box", "<think>long", GOLD, meta_with(finish_reason="length")) == "truncated"


def test_a_zero_width_sign_or_full_width_digits_change_nothing() -> None:
    assert outcome("box", "[1\u200b00, 80, ３００, 240]", GOLD) == 1.0
    assert outcome("box", "\u202e[100, 80, 300, 240]", GOLD) == 1.0


def test_a_lone_surrogate_around_the_box_is_only_a_word() -> None:
    assert outcome("box", "\ud800 [100, 80, 300, 240]", GOLD) == 1.0


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("0 to 1", [0.2, 0.2, 0.6, 0.6]),
        ("0 to 1000", [200, 200, 600, 600]),
        ("xywh", [100, 80, 200, 160]),
        ("yx", [80, 100, 240, 300]),
        ("stored pixels", GOLD[0]),
        ("the whole image", [0, 0, 500, 400]),
        ("one pixel that says 0 to 1", [0, 0, 1, 1]),
    ],
)
def test_coordinates_of_another_convention_are_taken_as_shown_pixels(name: str, box: list[float]) -> None:
    honest = judge("box", str([102, 82, 298, 238]), GOLD).reward
    assert honest is not None and honest > 0.9
    assert (judge("box", str(box), GOLD).reward or 0.0) < 0.8 * honest


def test_zero_to_one_never_means_the_whole_image() -> None:
    assert outcome("box", "[0, 0, 1, 1]", [[0, 0, 1000, 800]]) == pytest.approx(1 / (500 * 400))


def test_overshoot_up_to_one_percent_is_clipped() -> None:
    assert outcome("box", "[-5, -4, 505, 404]", [[0, 0, 1000, 800]]) == 1.0


def test_frames_with_different_factors_per_axis_are_mapped_by_axis() -> None:
    meta = meta_with(image=ImageMeta(size=(300, 1000), shown=(600, 250)))
    assert outcome("box", "[60, 50, 120, 100]", [[30, 200, 60, 400]], meta) == 1.0
    assert read_boxes("[60, 50, 120, 100]", meta) == [(30.0, 200.0, 60.0, 400.0)]


@pytest.mark.parametrize(("mode", "reward"), [("relu", 0.0), ("linear", 0.25), ("iou", 0.0), ("threshold", 0.0)])
def test_modes_of_two_boxes_that_do_not_touch(mode: str, reward: float) -> None:
    # 100 x 200 twice in a hull of 400 x 200: GIoU = -(80,000 - 40,000) / 80,000 = -1/2.
    gold, said = [[0, 0, 100, 200]], "[150, 0, 200, 100]"
    assert outcome("box", said, gold, meta_with(box_mode=mode)) == reward


@pytest.mark.parametrize(("mode", "reward"), [("relu", 0.5), ("linear", 0.75), ("iou", 0.5), ("threshold", 1.0)])
def test_modes_of_a_box_that_is_half_of_the_gold(mode: str, reward: float) -> None:
    assert outcome("box", "[0, 0, 50, 100]", [[0, 0, 200, 200]], meta_with(box_mode=mode)) == reward


def test_the_threshold_is_the_metas() -> None:
    meta = meta_with(box_mode="threshold", threshold=0.6)
    assert outcome("box", "[0, 0, 50, 100]", [[0, 0, 200, 200]], meta) == 0.0


def test_boxes_are_matched_in_any_order() -> None:
    assert outcome("box", str(TWO_RIGHT), TWO_GOLDS) == outcome("box", str(TWO_RIGHT[::-1]), TWO_GOLDS) == 1.0


def test_missing_and_superfluous_boxes_cost_alike() -> None:
    third = [300, 0, 350, 50]
    assert outcome("box", str(TWO_RIGHT[:1]), TWO_GOLDS) == pytest.approx(1 / 2)
    assert outcome("box", str([*TWO_RIGHT, third]), TWO_GOLDS) == pytest.approx(2 / 3)
    assert outcome("box", str([*TWO_RIGHT, third, third]), TWO_GOLDS) == pytest.approx(1 / 2)


def test_the_same_box_repeated_is_matched_once() -> None:
    assert outcome("box", str([TWO_RIGHT[0]] * 2), TWO_GOLDS) == pytest.approx(1 / 2)


def test_more_than_twice_the_golds_and_two_is_spray() -> None:
    assert judge("box", str([TWO_RIGHT[0]] * 6), TWO_GOLDS).status == "ok"
    assert outcome("box", str([TWO_RIGHT[0]] * 7), TWO_GOLDS) == "several"


def test_one_bad_box_spoils_the_list() -> None:
    assert outcome("box", str([TWO_RIGHT[0], [9, 9, 9, 9]]), TWO_GOLDS) == "degenerate"


def test_a_gold_of_one_box_may_be_all_there_are() -> None:
    meta = meta_with(all_boxes=True)
    assert outcome("box", str([RIGHT, [1, 1, 9, 9]]), GOLD, meta) == pytest.approx(1 / 2)
    assert outcome("box", str([RIGHT] * 5), GOLD, meta) == "several"


def test_the_order_of_boxes_never_matters_even_where_none_overlaps() -> None:
    said = [[110, 0, 150, 40], [410, 300, 450, 340]]
    rewards = {judge("box", str(order), TWO_GOLDS, meta_with(box_mode="linear")).reward for order in (said, said[::-1])}
    assert len(rewards) == 1


def test_a_verdict_tells_its_parts() -> None:
    verdict = judge("box", json.dumps([0, 0, 50, 100]), [[0, 0, 200, 200]])
    assert verdict.parts == {"iou": 0.5, "giou": 0.5, "num_boxes": 1} and verdict.reason == "partial"
    assert verdict.answer == "[0, 0, 50, 100]"
