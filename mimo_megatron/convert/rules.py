"""Rules between Hugging Face tensors and ours: each names both sides and the slices that hold the same numbers.

Both directions copy along the same list of pieces, so a rule cannot be right one way and wrong the other.
Invariants: the pieces of a rule cover every element of both sides exactly once; ``to_ours(to_hf(x)) == x`` bit for bit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A tensor by name and shape, without data."""

    name: str
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """``length`` rows of ours from ``ours_start`` are those of ``hf[source]`` from ``hf_start``; columns, at dim 1."""

    ours_start: int
    source: int
    hf_start: int
    length: int
    dim: int = 0


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and the Hugging Face tensors that hold the same numbers.

    No pieces: the same elements in the same order, perhaps in another shape; nothing is copied then.
    """

    ours: Spec
    hf: tuple[Spec, ...]
    pieces: tuple[Piece, ...] = ()
    copies: tuple[Spec, ...] = ()
    """Hugging Face tensors that may repeat this one (a tied head). They must be equal to it, and are never written."""

    def to_ours(self, hf: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Our tensor. Written into the flat ``out`` where elements must move, else a view of ``hf[0]``."""
        if not self.pieces:
            return hf[0].reshape(self.ours.shape)
        ours = (hf[0].new_empty(self.ours.numel) if out is None else out).view(self.ours.shape)
        for piece in self.pieces:
            there = hf[piece.source].narrow(piece.dim, piece.hf_start, piece.length)
            ours.narrow(piece.dim, piece.ours_start, piece.length).copy_(there)
        return ours

    def to_hf(self, ours: Tensor, out: Tensor | None = None) -> list[Tensor]:
        """The Hugging Face tensors, in the order of ``hf``. Written into the flat ``out`` where rows are gathered."""
        if not self.pieces:
            return [ours.reshape(self.hf[0].shape)]
        flat = ours.new_empty(self.ours.numel) if out is None else out
        rooms = flat.split([spec.numel for spec in self.hf])
        return [self._gather(ours, source, room) for source, room in enumerate(rooms)]

    def moves_to_hf(self, ours: Tensor, hf: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(source, there, here): copying every ``here`` to its ``there``, of ``hf[source]``, writes what ``to_hf``
        gives into tensors that exist already. Those of one source are in the order of its rows."""
        if not self.pieces:
            yield 0, hf[0], ours.reshape(self.hf[0].shape)
        for piece in self.pieces:
            there = hf[piece.source].narrow(piece.dim, piece.hf_start, piece.length)
            yield piece.source, there, ours.narrow(piece.dim, piece.ours_start, piece.length)

    def _gather(self, ours: Tensor, source: int, room: Tensor) -> Tensor:
        pieces = [piece for piece in self.pieces if piece.source == source]
        here = [ours.narrow(piece.dim, piece.ours_start, piece.length) for piece in pieces]
        if len(pieces) == 1:
            return here[0]
        hf = room.view(self.hf[source].shape)
        for piece, values in zip(pieces, here, strict=True):
            hf.narrow(piece.dim, piece.hf_start, piece.length).copy_(values)
        return hf


def rename(ours: str, hf: str, shape: Shape) -> Rule:
    """The same tensor under another name."""
    return Rule(Spec(ours, shape), (Spec(hf, shape),))


def tied(ours: str, hf: str, copy: str, shape: Shape) -> Rule:
    """One tensor that the model uses twice; Hugging Face folders may hold it a second time as ``copy``."""
    return Rule(Spec(ours, shape), (Spec(hf, shape),), copies=(Spec(copy, shape),))


def flatten(ours: str, hf: str, hf_shape: Shape) -> Rule:
    """A convolution whose stride is its kernel, as the matrix [out, rest] that multiplies flat patches."""
    return Rule(Spec(ours, (hf_shape[0], math.prod(hf_shape[1:]))), (Spec(hf, hf_shape),))


def fuse_gate_up(ours: str, gate: str, up: str, shape: Shape) -> Rule:
    """The gate's rows, then those of ``up``; ``shape`` is that of one of the two."""
    rows = shape[0]
    pieces = (Piece(0, 0, 0, rows), Piece(rows, 1, 0, rows))
    return Rule(Spec(ours, (2 * rows, *shape[1:])), (Spec(gate, shape), Spec(up, shape)), pieces)


def fuse_qkv(ours: str, hf: Sequence[str], num_heads: int, num_kv_heads: int, head_width: int, rest: Shape) -> Rule:
    """q, k and v by key-value head: the query heads that share it, its k, its v. ``rest`` is the input's shape."""
    q_rows = num_heads // num_kv_heads * head_width
    rows = (num_heads * head_width, num_kv_heads * head_width, num_kv_heads * head_width)
    specs = tuple(Spec(name, (count, *rest)) for name, count in zip(hf, rows, strict=True))
    pieces = []
    for group in range(num_kv_heads):
        start = group * (q_rows + 2 * head_width)
        pieces.append(Piece(start, 0, group * q_rows, q_rows))
        pieces.append(Piece(start + q_rows, 1, group * head_width, head_width))
        pieces.append(Piece(start + q_rows + head_width, 2, group * head_width, head_width))
    return Rule(Spec(ours, (sum(rows), *rest)), specs, tuple(pieces))


def swap_halves(ours: str, hf: str, shape: Shape) -> Rule:
    """The two halves of the input columns change places."""
    half = shape[1] // 2
    pieces = (Piece(0, 0, half, half, dim=1), Piece(half, 0, 0, half, dim=1))
    return Rule(Spec(ours, shape), (Spec(hf, shape),), pieces)
