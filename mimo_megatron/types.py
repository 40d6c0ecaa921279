"""What crosses a package border: frozen dataclasses with the shape of every field.

Dims: S slots of a pack, T tokens of a sample, P vision patches, M merged vision tokens, I images and videos,
Q segments of a pack, C bytes of one patch (channels x frames x height x width = 3 x 2 x 14 x 14 = 1176), Z bytes stored
of it (588 of a still image, whose one frame fills both halves), Y bytes of pixels.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

MediaKind = Literal["image", "video"]


@dataclass(frozen=True)
class MediaRef:
    """Where the bytes of one image or video lie: a member of a tar shard, or a whole file (``offset`` 0)."""

    kind: MediaKind
    path: str
    offset: int
    num_bytes: int
    sha256: str
    """Hex digest of the bytes; empty when it was never computed."""


@dataclass(frozen=True)
class RawSample:
    """One training sample as stored: chat messages, and media by reference.

    A message's content is a string or a list of parts ``{"type": "text", "text": ...}``, ``{"type": "image"}``,
    ``{"type": "video"}``; the i-th image-or-video part of the whole conversation is ``media[i]``.
    """

    id: str
    source: str
    messages: tuple[Mapping[str, Any], ...]
    media: tuple[MediaRef, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedMedia:
    """One image or video after resize, cut into patches in merge-block order (as Hugging Face orders them)."""

    kind: MediaKind
    pixels_PZ: NDArray[np.uint8]
    """[P, 1176] raw pixels, a row channel by channel and of a channel frame by frame; [P, 588] of a still image. [0, Z]
    where they were not decoded."""
    grid: tuple[int, int, int]
    """(frames / 2, height / 14, width / 14) in patches; P is their product."""
    seconds_per_grid: float = 0.0
    """Seconds between two temporal grid steps of a video; 0 for an image."""
    frame_repeats: int = 1
    """How often a patch shows each of its frames: ``temporal_patch_size`` for a still image, 1 for a video."""
    ref: MediaRef | None = None
    """Where its bytes lie, if its pixels were not decoded."""

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def is_still(self) -> bool:
        """Whether one frame is stored for the several of a patch."""
        return self.frame_repeats > 1

    @property
    def patches_PC(self) -> NDArray[np.uint8]:
        """[P, 1176] as Hugging Face lays patches out: a still image repeats its frame."""
        if not self.is_still:
            return self.pixels_PZ
        frames = self.pixels_PZ.reshape(self.num_patches, 3, 1, -1)
        return np.repeat(frames, self.frame_repeats, axis=2).reshape(self.num_patches, -1)


@dataclass(frozen=True)
class EncodedSample:
    """One sample ready to be packed.

    ``token_ids_T`` holds one placeholder (image_pad or video_pad) per merged vision token.
    ``loss_mask_T[i]`` is True where token i is to be predicted (from the tokens before it).
    """

    id: str
    token_ids_T: NDArray[np.int64]
    loss_mask_T: NDArray[np.bool_]
    media: tuple[EncodedMedia, ...] = ()
    reads_reward: bool = False
    """For a reward model: the head reads the last token, and ``loss_mask_T`` has no meaning. Of a pair, the chosen
    response comes first and the rejected one directly after it."""
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Further numbers of each token, [T], such as its advantage; used where the token is trained."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_patches(self) -> int:
        return sum(one.num_patches for one in self.media)


@dataclass(frozen=True)
class VisionLayout:
    """Where every patch of a pack stands, computed once on the CPU from the grids.

    A *unit* is one 2x2 merge block. Encoder order groups units by attention window; pack order is the order of the
    placeholders. ``window_order_M[i]`` is the pack-order index of the unit at encoder place i.
    """

    grids_I3: tuple[tuple[int, int, int], ...]
    stills_I: tuple[bool, ...]
    """Which of the media are stills: their patches are stored as one frame."""
    rope_hw_P2: torch.Tensor
    """int64 [P, 2] row and column of each patch inside its frame, in pack order."""
    window_order_M: torch.Tensor
    """int64 [M]"""
    window_bounds: tuple[int, ...]
    """Cumulative patch counts of the attention windows, in encoder order, from 0 to P."""
    frame_bounds: tuple[int, ...]
    """Cumulative patch counts of the frames (full attention stays inside a frame), from 0 to P."""

    @property
    def num_patches(self) -> int:
        return self.frame_bounds[-1]

    @property
    def pixel_runs(self) -> list[tuple[bool, int]]:
        """(whether of stills, patches) of each run of media of one sort, in pack order: how pixels are to be read."""
        media = zip(self.stills_I, self.grids_I3, strict=True)
        runs = itertools.groupby(media, key=lambda one: one[0])
        return [(is_still, sum(math.prod(grid) for _, grid in run)) for is_still, run in runs]


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch: a pack of segments, padded to the pack's capacity S. CPU tensors until ``to_device``.

    Padding is the last segment(s): token ``pad``, loss weight 0, its own bounds, so it attends to nothing real.
    """

    token_ids_S: torch.Tensor
    """int64 [S]"""
    labels_S: torch.Tensor
    """int64 [S] the next token of the same segment, for a reward model the number of the row among those of the pack; 0
    where ``loss_weights_S`` is 0."""
    loss_weights_S: torch.Tensor
    """float32 [S] 1 where the prediction of ``labels_S`` is trained, or a reward is read, else 0."""
    positions_3S: torch.Tensor
    """int64 [3, S] temporal, height and width position; restarts at 0 in every segment."""
    segment_bounds: tuple[int, ...]
    """Cumulative slot counts of the segments, from 0 to S, padding included."""
    pixels_Y: torch.Tensor
    """uint8 [Y] the patches of all media as they first appear, 588 bytes each of stills and 1176 of videos."""
    vision: VisionLayout | None
    splice_M: torch.Tensor
    """int64 [M] the slot of each merged vision token, in pack order."""
    splice_rows_M: torch.Tensor
    """int64 [M] the row each takes of the P / 4 features: media that several samples share stand there once."""
    sample_ids: tuple[str, ...]
    num_tokens: int
    """Slots that hold real tokens."""
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """float32 [S] each: the samples' own columns, moved as labels are, to the slot before their token."""
    pieces_held: tuple[int, ...] | None = None
    """The pieces (images, temporal steps of videos; by number in pack order) whose pixels ``pixels_Y`` holds, where a
    loader decoded only those that its rank encodes; None: all."""

    @property
    def num_slots(self) -> int:
        return len(self.token_ids_S)

    @property
    def num_patches(self) -> int:
        return self.vision.num_patches if self.vision else 0

    @property
    def num_trained(self) -> int:
        """Slots whose next token is trained."""
        return int(self.loss_weights_S.count_nonzero())

    @property
    def segment_lengths(self) -> list[int]:
        """Tokens of each sample's segment, padding left out."""
        bounds = self.segment_bounds[: len(self.sample_ids) + 1]
        return [end - start for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Dims: T its tokens, the end of turn included where it was sampled."""

    request_id: str
    index: int
    """Among the responses to its request, from 0."""
    token_ids_T: NDArray[np.int64]
    logprobs_T: NDArray[np.float32]
    """log p of each token by the engine, at temperature 1 and over the whole vocabulary but the banned tokens."""
    versions_T: NDArray[np.int64]
    """The policy version that sampled each token."""
    finish_reason: Literal["stop", "length"]
