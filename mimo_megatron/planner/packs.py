"""What a pack looks like to the planner: lengths only. And the attention layout that follows from them.

How much attention keeps for its backward depends on whether equal pieces lie side by side (``attention/packed.py``
computes them in one call, and copies rows that do not); so pieces are formed here as they are there. The tests compare.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from mimo_megatron.config.model import ModelConfig, VisionConfig
from mimo_megatron.config.run import DataConfig

Grid = tuple[int, int, int]
ASSUMED_SEGMENT_TOKENS = 2048
"""Length of the samples that are assumed where no index is: the mean of image mixes that we know is 1,600 to 2,600."""

PADDING_SEGMENT = 1024  # data.collate.MAX_PADDING_SEGMENT, which cannot be imported without torch; a test compares


@dataclass(frozen=True)
class PackShape:
    name: str
    num_slots: int
    segments: tuple[int, ...]
    """Tokens of each sample; the slots that are left are padding."""
    grids: tuple[Grid, ...]
    """(frames, height, width) in patches of each image and video."""
    num_rows: int
    """Tokens that are trained: what the head sees."""

    @property
    def num_patches(self) -> int:
        return sum(frames * height * width for frames, height, width in self.grids)

    def pixel_bytes(self, vision: VisionConfig) -> int:
        """Bytes of all patches as they are stored: of stills, which is what one frame is taken for, one frame."""
        return sum(
            frames * height * width * (vision.still_bytes if frames == 1 else vision.patch_bytes)
            for frames, height, width in self.grids
        )

    @property
    def num_tokens(self) -> int:
        return sum(self.segments)

    @property
    def runs(self) -> tuple[int, ...]:
        """The segments, and the padding in the pieces that ``data.collate`` gives it."""
        whole, rest = divmod(self.num_slots - self.num_tokens, PADDING_SEGMENT)
        return self.segments + (PADDING_SEGMENT,) * whole + ((rest,) if rest else ())


def image_grid(num_patches: int, merge: int) -> Grid:
    """One image of ``num_patches`` in whole merge units, as square as they allow; a few less where they allow nothing
    within 16 : 1."""
    units = max(num_patches // merge**2, 1)
    side = math.isqrt(units)
    height = next(one for one in range(side, 0, -1) if units % one == 0)
    if units > 16 * height * height:
        height = side
    return (1, height * merge, units // height * merge)


@dataclass(frozen=True)
class Packs:
    """What a step is made of: one pack for its time, and those among which the worst for memory is."""

    typical: PackShape
    worst: tuple[PackShape, ...]
    notes: tuple[str, ...]
    """How these were found, for the reader."""


def assumed_packs(model: ModelConfig, data: DataConfig) -> Packs:
    """A full pack of samples with one image each, which fill ``pack_patches``; and one of a single long text.

    All tokens but those of images are trained. The text is where the head and attention need most.
    """
    slots = data.pack_tokens
    text = PackShape("one long text", slots, (slots,), (), slots)
    if model.vision is None:
        return Packs(
            text, (text,), (f"assumed, no index read: every pack is one text of {slots:,} tokens, all trained",)
        )
    merge = model.vision.merge_factor
    count = max(slots // ASSUMED_SEGMENT_TOKENS, 1)
    segments = _even(slots, count)
    room = min(data.pack_patches, (slots - 2 * count) * merge)  # two marks around each image
    grids = tuple(image_grid(room // count, model.vision.spatial_merge_size) for _ in segments)
    pictures = sum(height * width * frames for frames, height, width in grids) // merge
    images = PackShape("full of images", slots, segments, grids, slots - pictures)
    return Packs(
        images,
        (images, text),
        (
            f"assumed, no index read: full packs of {count} samples, each of {segments[-1]:,} tokens with an image of "
            f"{images.num_patches // count:,} patches",
            "memory is that of the worse of such a pack and one of a single long text; every token but those of images "
            "is trained",
        ),
    )


def _even(total: int, parts: int) -> tuple[int, ...]:
    share, more = divmod(total, parts)
    return (share + 1,) * more + (share,) * (parts - more)


@dataclass(frozen=True)
class AttentionShape:
    """What one attention over a pack keeps, on one rank."""

    queries_copied: bool
    keys_copied: bool
    num_keys: int
    """Rows of the copied keys: more than the pack's where context-parallel pieces share them."""
    num_groups: int
    mask_cells: int
    """Query-key pairs of explicit masks: of groups whose queries are fewer than their keys."""
    num_pieces: int


Piece = tuple[int, int, int, int]


def text_pieces(runs: Sequence[int], cp: int, cp_rank: int) -> Iterator[Piece]:
    """(q start, q end, k start, k end) as ``attention.pieces.causal_pieces`` has them."""
    slots = sum(runs)
    chunk = slots // (2 * cp)
    mirror = 2 * cp - 1 - cp_rank
    starts = (cp_rank * chunk, mirror * chunk)
    ranges = [(0, slots)] if cp == 1 else [(start, start + chunk) for start in starts]
    bounds = [0]
    for run in runs:
        bounds.append(bounds[-1] + run)
    offset = 0
    for range_start, range_end in ranges:
        for start, end in pairwise(bounds):
            first, last = max(start, range_start), min(end, range_end)
            if first < last:
                q_start = offset + first - range_start
                yield q_start, q_start + last - first, start, last
        offset += range_end - range_start


def attention_shape(pieces: Sequence[Piece], num_keys: int) -> AttentionShape:
    """Pieces of equal lengths are computed together, in the order in which their kinds first appear."""
    kinds: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault((piece[1] - piece[0], piece[3] - piece[2]), []).append(piece)
    ordered = [piece for group in kinds.values() for piece in group]
    taken = sum(piece[3] - piece[2] for piece in ordered)
    keys_in_place = ordered[0][2] == 0 and taken == num_keys
    keys_in_place &= all(one[3] == two[2] for one, two in pairwise(ordered))
    return AttentionShape(
        queries_copied=ordered != list(pieces),
        keys_copied=not keys_in_place,
        num_keys=taken,
        num_groups=len(kinds),
        mask_cells=sum(q * k for q, k in kinds if q != k),
        num_pieces=len(pieces),
    )


@lru_cache(maxsize=1024)
def text_attention(runs: tuple[int, ...], cp: int, cp_rank: int) -> AttentionShape:
    return attention_shape(list(text_pieces(runs, cp, cp_rank)), sum(runs))


@lru_cache(maxsize=1024)
def vision_attention(vision: VisionConfig, grids: tuple[Grid, ...], is_full: bool) -> AttentionShape:
    """Over whole frames, or over windows, which are cut at the frame's border."""
    lengths: list[int] = []
    merge, window = vision.spatial_merge_size, vision.window_size // vision.pixel_multiple
    for frames, height, width in grids:
        if is_full:
            lengths += [height * width] * frames
            continue
        heights, widths = _cut(height // merge, window), _cut(width // merge, window)
        lengths += [tall * wide * merge * merge for tall in heights for wide in widths] * frames
    pieces, start = [], 0
    for length in lengths:
        pieces.append((start, start + length, start, start + length))
        start += length
    return attention_shape(pieces, start)


def _cut(length: int, piece: int) -> list[int]:
    whole, rest = divmod(length, piece)
    return [piece] * whole + ([rest] if rest else [])
