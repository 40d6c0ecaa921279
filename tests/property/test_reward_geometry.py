"""GIoU against its definition, what leaves it alone, and rewards of any numbers at all."""

import json
import math
import random

import numpy as np
import pytest
import torch

from mimo_megatron.data.image import smart_resize
from mimo_megatron.reward import boxes
from mimo_megatron.reward.geometry import Box, overlap, read_box, to_shown
from mimo_megatron.reward.wire import ImageMeta
from tests.rule_cases import META, STORED

NUM_BOXES = 100_000


def giou_of_torchvision(first_N4: torch.Tensor, second_N4: torch.Tensor) -> torch.Tensor:
    """The formula of torchvision.ops.boxes.generalized_box_iou, row by row, in fp64."""
    left_top = torch.max(first_N4[:, :2], second_N4[:, :2])
    right_low = torch.min(first_N4[:, 2:], second_N4[:, 2:])
    inter = (right_low - left_top).clamp(min=0).prod(dim=1)
    areas = [(box[:, 2:] - box[:, :2]).prod(dim=1) for box in (first_N4, second_N4)]
    union = areas[0] + areas[1] - inter
    hull = (torch.max(first_N4[:, 2:], second_N4[:, 2:]) - torch.min(first_N4[:, :2], second_N4[:, :2])).prod(dim=1)
    return inter / union - (hull - union) / hull


def random_boxes(count: int, seed: int, side: float = 4000.0) -> np.ndarray:
    """Boxes with 1 px² at least, of sizes from a pixel to the whole frame (log-uniform), anywhere in it."""
    rng = np.random.default_rng(seed)
    size_N2 = np.exp(rng.uniform(0, np.log(side), (count, 2)))
    start_N2 = rng.uniform(0, 1, (count, 2)) * (side - size_N2)
    return np.concatenate([start_N2, start_N2 + size_N2], axis=1)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[Box], list[Box]]:
    first, second = random_boxes(NUM_BOXES, 1), random_boxes(NUM_BOXES, 2)
    near = np.arange(NUM_BOXES) % 2 == 0  # half of the pairs overlap well
    second[near] = first[near] + np.random.default_rng(3).normal(0, 0.1, (near.sum(), 4)) * (
        first[near][:, [2, 3, 2, 3]] - first[near][:, [0, 1, 0, 1]]
    )
    is_valid = (second[:, :2] < second[:, 2:]).all(axis=1)
    second[~is_valid] = first[~is_valid]
    return [tuple(box) for box in first.tolist()], [tuple(box) for box in second.tolist()]


def test_giou_equals_torchvisions_definition_in_fp64(pairs) -> None:
    expected = giou_of_torchvision(*(torch.tensor(boxes, dtype=torch.float64) for boxes in pairs))
    found = torch.tensor([overlap(*pair)[1] for pair in zip(*pairs, strict=True)], dtype=torch.float64)
    assert (found - expected).abs().max() <= 1e-12
    assert found.min() < -0.9 and found.max() > 0.95 and (found > 0).double().mean() > 0.4


def test_a_planted_wrong_hull_is_found(pairs) -> None:
    expected = giou_of_torchvision(*(torch.tensor(boxes, dtype=torch.float64) for boxes in pairs))
    iou = torch.tensor([overlap(*pair)[0] for pair in zip(*pairs, strict=True)], dtype=torch.float64)
    assert (iou - expected).abs().max() > 1e-12


def test_giou_is_symmetric_and_one_of_a_box_with_itself(pairs) -> None:
    for first, second in zip(*pairs, strict=True):
        assert overlap(first, first) == (1.0, 1.0)
        assert math.isclose(overlap(first, second)[1], overlap(second, first)[1], abs_tol=1e-12)


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 777.25), (3.7, 0.0), (0.013, 0.0), (19.3, -12345.6)])
def test_giou_is_unchanged_by_translation_and_scale(pairs, factor: float, shift: float) -> None:
    for first, second in zip(*(side[:20_000] for side in pairs), strict=True):
        moved = [tuple(value * factor + shift for value in box) for box in (first, second)]
        # Coordinates of 1e5 beside a width of 0.01 leave 9 digits to a box's side.
        if min(moved[0][2] - moved[0][0], moved[0][3] - moved[0][1]) > 0.1:
            assert math.isclose(overlap(first, second)[1], overlap(*moved)[1], abs_tol=1e-9)


def test_an_inverted_box_is_worth_nothing_in_every_mode() -> None:
    gold = boxes.read_gold([[200, 160, 600, 480]], META)
    for mode in ("relu", "linear", "iou", "threshold"):
        meta = META.model_copy(update={"box_mode": mode})
        assert boxes.score("[100, 80, 300, 240]", gold, meta).reward == 1.0
        for said in ("[300, 240, 100, 80]", "[300, 80, 100, 240]", "[100, 240, 300, 80]"):
            assert boxes.score(said, gold, meta).reward == 0.0


@pytest.mark.slow
def test_any_four_numbers_earn_a_finite_reward_in_the_unit_interval() -> None:
    draw = random.Random(5)
    odd = (math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-308, 1e5, 1e5 + 1, 0.0, -0.0, 1e9, 500, 505, 400, 404)
    modes = [META.model_copy(update={"box_mode": mode}) for mode in ("relu", "linear", "iou", "threshold")]
    seen = {"ok": 0, "invalid": 0}
    for _ in range(20_000):
        corners = sorted(draw.uniform(0, STORED[0]) for _ in range(2)), sorted(draw.uniform(0, 800) for _ in range(2))
        true = [corners[0][0], corners[1][0], corners[0][1] + 2, corners[1][1] + 2]
        gold = boxes.BoxGold((tuple(min(value, side) for value, side in zip(true, STORED * 2, strict=True)),), True)
        for _ in range(20):
            said = [draw.choice(odd) if draw.random() < 0.1 else draw.uniform(-20, 520) for _ in range(4)]
            verdict = boxes.score(json.dumps(said), gold, draw.choice(modes))
            assert verdict.reward is not None and math.isfinite(verdict.reward) and 0.0 <= verdict.reward <= 1.0
            seen[verdict.status] += 1
    assert sum(seen.values()) == 400_000 and min(seen.values()) > 20_000, seen


def test_a_box_survives_the_way_to_the_shown_image_and_back_in_whole_pixels() -> None:
    draw = random.Random(7)
    ious = []
    while len(ious) < 1000:
        width, height = draw.randint(56, 6000), draw.randint(56, 6000)
        shown_height, shown_width = smart_resize(height, width, multiple=28, min_pixels=3136, max_pixels=12_845_056)
        image = ImageMeta(size=(width, height), shown=(shown_width, shown_height))
        x1, y1 = draw.uniform(0, width * 0.7), draw.uniform(0, height * 0.7)
        box = (x1, y1, draw.uniform(x1 + width * 0.2, width), draw.uniform(y1 + height * 0.2, height))
        exact = overlap(box, read_box(list(to_shown(box, image)), image))[0]
        assert exact >= 1 - 1e-9
        ious.append((overlap(box, read_box([round(value) for value in to_shown(box, image)], image))[0], image, box))
    # Whole pixels alone cost a small box more: half a pixel on each side of 100 x 100 is 2 %.
    large = [iou for iou, image, box in ious if min(_sides(to_shown(box, image))) >= 200]
    assert len(large) >= 600 and min(large) >= 0.99


def test_swapped_factors_do_not_survive_that_way() -> None:
    image = ImageMeta(size=(1000, 500), shown=(560, 504))
    wrong = ImageMeta(size=(500, 1000), shown=(560, 504))
    box = (100.0, 50.0, 400.0, 300.0)
    assert overlap(box, read_box(list(to_shown(box, image)), wrong))[0] < 0.99


def _sides(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]
