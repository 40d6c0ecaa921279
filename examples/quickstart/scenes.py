"""Scenes: handwritten digits in lines over a photograph, drawn at native size; and clips in which digits come and go.

Digits stand in lines that never overlap, so reading order (lines from the top, digits from the left) is a fact of the
picture. Invariants: a mark's box is the tight bound of its ink and lies inside the picture; boxes do not overlap; a
scene is a function of the random generator, the assets and the level alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.quickstart.assets import Assets

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels; x2 and y2 are one past the last inked pixel."""

_GAP = 4  # pixels kept free between digits and between lines
_INK_LEVEL = 0.5  # coverage above which a pixel counts as ink


@dataclass(frozen=True)
class Level:
    """How hard a scene is: ranges, both ends included."""

    num_digits: tuple[int, int]
    sides: tuple[int, int]
    """Pixels of width and of height, drawn apart: the aspect ratio varies freely."""
    digit_height: tuple[int, int]
    photo_contrast: tuple[float, float]
    """0 leaves a plain background of the photograph's mean colour, 1 the whole photograph."""
    ink_contrast: tuple[int, int]
    """Steps of grey between a digit and what lies behind it."""


LEVELS: dict[str, Level] = {
    "one": Level((1, 1), (84, 112), (28, 40), (0.0, 0.1), (120, 200)),
    "few": Level((1, 2), (84, 112), (24, 40), (0.0, 0.4), (100, 200)),
    "some": Level((1, 4), (84, 140), (22, 38), (0.1, 0.7), (80, 180)),
    "many": Level((2, 5), (112, 168), (20, 36), (0.4, 1.0), (80, 180)),
}


@dataclass(frozen=True)
class Mark:
    """One digit of a scene: what it says and where its ink is."""

    label: int
    box: Box


@dataclass(frozen=True)
class Scene:
    image_HW3: NDArray[np.uint8]
    marks: tuple[Mark, ...]
    """In reading order."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.image_HW3.shape[0], self.image_HW3.shape[1]


@dataclass(frozen=True)
class Clip:
    """Frames at a fixed rate; each mark is seen from its first second up to its last."""

    frames_FHW3: NDArray[np.uint8]
    frames_per_second: int
    marks: tuple[Mark, ...]
    seconds: tuple[tuple[int, int], ...]


def draw_scene(
    rng: np.random.Generator,
    assets: Assets,
    level: Level,
    *,
    size: tuple[int, int] | None = None,
    distinct: bool = False,
) -> Scene:
    """A scene of that level; ``size`` (height, width) fixes its size, ``distinct`` forbids a label to come twice."""
    height, width = size if size else (int(rng.integers(level.sides[0], level.sides[1] + 1)) for _ in range(2))
    num_digits = int(rng.integers(level.num_digits[0], level.num_digits[1] + 1))
    inks, labels, corners = _place(rng, assets, level, (height, width), num_digits, distinct)
    canvas = _background(rng, assets, level, (height, width))
    marks = []
    for ink, label, (top, left) in zip(inks, labels, corners, strict=True):
        bottom, right = top + ink.shape[0], left + ink.shape[1]
        _blend(rng, canvas[top:bottom, left:right], ink, level)
        marks.append(Mark(label, (left, top, right, bottom)))
    return Scene(_to_bytes(canvas), tuple(marks))


def draw_clip(
    rng: np.random.Generator,
    assets: Assets,
    level: Level,
    *,
    sides: tuple[int, int],
    num_seconds: int,
    frames_per_second: int,
) -> Clip:
    """A clip over a still background: each digit appears at a whole second and leaves at a later one or at the end.

    ``sides`` replaces the level's; they come out even, as video codecs need.
    """
    height, width = (int(rng.integers(sides[0], sides[1] + 1)) // 2 * 2 for _ in range(2))
    num_digits = int(rng.integers(level.num_digits[0], level.num_digits[1] + 1))
    inks, labels, corners = _place(rng, assets, level, (height, width), num_digits, distinct=True)
    canvas = _background(rng, assets, level, (height, width))
    frames = np.repeat(canvas[None], num_seconds * frames_per_second, axis=0)
    marks, seconds = [], []
    for ink, label, (top, left) in zip(inks, labels, corners, strict=True):
        first, last = sorted(int(t) for t in rng.choice(num_seconds + 1, size=2, replace=False))
        bottom, right = top + ink.shape[0], left + ink.shape[1]
        patch = canvas[top:bottom, left:right].copy()
        _blend(rng, patch, ink, level)
        frames[first * frames_per_second : last * frames_per_second, top:bottom, left:right] = patch
        marks.append(Mark(label, (left, top, right, bottom)))
        seconds.append((first, last))
    return Clip(_to_bytes(frames), frames_per_second, tuple(marks), tuple(seconds))


def _place(
    rng: np.random.Generator, assets: Assets, level: Level, size: tuple[int, int], num_digits: int, distinct: bool
) -> tuple[list[NDArray[np.float32]], list[int], list[tuple[int, int]]]:
    """Ink masks, labels and (top, left) corners of digits in lines; drops digits for which the picture has no room."""
    height, width = size
    tallest = min(level.digit_height[1], height - _GAP)
    num_lines = int(rng.integers(1, max(1, min(num_digits, height // (tallest + 2 * _GAP))) + 1))
    members = np.sort(rng.integers(0, num_lines, size=num_digits))
    labels = rng.permutation(10)[:num_digits] if distinct else rng.integers(0, 10, size=num_digits)
    inks_out, labels_out, corners = [], [], []
    line_height = height / num_lines
    for line in range(num_lines):
        inks, kept, used = [], [], 0
        for label in labels[members == line]:
            ink = _draw_ink(rng, assets, int(label), int(rng.integers(level.digit_height[0], tallest + 1)))
            if used + ink.shape[1] + (len(inks) + 1) * _GAP > width:
                break
            inks.append(ink)
            kept.append(int(label))
            used += ink.shape[1]
        room = width - used - max(0, len(inks) - 1) * _GAP
        cuts = np.sort(rng.integers(0, room + 1, size=len(inks)))
        tallest_here = max((ink.shape[0] for ink in inks), default=0)
        slack = max(0, line_height - tallest_here - _GAP)
        centre = line * line_height + tallest_here / 2 + _GAP / 2 + rng.uniform(0, slack)
        left = 0
        for place, ink in enumerate(inks):
            free = (tallest_here - ink.shape[0]) / 2  # a lower digit may sit anywhere within its line
            top = round(centre - ink.shape[0] / 2 + rng.uniform(-free, free))
            corners.append((min(max(top, 0), height - ink.shape[0]), int(cuts[place]) + left + place * _GAP))
            left += ink.shape[1]
        inks_out += inks
        labels_out += kept
    return inks_out, labels_out, corners


def _draw_ink(rng: np.random.Generator, assets: Assets, label: int, digit_height: int) -> NDArray[np.float32]:
    """Coverage in [0, 1] of one real digit, enlarged, slightly turned and stretched, cut tight to its ink."""
    digit = Image.fromarray(np.pad(assets.digits_N88[rng.choice(assets.by_label[label])], 2))
    scale = 8 / digit_height
    stretch = rng.uniform(0.85, 1.2)
    turn = rng.uniform(-0.15, 0.15)
    side = 2 * digit_height
    across, down = scale * stretch, scale
    # Output pixel -> input place, about the middle of both.
    a, b, d, e = across, turn * down, -turn * across, down
    offset_x = 6 - (a + b) * side / 2
    offset_y = 6 - (d + e) * side / 2
    drawn = digit.transform(
        (side, side), Image.Transform.AFFINE, (a, b, offset_x, d, e, offset_y), Image.Resampling.BICUBIC
    )
    coverage = np.clip((np.asarray(drawn, dtype=np.float32) / 255 - 0.35) / 0.4, 0, 1)
    rows = np.flatnonzero((coverage > _INK_LEVEL).any(axis=1))
    columns = np.flatnonzero((coverage > _INK_LEVEL).any(axis=0))
    tight = coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return tight[:digit_height]  # turning can add a row


def _background(rng: np.random.Generator, assets: Assets, level: Level, size: tuple[int, int]) -> NDArray[np.float32]:
    """A random piece of a random photograph, drawn towards its mean colour."""
    photo = assets.photos[rng.integers(len(assets.photos))]
    zoom = rng.uniform(1.0, min(3.0, photo.shape[0] / size[0], photo.shape[1] / size[1]))
    height, width = (int(side * zoom) for side in size)
    top = int(rng.integers(0, photo.shape[0] - height + 1))
    left = int(rng.integers(0, photo.shape[1] - width + 1))
    piece = Image.fromarray(photo[top : top + height, left : left + width])
    pixels = np.asarray(piece.resize((size[1], size[0]), Image.Resampling.BILINEAR), dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    mean = pixels.mean(axis=(0, 1))
    return mean + (pixels - mean) * np.float32(rng.uniform(*level.photo_contrast))


def _blend(rng: np.random.Generator, region_HW3: NDArray[np.float32], ink: NDArray[np.float32], level: Level) -> None:
    """Paints the ink over the region, in place: lighter or darker than what is there, with a tint."""
    behind = float(region_HW3.mean())
    contrast = rng.uniform(*level.ink_contrast)
    can_be_light, can_be_dark = behind + contrast <= 255, behind - contrast >= 0
    is_light = rng.random() < 0.5 if can_be_light == can_be_dark else can_be_light
    colour = behind + (contrast if is_light else -contrast) + rng.uniform(-40, 40, size=3)
    cover = ink[:, :, None]
    region_HW3 += cover * (np.clip(colour, 0, 255).astype(np.float32) - region_HW3)


def _to_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
