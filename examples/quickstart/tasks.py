"""From scenes to chat samples: questions whose answers are facts of the scene, descriptions, and text-only arithmetic.

Coordinates are written as markup in pixels of the stored picture; the data path turns them into pixels of the resized
one, and ``Question.gold`` (what scorers read) is already in those. Invariants: a question that asks for one digit by
name is asked only where that digit stands once; a sample is a function of (seed, split, family, level, number) alone.
"""

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.quickstart.assets import Assets
from examples.quickstart.scenes import LEVELS, Box, Clip, Mark, Scene, draw_clip, draw_scene
from mimo_megatron.data.image import smart_resize
from mimo_megatron.data.markup import Frame, rescale_coordinates

CLIP_SECONDS = (3, 6)
CLIP_FRAMES_PER_SECOND = 4
CLIP_SIDES = (84, 112)
MAX_COORDINATE = 199
MIN_PIXELS, MAX_PIXELS = 3136, 12_845_056  # the data path's defaults; every scene lies well between


@dataclass(frozen=True)
class Question:
    """One turn: what is asked, what the assistant says, and the gold that the task's scorer reads."""

    task: str
    prompt: str
    answer: str
    """With coordinates as markup, in pixels of the stored picture."""
    said: str
    """The answer as the model is trained to say it, in pixels of the resized picture."""
    gold: str
    region: Box | None = None
    """The box of the digit that is asked about, in pixels of the stored picture."""


@dataclass(frozen=True)
class DemoSample:
    """A conversation about the same media; ``media`` maps a part's name to its bytes, in the order shown."""

    level: str
    media: Mapping[str, bytes]
    questions: tuple[Question, ...]


def describe(scene: Scene) -> Question:
    """Every digit with its box, in reading order: many trained tokens per picture."""
    answer = "; ".join(f"{mark.label} {_box_mark(mark.box)}" for mark in scene.marks)
    said = "; ".join(f"{mark.label} {_list(_resized(scene, mark.box))}" for mark in scene.marks)
    return Question("describe", "Describe the image.", answer, said, said)


def read(scene: Scene) -> Question:
    return _plain("read", "Read the digits.", _digits(scene))


def count(scene: Scene) -> Question:
    return _plain("count", "How many digits?", str(len(scene.marks)))


def locate(scene: Scene, mark: Mark) -> Question:
    said = _list(_resized(scene, mark.box))
    return Question("locate", f"Locate the {mark.label}.", _box_mark(mark.box), said, said, mark.box)


def point(scene: Scene, mark: Mark) -> Question:
    """The gold is the box into which the point must fall."""
    x1, y1, x2, y2 = mark.box
    middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    answer = f"<|point|>{middle[0]:g},{middle[1]:g}<|/point|>"
    said, gold = (_list(_resized(scene, place)) for place in (middle, mark.box))
    return Question("point", f"Point to the {mark.label}.", answer, said, gold, mark.box)


def add(scene: Scene) -> Question:
    return _plain("add", "Add the digits.", str(sum(mark.label for mark in scene.marks)))


def subtract(scene: Scene) -> Question:
    """Asked of two digits."""
    first, second = (mark.label for mark in scene.marks)
    return _plain("subtract", "Subtract the smaller digit from the larger.", str(abs(first - second)))


def when(clip: Clip, place: int) -> Question:
    first, last = clip.seconds[place]
    answer = f"[{_clock(first)}, {_clock(last)}]"
    return _plain("when", f"When is the {clip.marks[place].label} visible?", answer)


def scene_questions(rng: np.random.Generator, scene: Scene) -> dict[str, Question]:
    """Every question that can be asked of the scene, by task; digits asked for by name are drawn from those alone."""
    asked = [read(scene), count(scene)]
    labels = [mark.label for mark in scene.marks]
    alone = [mark for mark in scene.marks if labels.count(mark.label) == 1]
    if alone:
        asked.append(locate(scene, alone[rng.integers(len(alone))]))
        asked.append(point(scene, alone[rng.integers(len(alone))]))
    if len(labels) > 1:
        asked.append(add(scene))
    if len(labels) == 2:
        asked.append(subtract(scene))
    return {question.task: question for question in asked}


def draw_caption(rng: np.random.Generator, assets: Assets, level: str) -> DemoSample:
    scene = draw_scene(rng, assets, LEVELS[level])
    return DemoSample(level, {"image0.jpg": to_jpeg(scene.image_HW3)}, (describe(scene),))


def draw_dense(rng: np.random.Generator, assets: Assets, level: str) -> DemoSample:
    """A description and every question of one scene as turns of one conversation, in random order."""
    scene = draw_scene(rng, assets, LEVELS[level])
    turns = [describe(scene), *scene_questions(rng, scene).values()]
    questions = tuple(turns[place] for place in rng.permutation(len(turns)))
    return DemoSample(level, {"image0.jpg": to_jpeg(scene.image_HW3)}, questions)


def draw_question(rng: np.random.Generator, assets: Assets, level: str) -> DemoSample:
    """One question about one scene, every task as likely as the others that fit the scene."""
    scene = draw_scene(rng, assets, LEVELS[level])
    asked = list(scene_questions(rng, scene).values())
    question = asked[rng.integers(len(asked))]
    return DemoSample(level, {"image0.jpg": to_jpeg(scene.image_HW3)}, (question,))


def draw_pair(rng: np.random.Generator, assets: Assets, level: str) -> DemoSample:
    """Two pictures of different size, and a question about both."""
    scenes = [draw_scene(rng, assets, LEVELS[level]) for _ in range(2)]
    total = sum(len(scene.marks) for scene in scenes)
    question = (
        _plain("read_pair", "Read the digits of each image.", "; ".join(_digits(scene) for scene in scenes)),
        _plain("count_pair", "How many digits in both images?", str(total)),
    )[rng.integers(2)]
    media = {f"image{place}.jpg": to_jpeg(scene.image_HW3) for place, scene in enumerate(scenes)}
    return DemoSample(level, media, (question,))


def draw_when(rng: np.random.Generator, assets: Assets, level: str) -> DemoSample:
    """A clip, and the question when one of its digits is seen."""
    num_seconds = int(rng.integers(CLIP_SECONDS[0], CLIP_SECONDS[1] + 1))
    clip = draw_clip(
        rng, assets, LEVELS[level], sides=CLIP_SIDES, num_seconds=num_seconds, frames_per_second=CLIP_FRAMES_PER_SECOND
    )
    return DemoSample(level, {"video0.mp4": to_mp4(clip)}, (when(clip, int(rng.integers(len(clip.marks)))),))


def draw_text(rng: np.random.Generator, assets: Assets, level: str) -> DemoSample:
    """Arithmetic, counting and geometry in words: what the answers of the other families need, without a picture."""
    digits = [int(digit) for digit in rng.integers(0, 10, size=rng.integers(2, 6))]
    said = " ".join(map(str, digits))
    left, right = sorted(int(x) for x in rng.choice(MAX_COORDINATE + 1, size=2, replace=False))
    upper, lower = sorted(int(y) for y in rng.choice(MAX_COORDINATE + 1, size=2, replace=False))
    box = _list((left, upper, right, lower))
    first, second = digits[:2]
    question = (
        _plain("text", f"Add the digits {said}.", str(sum(digits))),
        _plain("text", f"How many digits: {said}?", str(len(digits))),
        _plain("text", f"Read the digits {said}.", said),
        _plain("text", f"Subtract the smaller digit from the larger: {first} {second}.", str(abs(first - second))),
        _plain("text", f"Point to the middle of {box}.", _list(((left + right) // 2, (upper + lower) // 2))),
        _plain("text", f"How wide is {box}?", str(right - left)),
    )[rng.integers(6)]
    return DemoSample(level, {}, (question,))


FAMILIES: dict[str, Callable[[np.random.Generator, Assets, str], DemoSample]] = {
    "caption": draw_caption,
    "dense": draw_dense,
    "question": draw_question,
    "pair": draw_pair,
    "clip": draw_when,
    "text": draw_text,
}


def draw_sample(family: str, level: str, assets: Assets, *, seed: int, number: int) -> DemoSample:
    """Sample ``number`` of a family at a level, of the share that ``assets`` holds."""
    stream = zlib.crc32(f"{assets.split}/{family}/{level}".encode())
    return FAMILIES[family](np.random.default_rng((seed, stream, number)), assets, level)


def to_jpeg(image_HW3: NDArray[np.uint8]) -> bytes:
    """JPEG of quality 95 without chroma subsampling, so that thin coloured strokes survive."""
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def to_mp4(clip: Clip) -> bytes:
    """H.264 in MP4, one thread, so that the same frames give the same bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=clip.frames_per_second, options={"crf": "15", "preset": "veryfast", "threads": "1"}
        )
        stream.height, stream.width = clip.frames_FHW3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip.frames_FHW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _plain(task: str, prompt: str, answer: str) -> Question:
    return Question(task, prompt, answer, said=answer, gold=answer)


def _digits(scene: Scene) -> str:
    return " ".join(str(mark.label) for mark in scene.marks)


def _box_mark(box: Box) -> str:
    return f"<|box|>{','.join(map(str, box))}<|/box|>"


def _list(values: tuple[int, ...]) -> str:
    return str(list(values))


def _clock(second: int) -> str:
    return f"{second // 60:02d}:{second % 60:02d}"


def _resized(scene: Scene, values: Sequence[float]) -> tuple[int, ...]:
    """x, y, x, y, ... in pixels of the picture as the model sees it."""
    height, width = smart_resize(*scene.size, multiple=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return rescale_coordinates(values, Frame(*scene.size, height, width))
