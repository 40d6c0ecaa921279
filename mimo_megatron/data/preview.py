"""One self-contained HTML page of what a recipe really trains on: packs, resized images, tokens and loss mask.

Everything shown is read back from the encoded samples: pixels from the patches, text from the token ids, so that a
fault in resize, chat template or mask is on the page. Boxes are drawn where the text says, in the frame that the
model sees.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimo_megatron.config.model import TOKEN_NAMES, ModelConfig, VisionConfig
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.encode import MediaShape, measure_media
from mimo_megatron.data.markup import Frame, Region, rescale_coordinates, rescale_messages
from mimo_megatron.data.page import write_html
from mimo_megatron.data.patches import unpatchify
from mimo_megatron.data.plan import Position
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.types import EncodedMedia, EncodedSample, RawSample

TEMPLATE = "preview.html.j2"
SHOWN_TOKENS = 2000
_IMAGE_PIXELS, _FRAME_PIXELS = 1600, 360  # longest embedded side: a screenshot is readable, a page of them is small
_PLAIN_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
_LONGEST_PIECE = 16  # tokens; byte-level tokens may end inside a character, and the next begin there


@dataclass(frozen=True)
class Span:
    """A piece of a sample's text: one or more tokens that make whole characters, or a run of placeholders."""

    text: str
    kind: str
    """text, special or placeholder; gap for tokens that are not shown."""
    is_trained: bool
    title: str
    num_tokens: int = 1


@dataclass(frozen=True)
class Shape:
    """A box (x, y, width, height) or a point (width and height 0) drawn over an image."""

    x: int
    y: int
    width: int
    height: int
    label: str
    origin: str
    """text for coordinates that the messages hold, meta for boxes of the sample's other keys."""


def write_preview(
    data: DataConfig,
    model: ModelConfig,
    out: Path,
    num_packs: int,
    *,
    seed: int = 1,
    shown_tokens: int = SHOWN_TOKENS,
) -> Path:
    """``out``, now a page about the first ``num_packs`` packs that a run with this seed trains on.

    Of a sample with more than ``shown_tokens`` tokens of text, the beginning and the end are shown.
    """
    corpus = Corpus(data, model)
    plan = corpus.plan(seed)
    packs, _ = plan.take(Position(0, 0), num_packs)
    views = [_pack_view(corpus, number, pack.tolist(), shown_tokens) for number, pack in enumerate(packs)]
    return write_html(
        TEMPLATE,
        out,
        model=model.name,
        data=data,
        seed=seed,
        sources=[source.describe() for source in corpus.sources],
        num_over_capacity=len(plan.over_capacity),
        packs=views,
        totals=_totals(views),
    )


def frames_of(media: EncodedMedia, vision: VisionConfig) -> NDArray[np.uint8]:
    """uint8 [F, height, width, 3], the inverse of ``patchify``; of a still image its one frame."""
    frames = unpatchify(media.patches_PC, media.grid, vision)
    return frames[:1] if media.is_still else frames


def token_spans(sample: EncodedSample, tokenizer: TextTokenizer, model: ModelConfig) -> Iterator[Span]:
    """The sample's tokens as readable pieces, in order; their tokens add up to the sample's."""
    names = {value: TOKEN_NAMES[field] for field, value in model.tokens.model_dump().items()}
    ids, mask = sample.token_ids_T.tolist(), sample.loss_mask_T.tolist()
    placeholders = (model.tokens.image_pad, model.tokens.video_pad)
    start = 0
    while start < len(ids):
        end = start + 1
        if ids[start] in placeholders:
            while end < len(ids) and ids[end] == ids[start]:
                end += 1
            text = f"{names[ids[start]].strip('<|>')} × {end - start}"
            yield Span(text, "placeholder", mask[start], f"tokens {start} to {end - 1}: {ids[start]}", end - start)
        elif ids[start] in names:
            yield Span(names[ids[start]], "special", mask[start], f"token {start}: {ids[start]}")
        else:
            limit = start + 1
            while (
                limit < min(len(ids), start + _LONGEST_PIECE) and ids[limit] not in names and mask[limit] == mask[start]
            ):
                limit += 1
            end = _end_of_piece(ids, start, limit, tokenizer)
            listed = ", ".join(map(str, ids[start:end]))
            yield Span(tokenizer.decode(ids[start:end]), "text", mask[start], f"token {start}: {listed}", end - start)
        start = end


def shorten(spans: Iterable[Span], most: int) -> list[Span]:
    """The spans; of more than ``most`` so many, from the beginning and the end, and one that tells what is between."""
    listed = list(spans)
    if len(listed) <= most:
        return listed
    head, tail = most * 3 // 4, len(listed) - most // 4
    left_out = listed[head:tail]
    num_tokens = sum(span.num_tokens for span in left_out)
    num_trained = sum(span.num_tokens for span in left_out if span.is_trained)
    told = f"{num_tokens:,} tokens are not shown here, {num_trained:,} of them trained"
    return [*listed[:head], Span(told, "gap", False, "", num_tokens), *listed[tail:]]


def _end_of_piece(ids: list[int], start: int, limit: int, tokenizer: TextTokenizer) -> int:
    """The first end after ``start`` at which the tokens make whole characters; one token if there is none."""
    for end in range(start + 1, limit + 1):
        if "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(ids[start:end]):
            return end
    return start + 1


def _pack_view(corpus: Corpus, number: int, members: Sequence[int], shown_tokens: int) -> dict[str, Any]:
    samples, faults = [], []
    for member in members:
        try:
            samples += [_sample_view(corpus, corpus.read(member), one, shown_tokens) for one in corpus.encode(member)]
        except SampleError as fault:
            faults.append(str(fault))
    slots, patch_slots = corpus.data.pack_tokens, corpus.data.pack_patches
    num_tokens = sum(sample["num_tokens"] for sample in samples)
    num_patches = sum(sample["num_patches"] for sample in samples)
    return {
        "number": number,
        "samples": samples,
        "faults": faults,
        "num_tokens": num_tokens,
        "num_patches": num_patches,
        "num_trained": sum(sample["num_trained"] for sample in samples),
        "token_fill": num_tokens / slots,
        "patch_fill": num_patches / patch_slots,
    }


def _sample_view(corpus: Corpus, raw: RawSample, sample: EncodedSample, shown_tokens: int) -> dict[str, Any]:
    contents = [read_media(ref, corpus.data.read) for ref in raw.media]
    shapes = [
        measure_media(content, ref.kind, corpus.model, corpus.data)
        for content, ref in zip(contents, raw.media, strict=True)
    ]
    drawn = _drawn(raw, shapes)
    image_numbers = np.cumsum([shape.frame is not None for shape in shapes]) - 1
    media = [
        _image_view(one, shape.frame, drawn[image], len(shapes), corpus.model)
        if shape.frame
        else _video_view(one, corpus.model)
        for one, shape, image in zip(sample.media, shapes, image_numbers.tolist(), strict=True)
    ]
    return {
        "id": sample.id,
        "source": raw.source,
        "num_tokens": sample.num_tokens,
        "num_patches": sample.num_patches,
        "num_trained": int(sample.loss_mask_T.sum()),
        "media": media,
        "spans": [asdict(span) for span in shorten(token_spans(sample, corpus.tokenizer, corpus.model), shown_tokens)],
        "meta": json.dumps(dict(raw.meta), ensure_ascii=False) if raw.meta else "",
    }


def _drawn(raw: RawSample, shapes: Sequence[MediaShape]) -> list[list[Shape]]:
    """The boxes and points on each image: from marks, from plain ``[x1, y1, x2, y2]`` in answers, from ``meta``."""
    frames = [shape.frame for shape in shapes if shape.frame is not None]
    _, regions = rescale_messages(raw.messages, frames)
    found = [(region, "text") for region in (*regions, *_plain_boxes(raw, len(frames)))]
    found += [(region, "meta") for region in _meta_boxes(raw, frames)]
    drawn: list[list[Shape]] = [[] for _ in frames]
    for region, origin in found:
        x, y, *far = region.coordinates
        right, lower = far or (x, y)
        drawn[region.image].append(Shape(x, y, right - x, lower - y, str(list(region.coordinates)), origin))
    return drawn


def _plain_boxes(raw: RawSample, num_images: int) -> Iterator[Region]:
    num_before = 0
    for message in raw.messages:
        content = message["content"]
        for part in ({"type": "text", "text": content},) if isinstance(content, str) else content:
            num_before += part["type"] == "image"
            if part["type"] == "text" and message["role"] == "assistant" and num_before:
                for box in _PLAIN_BOX.finditer(part["text"]):
                    yield Region(num_before - 1, tuple(int(value) for value in box.groups()))


def _meta_boxes(raw: RawSample, frames: Sequence[Frame]) -> Iterator[Region]:
    """``meta["boxes"]``: [x1, y1, x2, y2] in pixels of the stored first image."""
    boxes = raw.meta.get("boxes")
    for box in boxes if isinstance(boxes, list) and frames else ():
        if isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box):
            yield Region(0, rescale_coordinates(box, frames[0]))


def _image_view(
    media: EncodedMedia, frame: Frame, shapes: Sequence[Shape], num_media: int, model: ModelConfig
) -> dict[str, Any]:
    assert model.vision is not None
    # Drawn at its own size where that fits; a screenshot is given more room, the members of a row of images less, and
    # a thumbnail of one merge unit is shown larger. A click shows all of what is embedded.
    room = (205, 240) if num_media > 2 else (640, 400) if frame.width > max(1000, frame.height) else (420, 360)
    zoom = max(160 / max(frame.width, frame.height), min(1.0, room[0] / frame.width, room[1] / frame.height))
    return {
        "kind": "image",
        "src": _data_uri(frames_of(media, model.vision)[0], _IMAGE_PIXELS),
        "width": frame.width,
        "height": frame.height,
        "stored": f"{frame.stored_width} × {frame.stored_height}",
        "shown_width": round(frame.width * zoom),
        "full_width": max(frame.width, round(frame.width * zoom)),
        "num_tokens": media.num_patches // model.vision.merge_factor,
        "radius": max(frame.width, frame.height) / 70,
        "shapes": [asdict(shape) for shape in shapes],
    }


def _video_view(media: EncodedMedia, model: ModelConfig) -> dict[str, Any]:
    assert model.vision is not None
    frames = frames_of(media, model.vision)[:: model.vision.temporal_patch_size]
    return {
        "kind": "video",
        "height": frames.shape[1],
        "width": frames.shape[2],
        "num_tokens": media.num_patches // model.vision.merge_factor,
        "seconds_per_grid": media.seconds_per_grid,
        "frames": [
            {"src": _data_uri(frame, _FRAME_PIXELS), "time": _clock(place * media.seconds_per_grid)}
            for place, frame in enumerate(frames)
        ],
    }


def _data_uri(pixels_HW3: NDArray[np.uint8], most: int) -> str:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels_HW3)
    image.thumbnail((most, most), Image.Resampling.LANCZOS)  # never enlarges
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.floor(seconds * 10 + 0.5), 600)
    return f"{minutes:02d}:{rest / 10:04.1f}"


def _totals(packs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(pack["num_tokens"] for pack in packs)
    return {
        "samples": sum(len(pack["samples"]) for pack in packs),
        "tokens": tokens,
        "patches": sum(pack["num_patches"] for pack in packs),
        "trained_fraction": sum(pack["num_trained"] for pack in packs) / max(tokens, 1),
        "token_fill": sum(pack["token_fill"] for pack in packs) / max(len(packs), 1),
        "patch_fill": sum(pack["patch_fill"] for pack in packs) / max(len(packs), 1),
    }
