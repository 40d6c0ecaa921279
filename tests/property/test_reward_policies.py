"""What answers earn that never look: constant ones and hedges, on golds distributed like those of known data sets.

At most 0.2 under the default mode. Golds whose constant answers earn more exist (see docs/rewards.md); there the
check of a file says so.
"""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mimo_megatron.reward.gold_check import GoldRow, check_golds
from mimo_megatron.reward.rules import score
from mimo_megatron.reward.wire import ImageMeta, Meta

MOST = 0.2
NUM_GOLDS = 3000
STORED, SHOWN = (640, 480), (644, 476)
META = Meta(image=ImageMeta(size=STORED, shown=SHOWN))
VIDEO = Meta(duration_seconds=150)


def uniform_box(draw: random.Random) -> list[float]:
    """Both corners uniform over the image: mean area 1/9 of it."""
    while True:
        xs, ys = (sorted(draw.uniform(0, side) for _ in range(2)) for side in STORED)
        if (xs[1] - xs[0]) * (ys[1] - ys[0]) >= 4:
            return [xs[0], ys[0], xs[1], ys[1]]


def coco_box(draw: random.Random) -> list[float]:
    """Log-normal area with COCO's published shares: 41 % below 32², 34 % up to 96², 24 % above, of 640 x 480."""
    while True:
        share, aspect = draw.lognormvariate(-5.18, 2.36), draw.lognormvariate(0, 0.5)
        width, height = (share * STORED[0] * STORED[1] * aspect) ** 0.5, (share * STORED[0] * STORED[1] / aspect) ** 0.5
        if 2 <= width <= STORED[0] and 2 <= height <= STORED[1]:
            x, y = draw.uniform(0, STORED[0] - width), draw.uniform(0, STORED[1] - height)
            return [x, y, x + width, y + height]


def moment(draw: random.Random) -> list[float]:
    """Like QVHighlights: 150 s of video, moments of 24.6 s on average, mostly shorter, from 3 s on."""
    length = min(150.0, max(3.0, draw.lognormvariate(2.9, 0.8)))
    start = draw.uniform(0, 150 - length)
    return [start, start + length]


def short_moment(draw: random.Random) -> list[float]:
    """Like Charades-STA: 30 s of video, moments of 8 s on average."""
    length = min(30.0, max(2.0, draw.lognormvariate(2.0, 0.4)))
    start = draw.uniform(0, 30 - length)
    return [start, start + length]


def step(draw: random.Random) -> dict[str, Any]:
    """Actions in the shares that AndroidControl reports, roughly; targets like COCO's boxes."""
    name = draw.choices(("click", "scroll", "input", "open", "press", "wait", "finished"), (58, 12, 7, 6, 5, 6, 6))[0]
    arguments: dict[str, Any] = {
        "click": {"start_box": coco_box(draw)},
        "scroll": {"direction": draw.choices(("down", "up", "left", "right"), (70, 15, 8, 7))[0]},
        "input": {"text": f"word {draw.randrange(100)}"},
        "open": {"app": f"app {draw.randrange(50)}"},
        "press": {"keys": ["back"]},
        "wait": {},
        "finished": {"status": "success"},
    }[name]
    return {"action": name, **arguments}


def mean(task: str, golds: Sequence[Any], response: str, meta: Meta) -> float:
    verdicts = [score(task, response, gold, meta) for gold in golds]
    assert all(verdict.reward is not None for verdict in verdicts)
    return statistics.fmean(verdict.reward or 0.0 for verdict in verdicts)


def centred(share: float) -> list[float]:
    """A box in the middle with this share of both sides of the shown image."""
    width, height = SHOWN
    return [width * (1 - share) / 2, height * (1 - share) / 2, width * (1 + share) / 2, height * (1 + share) / 2]


def grid(columns: int, rows: int) -> list[list[float]]:
    width, height = SHOWN[0] / columns, SHOWN[1] / rows
    return [
        [column * width, row * height, (column + 1) * width, (row + 1) * height]
        for row in range(rows)
        for column in range(columns)
    ]


BOX_POLICIES = {
    "whole image": [[0, 0, *SHOWN]],
    **{f"centred {share}": [centred(share)] for share in (0.2, 0.35, 0.5, 0.65, 0.8)},
    "two halves": grid(2, 1),
    "four quarters": grid(2, 2),
    "spray of 9": grid(3, 3),
    "spray of 16": grid(4, 4),
    "centred ones": [centred(share) for share in (0.2, 0.4, 0.6, 0.8)],
    "whole image 4 times": [[0, 0, *SHOWN]] * 4,
}


@pytest.mark.parametrize("name", BOX_POLICIES)
@pytest.mark.parametrize("gold_box", [uniform_box, coco_box])
@pytest.mark.parametrize("all_boxes", [False, True])
def test_constant_boxes_earn_little_where_one_is_true(
    name: str, gold_box: Callable[[random.Random], list[float]], all_boxes: bool
) -> None:
    draw = random.Random(11)
    golds = [[gold_box(draw)] for _ in range(NUM_GOLDS)]
    meta = META.model_copy(update={"all_boxes": all_boxes})
    assert mean("box", golds, json.dumps(BOX_POLICIES[name]), meta) <= MOST


@pytest.mark.parametrize("name", BOX_POLICIES)
def test_constant_boxes_earn_little_where_several_are_true(name: str) -> None:
    draw = random.Random(12)
    golds = [[coco_box(draw) for _ in range(draw.randint(2, 7))] for _ in range(NUM_GOLDS)]
    assert mean("box", golds, json.dumps(BOX_POLICIES[name]), META) <= MOST


def test_the_linear_mode_pays_the_whole_image_half_so_the_measure_has_power() -> None:
    draw = random.Random(11)
    golds = [[uniform_box(draw)] for _ in range(NUM_GOLDS)]
    whole = json.dumps(BOX_POLICIES["whole image"])
    assert mean("box", golds, whole, META.model_copy(update={"box_mode": "linear"})) > 0.5
    assert 0.05 < mean("box", golds, whole, META) < MOST


@pytest.mark.parametrize(
    "response",
    ["[322, 238]", "[322, 357]", "[0, 0]", "[322, 238] [161, 119]", "[[322, 238], [161, 119]]", "[0, 0, 644, 476]"],
)
def test_constant_points_earn_little(response: str) -> None:
    draw = random.Random(13)
    assert mean("point", [coco_box(draw) for _ in range(NUM_GOLDS)], response, META) <= MOST


@pytest.mark.parametrize("span", [(0, 9), (1, 10), (2, 20)])
def test_the_best_constant_count_earns_little_on_balanced_golds(span: tuple[int, int]) -> None:
    draw = random.Random(14)
    golds = [draw.randint(*span) for _ in range(NUM_GOLDS)]
    best = max(mean("count", golds, rf"\boxed{{{count}}}", Meta()) for count in range(25))
    assert 0 < best <= MOST


@pytest.mark.parametrize(
    "response",
    [r"\boxed{5 or 6}", r"\boxed{5, 6}", r"\boxed{1-10}", "".join(rf"\boxed{{{count}}}" for count in range(11))],
)
def test_hedged_counts_earn_no_more_than_one_constant(response: str) -> None:
    golds = [random.Random(15).randint(1, 10) for _ in range(NUM_GOLDS)]
    assert mean("count", golds, response, Meta()) <= MOST


@pytest.mark.parametrize(
    "response",
    [
        "[00:00, 02:30]",
        "[00:38, 01:53]",
        "[01:00, 01:30]",
        "[00:00, 00:25]",
        "[00:00, 01:15] [01:15, 02:30]",
        r"\boxed{[00:00, 01:15]} \boxed{[00:00, 02:30]}",
    ],
)
def test_constant_intervals_earn_little(response: str) -> None:
    draw = random.Random(16)
    golds = [moment(draw) for _ in range(NUM_GOLDS)]
    assert 22 < statistics.fmean(end - start for start, end in golds) < 27
    assert mean("time", golds, response, VIDEO) <= MOST


@pytest.mark.parametrize(
    "response",
    [
        '{"action": "wait"}',
        '{"action": "scroll", "direction": "down"}',
        '{"action": "click", "start_point": [322, 238]}',
        '{"action": "press", "keys": ["back"]}',
        '{"action": "finished", "status": "success"}',
        '[{"action": "wait"}, {"action": "scroll", "direction": "down"}]',
    ],
)
def test_constant_actions_earn_little(response: str) -> None:
    draw = random.Random(17)
    assert mean("gui", [step(draw) for _ in range(NUM_GOLDS)], response, META) <= MOST


def test_short_videos_pay_constant_intervals_more_and_the_check_of_golds_says_so() -> None:
    draw = random.Random(16)
    golds = [short_moment(draw) for _ in range(NUM_GOLDS)]
    assert 7.5 < statistics.fmean(end - start for start, end in golds) < 8.5
    rows = [
        GoldRow(id=str(row), task="time", gold=gold, meta=Meta(duration_seconds=30)) for row, gold in enumerate(golds)
    ]
    earned = check_golds(enumerate(rows, start=1), lambda gold, meta: "").constant_rewards
    assert MOST < earned["time: the whole video"] < earned["time: the middle half"] < 0.36


def test_the_check_of_golds_measures_what_these_policies_earn() -> None:
    draw = random.Random(11)
    golds = [[uniform_box(draw)] for _ in range(NUM_GOLDS)]
    rows = [GoldRow(id=str(row), task="box", gold=gold, meta=META) for row, gold in enumerate(golds)]
    earned = check_golds(enumerate(rows, start=1), lambda gold, meta: "").constant_rewards
    assert earned["box: the whole image"] == mean("box", golds, json.dumps(BOX_POLICIES["whole image"]), META)
