"""The demo's questions for reinforcement learning: five tasks that rules judge, and two that reward models judge.

Held-out questions are about digits and photographs of the share that no model has seen; those in words alone are
divided by a hash of their text, so that reinforcement learning never asks what it is evaluated on. Each file is what
`mimo-megatron rl` and `mimo-megatron rewards check` read.

    python -m examples.quickstart.rl_questions OUT [--train 1000] [--held-out 200] [--tasks math box ...]
"""

import argparse
import io
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from examples.quickstart.assets import Split, load_assets
from examples.quickstart.build_data import messages
from examples.quickstart.preferences import SUBJECT
from examples.quickstart.scenes import Box
from examples.quickstart.tasks import MAX_PIXELS, MIN_PIXELS, DemoSample, Question, draw_sample
from mimo_megatron.data.decode import image_size
from mimo_megatron.data.image import smart_resize
from mimo_megatron.reward import times
from mimo_megatron.reward.wire import ImageMeta, Meta, Task

TEXT = (("text", "one"),)
PICTURES = (("question", "few"), ("question", "some"))
CLIPS = (("clip", "few"),)
COUNTED = (("question", "some"),)
"""One to four digits. With the level few, of one or two, ``always 1`` would earn 0.45; so it earns 0.36."""
LONGEST_SHARE = 0.5
"""Of a clip, for a moment that is asked for. An answer of the whole clip earns 0.48 where all are asked, 0.31 so."""
TEXT_SHARES = 5
"""One of so many texts is held out, as one of five digits is."""
_SEED = 29  # questions that no stage and no reward model of the demo was trained on


@dataclass(frozen=True)
class Kind:
    """One task of the mix: who judges it, where its samples come from, and which of them it asks."""

    reward: Task
    families: tuple[tuple[str, str], ...]
    task: str | None = None
    """The demo's own name of its questions; None for every one."""
    words: tuple[str, ...] = ("",)
    """Its questions hold one of these."""

    def asks(self, question: Question) -> bool:
        return self.task in (None, question.task) and any(word in question.prompt for word in self.words)


KINDS: Mapping[str, Kind] = {
    "math": Kind("math", TEXT, words=("Add ", "Subtract ", "How many digits")),
    "box": Kind("box", PICTURES, "locate"),
    "point": Kind("point", PICTURES, "point"),
    "count": Kind("count", COUNTED, "count"),
    "time": Kind("time", CLIPS, "when"),
    "helpful_text": Kind("rm_text", TEXT, words=(SUBJECT["text"],)),
    "helpful_multimodal": Kind("rm_multimodal", PICTURES),
}


@dataclass(frozen=True)
class Drawn:
    id: str
    sample: DemoSample

    @property
    def question(self) -> Question:
        return self.sample.questions[0]


def build(out: Path, num_train: int, num_held_out: int, kinds: Sequence[str] = tuple(KINDS)) -> None:
    """``out/KIND/train.jsonl`` and ``held_out.jsonl``, media in a folder beside each; made afresh."""
    for name in kinds:
        shutil.rmtree(out / name, ignore_errors=True)
        write_questions(out / name / "train.jsonl", name, draw(name, "train", num_train))
        write_questions(out / name / "held_out.jsonl", name, draw(name, "held_out", num_held_out))


def draw(name: str, split: Split, num_questions: int) -> list[Drawn]:
    """Questions of a kind, none twice in the same words and pictures."""
    return list(itertools.islice(_all(name, split), num_questions))


def write_questions(path: Path, name: str, questions: Sequence[Drawn]) -> None:
    media_folder = path.parent / path.stem
    media_folder.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for one in questions:
            for part, data in one.sample.media.items():
                (media_folder / f"{one.id}.{part}").write_bytes(data)
            lines.write(json.dumps(row_of(KINDS[name].reward, one, f"{path.stem}/{one.id}.")) + "\n")


def row_of(reward: Task, one: Drawn, prefix: str) -> dict[str, Any]:
    """A row of a question file; its media are named by ``prefix`` and part."""
    names = {part: prefix + part for part in one.sample.media}
    meta = _meta(reward, one.sample)
    return {
        "id": one.id,
        "task": reward,
        "gold": _gold(reward, one.question),
        "meta": meta.model_dump(mode="json", exclude_defaults=True),
        "messages": messages(one.sample, names)[:1],
    }


def _all(name: str, split: Split) -> Iterator[Drawn]:
    """Without end."""
    assets, kind = load_assets(split), KINDS[name]
    seed = _SEED + list(KINDS).index(name)
    texts: set[str] = set()
    number = 0
    while True:
        family, level = kind.families[number % len(kind.families)]
        one = Drawn(f"{family}-{level}-{number:06d}", draw_sample(family, level, assets, seed=seed, number=number))
        number += 1
        if not kind.asks(one.question) or (kind.reward == "time" and _share_of_clip(one) > LONGEST_SHARE):
            continue
        if not one.sample.media:
            prompt = one.question.prompt
            if split_of(prompt) != split or prompt in texts:
                continue
            texts.add(prompt)
        yield one


def _share_of_clip(one: Drawn) -> float:
    meta = _meta("time", one.sample)
    assert meta.duration_seconds is not None
    return times.read_gold(one.question.gold, meta).length / meta.duration_seconds


def split_of(prompt: str) -> Split:
    """The share of a question in words alone."""
    return "held_out" if zlib.crc32(prompt.encode()) % TEXT_SHARES == 0 else "train"


def _gold(reward: Task, question: Question) -> Any:
    match reward:
        case "math" | "time":
            return question.gold
        case "count":
            return int(question.gold)
        case "box":
            return [_region(question)]
        case "point":
            return _region(question)
    return None


def _region(question: Question) -> list[int]:
    region: Box | None = question.region
    assert region is not None, question.task
    return list(region)


def _meta(reward: Task, sample: DemoSample) -> Meta:
    if reward in ("math", "count"):
        return Meta(bare_answer=True)  # the demo's models say the number alone
    if reward in ("box", "point"):
        (data,) = sample.media.values()
        height, width = image_size(data)
        shown_height, shown_width = smart_resize(
            height, width, multiple=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
        )
        return Meta(image=ImageMeta(size=(width, height), shown=(shown_width, shown_height)))
    if reward == "time":
        (data,) = sample.media.values()
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate is not None
            return Meta(duration_seconds=float(stream.frames / stream.average_rate))
    return Meta()


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's questions for reinforcement learning.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=1000, help="training questions of each task")
    parser.add_argument("--held-out", type=int, default=200, help="held-out questions of each task")
    parser.add_argument("--tasks", nargs="*", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()
    build(given.out, given.train, given.held_out, given.tasks)


if __name__ == "__main__":
    main()
