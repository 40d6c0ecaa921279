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


# The first three are where a model that knows nothing learns to look: see README.md.
LEVELS: dict[str, Level] = {
    "tile": Level((1, 1), (56, 56), (36, 48), (0.0, 0.05), (120, 200)),
    "one": Level((1, 1), (56, 84), (28, 44), (0.0, 0.1), (120, 200)),
    "two": Level((1, 2), (56, 84), (24, 36), (0.0, 0.2), (120, 200)),
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


def draw_scene(rng: np.random.Generator, assets: Assets, level: Level) -> Scene:
    """A scene of that level."""
    height, width = (int(rng.integers(level.sides[0], level.sides[1] + 1)) for _ in range(2))
    num_digits = int(rng.integers(level.num_digits[0], level.num_digits[1] + 1))
    placed = _place(rng, assets, level, (height, width), rng.integers(0, 10, size=num_digits))
    canvas_HW3 = _background(rng, assets, level, (height, width))
    for one in placed:
        _blend(rng, canvas_HW3[one.rows, one.columns], one.ink, level)
    return Scene(_to_bytes(canvas_HW3), tuple(one.mark for one in placed))


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
    placed = _place(rng, assets, level, (height, width), rng.permutation(10)[:num_digits])
    canvas_HW3 = _background(rng, assets, level, (height, width))
    frames_FHW3 = np.repeat(canvas_HW3[None], num_seconds * frames_per_second, axis=0)
    seconds = []
    for one in placed:
        first, last = sorted(int(second) for second in rng.choice(num_seconds + 1, size=2, replace=False))
        region_HW3 = canvas_HW3[one.rows, one.columns].copy()
        _blend(rng, region_HW3, one.ink, level)
        frames_FHW3[first * frames_per_second : last * frames_per_second, one.rows, one.columns] = region_HW3
        seconds.append((first, last))
    return Clip(_to_bytes(frames_FHW3), frames_per_second, tuple(one.mark for one in placed), tuple(seconds))


@dataclass(frozen=True)
class _Placed:
    """One digit and where it goes."""

    label: int
    ink: NDArray[np.float32]
    """Coverage in [0, 1], [height, width]."""
    top: int
    left: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.ink.shape[0])

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.ink.shape[1])

    @property
    def mark(self) -> Mark:
        return Mark(self.label, (self.left, self.top, self.columns.stop, self.rows.stop))


def _place(
    rng: np.random.Generator, assets: Assets, level: Level, size: tuple[int, int], labels: NDArray[np.int64]
) -> list[_Placed]:
    """The digits in lines, in reading order; those for which their line has no room are left out."""
    height, width = size
    tallest = min(level.digit_height[1], height - _GAP)
    most_lines = max(1, min(len(labels), height // (tallest + 2 * _GAP)))
    num_lines = int(rng.integers(1, most_lines + 1))
    line_of = np.sort(rng.integers(0, num_lines, size=len(labels)))
    placed: list[_Placed] = []
    for line in range(num_lines):
        inks: list[tuple[int, NDArray[np.float32]]] = []
        used = _GAP
        for label in labels[line_of == line].tolist():
            ink = _draw_ink(rng, assets, label, int(rng.integers(level.digit_height[0], tallest + 1)))
            used += ink.shape[1] + _GAP
            if used > width:
                break
            inks.append((label, ink))
        placed += _set_line(rng, inks, width, line * height / num_lines, height / num_lines)
    return placed


def _set_line(
    rng: np.random.Generator, inks: list[tuple[int, NDArray[np.float32]]], width: int, top: float, height: float
) -> list[_Placed]:
    """One line between ``top`` and ``top + height``: spread at random, low digits anywhere beside the tallest."""
    tallest = max((ink.shape[0] for _, ink in inks), default=0)
    room = width - sum(ink.shape[1] + _GAP for _, ink in inks) + _GAP
    cuts = np.sort(rng.integers(0, room + 1, size=len(inks))).tolist()
    line_top = top + rng.uniform(0, height - tallest)
    placed, used = [], 0
    for cut, (label, ink) in zip(cuts, inks, strict=True):
        digit_top = int(line_top + rng.uniform(0, tallest - ink.shape[0]))
        placed.append(_Placed(label, ink, digit_top, cut + used))
        used += ink.shape[1] + _GAP
    return placed


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
    coverage = np.clip((np.asarray(drawn) / 255 - 0.35) / 0.4, 0, 1).astype(np.float32)
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
    return (mean + (pixels - mean) * rng.uniform(*level.photo_contrast)).astype(np.float32)


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
