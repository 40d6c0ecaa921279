"""A pack as one rank sees it: its slice of the slots under context parallelism, and every index its forward needs.

All indices are computed here, on the CPU, so that the forward neither branches on data nor waits for the device.
Dims: S slots, L vision tokens spliced on this rank, R slots whose next token is trained or scored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mimo_megatron.attention.cache import KVCache
from mimo_megatron.attention.packed import Piece
from mimo_megatron.attention.pieces import causal_pieces
from mimo_megatron.model.vision_share import VisionShare, VisionSharing, share_out
from mimo_megatron.parallel import zigzag
from mimo_megatron.parallel.mesh import Axis
from mimo_megatron.types import PackedBatch, VisionLayout


@dataclass(frozen=True)
class Lane:
    """The tokens that enter the decoder and what is predicted from them; or the same some slots ahead, for a
    multi-token-prediction layer: there slot i holds what slot i + k of its segment holds, and nothing past the end."""

    token_ids_S: Tensor
    """int64 [S / cp] of this rank's slots."""
    splice_slots_L: Tensor
    """int64 [L] local slots that take a vision feature."""
    splice_rows_L: Tensor
    """int64 [L] the feature row each of them takes; several may take one."""
    rows_R: Tensor
    """int64 [R] local slots whose logits are wanted."""
    labels_R: Tensor
    """int64 [R]"""
    weights_R: Tensor
    """float32 [R]"""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [R] each: those of the batch."""

    def to(self, device: torch.device) -> "Lane":
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "columns"}
        columns = {name: column_R.to(device, non_blocking=True) for name, column_R in self.columns.items()}
        return Lane(**moved, columns=columns)


@dataclass(frozen=True)
class LocalPack:
    lanes: tuple[Lane, ...]
    """The decoder's, and behind it one for each multi-token-prediction layer that is trained."""
    positions_3S: Tensor
    """int64 [3, S] of the whole pack."""
    pieces: tuple[Piece, ...]
    merge_order_S: Tensor | None
    """int64 [S], None where cp is 1."""
    pixels_Y: Tensor
    """uint8 [Y] of the patches this rank encodes: where images are shared out over ranks, its own, perhaps none."""
    vision: VisionLayout | None
    """Of these patches; None where the whole pack has no images."""
    num_rows: int = 0
    """Rows of the decoder's lane on all cp ranks together."""
    share: VisionShare | None = None
    """Where images are shared out: the way from every rank's features to the pack's."""
    cache: KVCache | None = None
    """In generation only (see ``attention/cache.py``)."""

    @property
    def num_stream_slots(self) -> int:
        """Slots of the whole pack in what travels between pipeline stages."""
        return len(self.lanes) * self.positions_3S.shape[1]

    def without_media(self) -> "LocalPack":
        """As an inner stage needs it: no pixels."""
        return replace(self, pixels_Y=self.pixels_Y[:0], vision=None)

    def to(self, device: torch.device) -> "LocalPack":
        """The same pack with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        vision = self.vision
        if vision is not None:
            vision = replace(
                vision,
                rope_hw_P2=vision.rope_hw_P2.to(device, non_blocking=True),
                window_order_M=vision.window_order_M.to(device, non_blocking=True),
            )
        share = self.share.to(device) if self.share is not None else None
        return replace(self, vision=vision, share=share, lanes=tuple(lane.to(device) for lane in self.lanes), **moved)


def local_pack(batch: PackedBatch, cp: Axis, num_ahead: int = 0, sharing: VisionSharing | None = None) -> LocalPack:
    """The part of ``batch`` that rank ``cp.rank`` computes. Rows are the slots with a loss weight above 0.

    ``num_ahead``: how many multi-token-prediction layers are trained beside the decoder. ``sharing``: the model's, by
    which the images are shared out over ranks; without it this rank encodes them all.
    """
    num_slots = batch.num_slots
    pixels_Y, vision, share = batch.pixels_Y, batch.vision, None
    if sharing is not None and vision is not None:
        pixels_Y, vision, share = share_out(pixels_Y, vision, sharing, batch.pieces_held)
    return LocalPack(
        lanes=tuple(_lane(batch, cp, ahead) for ahead in range(num_ahead + 1)),
        positions_3S=batch.positions_3S,
        pieces=causal_pieces(batch.segment_bounds, zigzag.local_ranges(num_slots, cp.rank, cp.size)),
        merge_order_S=zigzag.merge_order(num_slots, cp.size) if cp.size > 1 else None,
        pixels_Y=pixels_Y,
        vision=vision,
        num_rows=batch.num_trained,
        share=share,
    )


def _lane(batch: PackedBatch, cp: Axis, ahead: int) -> Lane:
    num_slots = batch.num_slots
    slots = zigzag.local_slots(num_slots, cp.rank, cp.size)
    ends_S = _segment_ends(batch)
    is_inside = slots + ahead < ends_S[slots]
    source = torch.where(is_inside, slots + ahead, slots)
    weights_S = batch.loss_weights_S[source] * is_inside
    rows_R = weights_S.nonzero().squeeze(-1)
    target_M = batch.splice_M - ahead  # of which those before the segment's start are left out
    starts_here = ends_S[target_M.clamp(min=0)] == ends_S[batch.splice_M]
    splice_slots_M = zigzag.global_to_local(num_slots, cp.rank, cp.size)[target_M]
    taken_L = ((splice_slots_M >= 0) & (target_M >= 0) & starts_here).nonzero().squeeze(-1)
    return Lane(
        token_ids_S=batch.token_ids_S[source],
        splice_slots_L=splice_slots_M[taken_L],
        splice_rows_L=batch.splice_rows_M[taken_L],
        rows_R=rows_R,
        labels_R=batch.labels_S[source][rows_R],
        weights_R=weights_S[rows_R],
        columns={name: column_S[source][rows_R] for name, column_S in batch.columns.items()},
    )


def _segment_ends(batch: PackedBatch) -> Tensor:
    """int64 [S]: where the segment of every slot ends."""
    bounds = torch.tensor(batch.segment_bounds)
    return bounds[1:].repeat_interleave(bounds.diff())
