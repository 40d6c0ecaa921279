"""From a stored sample to token ids, loss mask and patches; and its lengths without touching a pixel.

``measure_sample`` (for the index) and ``encode_sample`` (for training) share one text path, ``encode_text``, which
needs the media's shapes only. Invariants: both give the same lengths; placeholders equal merged vision tokens, image
by image; every error names the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig, VisionConfig
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.data.chat import encode_chat
from mimo_megatron.data.decode import image_size
from mimo_megatron.data.image import encode_image, smart_resize
from mimo_megatron.data.markup import Frame, rescale_messages
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.records import SampleError, blame
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.data.video import encode_video, video_grid
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedMedia, EncodedSample, MediaKind, MediaRef, RawSample

ENCODING_VERSION = 1
"""Raised when a change in this package gives any sample other lengths, so that old indexes are refused."""


@dataclass(frozen=True)
class MediaShape:
    """What text needs to know of an image or video: its patch grid, for an image its sides in pixels, for a video the
    seconds between its temporal steps."""

    grid: tuple[int, int, int]
    frame: Frame | None
    seconds_per_grid: float = 0.0

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def frame_squares(self) -> int:
        return self.grid[0] * (self.grid[1] * self.grid[2]) ** 2


class Measure(NamedTuple):
    """What a stored sample takes in a pack: tokens and patches, and their squares by segment and by frame."""

    num_tokens: int
    num_patches: int
    segment_squares: int
    frame_squares: int


def measure_of(segments: Sequence[int], shapes: Sequence[MediaShape]) -> Measure:
    """Of segments that each see all the media."""
    return Measure(
        sum(segments),
        len(segments) * sum(shape.num_patches for shape in shapes),
        sum(length**2 for length in segments),
        len(segments) * sum(shape.frame_squares for shape in shapes),
    )


def length_settings(tokenizer: TextTokenizer, model: ModelConfig, data: EncodingConfig) -> dict[str, Any]:
    """All that a sample's lengths depend on besides the sample, as plain JSON values."""
    vision = model.vision
    pairs = {"pairs": True} if model.text.head == "reward" else {}
    return {
        **pairs,
        "encoding_version": ENCODING_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "system_prompt": data.system_prompt,
        "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
        "video": data.video.model_dump(mode="json"),
        "patch": vision and [vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size],
    }


def measure_media(content: bytes, kind: MediaKind, model: ModelConfig, data: EncodingConfig) -> MediaShape:
    """The shape that the image or video will have after resize, from its header."""
    vision = _vision(model)
    if kind == "video":
        grid, seconds_per_grid = video_grid(content, vision, data.video, min_pixels=data.min_pixels)
        return MediaShape(grid, None, seconds_per_grid)
    stored = image_size(content)
    height, width = smart_resize(
        *stored, multiple=vision.pixel_multiple, min_pixels=data.min_pixels, max_pixels=data.max_pixels
    )
    return MediaShape((1, height // vision.patch_size, width // vision.patch_size), Frame(*stored, height, width))


def measure_sample(
    raw: RawSample, contents: Sequence[bytes], tokenizer: TextTokenizer, model: ModelConfig, data: EncodingConfig
) -> Measure:
    """What ``encode_sample`` will give. ``contents`` are the bytes of its media."""
    shapes = measure_all_media(raw, contents, model, data)
    token_ids_T, _ = encode_text(raw, shapes, tokenizer, model, data)
    return measure_of([len(token_ids_T)], shapes)


def measure_all_media(
    raw: RawSample, contents: Sequence[bytes], model: ModelConfig, data: EncodingConfig
) -> list[MediaShape]:
    """The shapes of a sample's media, from their bytes."""
    with blame(raw.id, "media"):
        return [measure_media(content, ref.kind, model, data) for ref, content in zip(raw.media, contents, strict=True)]


def encode_sample(
    raw: RawSample,
    tokenizer: TextTokenizer,
    model: ModelConfig,
    data: EncodingConfig,
    *,
    add_generation_prompt: bool = False,
    decodes: bool = True,
) -> EncodedSample:
    """The sample ready to be packed; media are read and decoded here, or, with ``decodes`` False, read alone."""
    media, shapes = encode_media(raw, model, data, decodes=decodes)
    token_ids_T, loss_mask_T = encode_text(
        raw, shapes, tokenizer, model, data, add_generation_prompt=add_generation_prompt
    )
    return EncodedSample(raw.id, token_ids_T, loss_mask_T, media)


def encode_media(
    raw: RawSample, model: ModelConfig, data: EncodingConfig, *, decodes: bool = True
) -> tuple[tuple[EncodedMedia, ...], list[MediaShape]]:
    """The sample's images and videos, read and decoded, and what its text needs to know of them.

    With ``decodes`` False they have no pixels yet: ``decode_pixels`` gives them.
    """
    media, shapes = [], []
    with blame(raw.id, "media"):
        for ref in raw.media:
            content = read_media(ref, data.read)
            if decodes:
                one, shape = _encode_media(content, ref.kind, model, data)
            else:
                shape = measure_media(content, ref.kind, model, data)
                one = _without_pixels(ref, shape, _vision(model))
            media.append(one)
            shapes.append(shape)
    return tuple(media), shapes


def decode_pixels(
    one: EncodedMedia, steps: Sequence[int], model: ModelConfig, data: EncodingConfig
) -> NDArray[np.uint8]:
    """[P, Z] pixels of these temporal steps, ascending, of a medium that was not decoded; an image has one step.

    ``DataError`` where that fails, or the medium is not as large as its header says.
    """
    assert one.ref is not None, "its pixels are there"
    content, vision = read_media(one.ref, data.read), _vision(model)
    if one.kind == "video":
        decoded = encode_video(content, vision, data.video, min_pixels=data.min_pixels, steps=steps)
    else:
        decoded, _ = _encode_media(content, "image", model, data)
    if decoded.grid != one.grid:
        raise DataError(
            f"decoded it has the patch grid {decoded.grid}, by its header {one.grid}; drop the sample or replace it"
        )
    return decoded.pixels_PZ


def _without_pixels(ref: MediaRef, shape: MediaShape, vision: VisionConfig) -> EncodedMedia:
    is_video = ref.kind == "video"
    return EncodedMedia(
        ref.kind,
        np.empty((0, vision.patch_bytes if is_video else vision.still_bytes), np.uint8),
        shape.grid,
        shape.seconds_per_grid,
        frame_repeats=1 if is_video else vision.temporal_patch_size,
        ref=ref,
    )


def encode_text(
    raw: RawSample,
    shapes: Sequence[MediaShape],
    tokenizer: TextTokenizer,
    model: ModelConfig,
    data: EncodingConfig,
    *,
    add_generation_prompt: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids [T] and loss mask [T], coordinates rescaled and placeholders written for media of these shapes."""
    with blame(raw.id, "coordinates"):
        messages, _ = rescale_messages(raw.messages, [shape.frame for shape in shapes if shape.frame is not None])
    merge_factor = model.vision.merge_factor if model.vision else 1
    with blame(raw.id, "messages"):
        token_ids_T, loss_mask_T = encode_chat(
            messages,
            tokenizer,
            model.tokens,
            [shape.num_patches // merge_factor for shape in shapes],
            system_prompt=data.system_prompt,
            add_generation_prompt=add_generation_prompt,
        )
    _check_placeholders(raw, shapes, token_ids_T, model)
    return token_ids_T, loss_mask_T


def _check_placeholders(
    raw: RawSample, shapes: Sequence[MediaShape], token_ids_T: NDArray[np.int64], model: ModelConfig
) -> None:
    for kind, placeholder in (("image", model.tokens.image_pad), ("video", model.tokens.video_pad)):
        num_placeholders = int((token_ids_T == placeholder).sum())
        of_kind = [shape.num_patches for ref, shape in zip(raw.media, shapes, strict=True) if ref.kind == kind]
        num_merged = sum(of_kind) // model.vision.merge_factor if model.vision else 0
        if num_placeholders != num_merged:
            raise SampleError(
                raw.id,
                "placeholders",
                f"{num_placeholders} {kind} placeholders for {num_merged} merged vision tokens of {len(of_kind)} media",
            )


def _encode_media(
    content: bytes, kind: MediaKind, model: ModelConfig, data: EncodingConfig
) -> tuple[EncodedMedia, MediaShape]:
    vision = _vision(model)
    if kind == "video":
        one = encode_video(content, vision, data.video, min_pixels=data.min_pixels)
        return one, MediaShape(one.grid, None, one.seconds_per_grid)
    one = encode_image(content, vision, min_pixels=data.min_pixels, max_pixels=data.max_pixels, decoder=data.decoder)
    _, rows, columns = one.grid
    frame = Frame(*image_size(content), rows * vision.patch_size, columns * vision.patch_size)
    return one, MediaShape(one.grid, frame)


def _vision(model: ModelConfig) -> VisionConfig:
    if model.vision is None:
        raise DataError(f"the sample has images or videos, but the model {model.name!r} reads text only")
    return model.vision
