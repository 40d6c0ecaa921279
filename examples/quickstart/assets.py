"""The real material of the demo: scikit-learn's 1,797 handwritten digits, and photographs shipped inside the wheels.

Both are divided by identity before anything is made of them. Invariants: no digit image and no photograph is in both
shares; the division depends on nothing but the assets themselves, so every build of the data set agrees on it.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from mimo_megatron.errors import DataError

Split = Literal["train", "held_out"]

# Photographs and micrographs that show no digit and no writing. Those kept back differ in kind: a portrait of an
# animal, a still life, an outdoor texture, a building.
TRAIN_PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/brick.png",
    "skimage/data/camera.png",
    "skimage/data/cell.png",
    "skimage/data/coins.png",
    "skimage/data/gravel.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/moon.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/retina.jpg",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/flower.jpg",
)
HELD_OUT_PHOTOS = (
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/grass.png",
    "sklearn/datasets/images/china.jpg",
)
HELD_OUT_FRACTION = 0.2
LONGEST_PHOTO_SIDE = 640


@dataclass(frozen=True)
class Assets:
    """One share of the digits and photographs."""

    split: Split
    digits_N88: NDArray[np.uint8]
    """Ink from 0 (paper) to 255."""
    labels_N: NDArray[np.int64]
    photos: tuple[NDArray[np.uint8], ...]
    """Each [height, width, 3]."""
    by_label: tuple[NDArray[np.int64], ...]
    """For each of the ten labels, the indexes of its digits."""


@cache
def load_assets(split: Split) -> Assets:
    """That share of the digits (4 of 5 of every class train) and of the photographs."""
    bunch = load_digits()
    is_held_out = held_out_digits(bunch.target)
    kept = is_held_out if split == "held_out" else ~is_held_out
    digits = np.round(bunch.images[kept] * (255 / 16)).astype(np.uint8)
    labels = bunch.target[kept].astype(np.int64)
    names = HELD_OUT_PHOTOS if split == "held_out" else TRAIN_PHOTOS
    return Assets(
        split=split,
        digits_N88=digits,
        labels_N=labels,
        photos=tuple(_load_photo(name) for name in names),
        by_label=tuple(np.flatnonzero(labels == label) for label in range(10)),
    )


def held_out_digits(labels_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for the digits that training never sees: a fixed fifth of every class."""
    rng = np.random.default_rng(20250604)
    is_held_out = np.zeros(len(labels_N), dtype=bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        is_held_out[members[: round(HELD_OUT_FRACTION * len(members))]] = True
    return is_held_out


def _load_photo(name: str) -> NDArray[np.uint8]:
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"package {package!r} is not installed; the demo needs scikit-image and scikit-learn")
    path = Path(spec.origin).parent / inside
    if not path.is_file():
        raise DataError(f"{path} is missing: this version of {package} no longer ships the photograph {inside!r}")
    with Image.open(path) as photo:
        rgb = photo.convert("RGB")
        rgb.thumbnail((LONGEST_PHOTO_SIDE, LONGEST_PHOTO_SIDE))
        return np.asarray(rgb)
