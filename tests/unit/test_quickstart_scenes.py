"""The demo's pictures: split by identity, boxes that bound the ink, reading order, determinism."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from examples.quickstart.assets import HELD_OUT_PHOTOS, TRAIN_PHOTOS, held_out_digits, load_assets
from examples.quickstart.scenes import LEVELS, Level, Mark, draw_clip, draw_scene

PLAIN = Level((1, 5), (100, 168), (20, 36), (0.0, 0.0), (120, 200))


def test_no_digit_and_no_photo_is_in_both_shares() -> None:
    train, held_out = load_assets("train"), load_assets("held_out")
    train_digits = {digit.tobytes() for digit in train.digits_N88}
    held_out_images = {digit.tobytes() for digit in held_out.digits_N88}
    assert not train_digits & held_out_images
    assert len(train_digits) + len(held_out_images) == 1797
    assert not set(TRAIN_PHOTOS) & set(HELD_OUT_PHOTOS)
    train_photos = {photo.tobytes() for photo in train.photos}
    assert not train_photos & {photo.tobytes() for photo in held_out.photos}


def test_every_class_gives_a_fifth_to_the_held_out_share() -> None:
    labels = load_digits().target
    is_held_out = held_out_digits(labels)
    for label in range(10):
        assert is_held_out[labels == label].mean() == pytest.approx(0.2, abs=0.005)


def test_labels_name_the_digits_they_stand_beside() -> None:
    bunch = load_digits()
    stored = [np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in bunch.images]
    known = dict(zip(stored, bunch.target, strict=True))
    assets = load_assets("held_out")
    assert all(known[digit.tobytes()] == label for digit, label in zip(assets.digits_N88, assets.labels_N, strict=True))
    for label, members in enumerate(assets.by_label):
        assert (assets.labels_N[members] == label).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), level=st.sampled_from(sorted(LEVELS)))
def test_boxes_lie_inside_apart_and_in_reading_order(seed: int, level: str) -> None:
    scene = draw_scene(np.random.default_rng(seed), load_assets("train"), LEVELS[level])
    height, width = scene.size
    assert LEVELS[level].sides[0] <= min(height, width) and max(height, width) <= LEVELS[level].sides[1]
    assert 1 <= len(scene.marks) <= LEVELS[level].num_digits[1]
    boxes = [mark.box for mark in scene.marks]
    for place, (x1, y1, x2, y2) in enumerate(boxes):
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        for a1, b1, a2, b2 in boxes[place + 1 :]:
            is_same_line_to_the_right = x2 <= a1 and b1 < y2
            is_below = y2 <= b1
            assert is_same_line_to_the_right or is_below
            assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1


def _boxes_bound_the_ink(pixels_HW3: NDArray[np.uint8], marks: tuple[Mark, ...]) -> bool:
    """On a plain background whatever differs from it is ink."""
    pixels = pixels_HW3.astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    is_ink = np.abs(pixels - background).max(axis=2) > 8
    covered = np.zeros_like(is_ink)
    is_tight = True
    for mark in marks:
        x1, y1, x2, y2 = mark.box
        region = is_ink[y1:y2, x1:x2]
        is_tight &= bool(region[[0, -1]].any(axis=1).all() and region[:, [0, -1]].any(axis=0).all())
        covered[y1:y2, x1:x2] = True
    return is_tight and not (is_ink & ~covered).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), side=st.integers(0, 3), step=st.sampled_from([-1, 1]))
def test_boxes_are_the_tight_bounds_of_the_ink_and_one_pixel_more_or_less_shows(
    seed: int, side: int, step: int
) -> None:
    scene = draw_scene(np.random.default_rng(seed), load_assets("train"), PLAIN)
    assert _boxes_bound_the_ink(scene.image_HW3, scene.marks)
    box = list(scene.marks[0].box)
    box[side] += step
    height, width = scene.size
    if min(box) >= 0 and box[2] <= width and box[3] <= height:
        moved = (Mark(scene.marks[0].label, (box[0], box[1], box[2], box[3])), *scene.marks[1:])
        assert not _boxes_bound_the_ink(scene.image_HW3, moved)


def test_a_scene_is_a_function_of_its_generator() -> None:
    one, same, other = (
        draw_scene(np.random.default_rng(seed), load_assets("train"), LEVELS["many"]) for seed in (5, 5, 6)
    )
    assert one.marks == same.marks and (one.image_HW3 == same.image_HW3).all()
    assert one.marks != other.marks


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_clip_digits_are_visible_exactly_in_their_seconds(seed: int) -> None:
    clip = draw_clip(
        np.random.default_rng(seed),
        load_assets("train"),
        LEVELS["few"],
        sides=(84, 112),
        num_seconds=4,
        frames_per_second=4,
    )
    height, width = clip.frames_FHW3.shape[1:3]
    assert len(clip.frames_FHW3) == 16 and height % 2 == 0 and width % 2 == 0
    for mark, (first, last) in zip(clip.marks, clip.seconds, strict=True):
        assert 0 <= first < last <= 4
        x1, y1, x2, y2 = mark.box
        region = clip.frames_FHW3[:, y1:y2, x1:x2].astype(int)
        is_visible = np.zeros(16, dtype=bool)
        is_visible[4 * first : 4 * last] = True
        shown = region[is_visible][0]
        assert (region[is_visible] == shown).all()
        assert all(np.abs(frame - shown).max() > 30 for frame in region[~is_visible])
