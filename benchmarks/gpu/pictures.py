"""What the suite's packs are made of: JPEGs of real photographs in the sizes images come in, and text of docs/.

Deterministic: a function of the seed, the photographs inside scikit-image's wheel, and the text of docs/.
"""

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.provenance import ROOT
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.errors import DataError

PHOTOS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "gravel.png",
    "ihc.png",
    "rocket.jpg",
    "retina.jpg",
)
# (width, height, how often of 30), as such files commonly come: COCO and VOC photographs, web photographs, video
# stills, desktop and phone screenshots, pages at 150 and 200 dots an inch, charts, crops, a phone's camera.
SIZES = (
    (640, 480, 6), (480, 640, 3), (500, 375, 3), (1024, 683, 3), (1280, 720, 2), (1920, 1080, 2), (1170, 2532, 1),
    (1275, 1650, 3), (1654, 2339, 1), (850, 600, 3), (336, 336, 2), (4032, 3024, 1),
)  # fmt: skip
SHARES = {"image": 0.6, "short": 0.25, "long": 0.15}
"""Of samples: a question about an image, a short text, a long one."""
LETTERS_PER_TOKEN = 3.5
"""Of the suite's tokenizer on its own text, about."""


@dataclass(frozen=True)
class Scale:
    """1 in a real run; a rehearsal shrinks the sides of images and the lengths of texts."""

    sides: float = 1.0
    texts: float = 1.0
    largest_side: int = 4096


REHEARSAL = Scale(1 / 12, 1 / 60, 112)


def samples(count: int, seed: int, scale: Scale, *, text_alone: bool = False) -> Iterator[ShardSample]:
    """``count`` conversations, their JPEGs with them; of the same text, without any, where it is to be alone."""
    draw = np.random.default_rng(seed)
    kinds = [kind for kind in SHARES if not (text_alone and kind == "image")]
    weights = np.array([SHARES[kind] for kind in kinds])
    for number in range(count):
        kind = kinds[draw.choice(len(kinds), p=weights / weights.sum())]
        key = f"{kind}-{number:05d}"
        if kind == "image":
            question: list[dict[str, str]] = [
                {"type": "image", "image": "image0.jpg"},
                {"type": "text", "text": text_of(draw, draw.lognormal(3.2, 0.6), scale)},
            ]
            answer = text_of(draw, draw.lognormal(4.8, 0.8), scale)
            yield ShardSample(key, _record(question, answer), {"image0.jpg": jpeg(draw, scale)})
            continue
        tokens = draw.lognormal(5.8, 0.7) if kind == "short" else draw.uniform(2000, 7000)
        question = [{"type": "text", "text": text_of(draw, tokens * 0.2, scale)}]
        yield ShardSample(key, _record(question, text_of(draw, tokens * 0.8, scale)))


def _record(question: list[dict[str, str]], answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def text_of(draw: np.random.Generator, num_tokens: float, scale: Scale) -> str:
    """About so many tokens of the pages, from any place in them."""
    pages = corpus_text()
    length = max(int(num_tokens * scale.texts * LETTERS_PER_TOKEN), 8)
    start = int(draw.integers(0, max(len(pages) - length, 1)))
    return pages[start : start + length]


def jpeg(draw: np.random.Generator, scale: Scale) -> bytes:
    weights = np.array([often for _, _, often in SIZES], float)
    width, height, _ = SIZES[draw.choice(len(SIZES), p=weights / weights.sum())]
    sides = [min(max(round(side * scale.sides), 28), scale.largest_side) for side in (width, height)]
    out = io.BytesIO()
    _mosaic(*sides, draw).save(out, "JPEG", quality=90, subsampling=2)
    return out.getvalue()


def _mosaic(width: int, height: int, draw: np.random.Generator) -> Image.Image:
    """Photographs side by side, row below row: a JPEG of it has about the bytes of one photograph of this size."""
    canvas = Image.new("RGB", (width, height))
    top = 0
    while top < height:
        left, tall = 0, int(draw.integers(200, 300))
        while left < width:
            photo = photos()[draw.integers(len(photos()))]
            canvas.paste(photo, (left, top))  # what is below the row is painted over by the next
            left += photo.width
        top += tall
    return canvas


@cache
def photos() -> tuple[Image.Image, ...]:
    """``DataError`` where scikit-image is not installed."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError(
            "real photographs come from scikit-image, which is not installed: carry its wheel (--wheels DIR)"
        )
    folder = Path(spec.origin).parent / "data"
    return tuple(Image.open(folder / name).convert("RGB") for name in PHOTOS if (folder / name).exists())


@cache
def corpus_text() -> str:
    """The project's pages and its README, one after another."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
