"""A rank's part of a checkpoint: copied away from training, written, read back. No megatron, no process group.

A file is a row of ``torch.save`` records, as torch's distributed checkpoints have them; their order is the plan's.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization
from xxhash import xxh3_128

from mimo_megatron.config.manifest import Entry, measure
from mimo_megatron.errors import CheckpointError

FILE_BYTES = 1 << 31
"""A part is cut into files of about this size, so that many ranks share the reading when it is loaded."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class Piece:
    """One record to write: the plan's item and its value."""

    item: WriteItem
    data: Tensor | io.BytesIO


@dataclass(frozen=True)
class Part:
    """What one rank has written."""

    results: list[WriteResult]
    entries: dict[str, Entry]
    """Of its files, by name."""


@dataclass
class HostBuffers:
    """Host memory that training does not touch, kept for the next save: pinned where tensors lie on a GPU."""

    _buffers: dict[MetadataIndex, Tensor] = field(default_factory=dict)

    def copy(self, pieces: Sequence[Piece], live: frozenset[int]) -> list[Piece]:
        """``pieces`` with every tensor of a GPU, or whose storage begins at one of the ``live`` addresses, copied."""
        copied = [self._copy(piece, live) for piece in pieces]
        if any(isinstance(piece.data, Tensor) and piece.data.is_cuda for piece in pieces):
            torch.cuda.synchronize()
        return copied

    def _copy(self, piece: Piece, live: frozenset[int]) -> Piece:
        data = piece.data
        if not isinstance(data, Tensor) or not (data.is_cuda or data.untyped_storage().data_ptr() in live):
            return piece
        buffer = self._buffers.get(piece.item.index)
        if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
            buffer = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            self._buffers[piece.item.index] = buffer
        buffer.copy_(data.detach(), non_blocking=data.is_cuda)
        return Piece(piece.item, buffer)


def write_part(folder: Path, rank: int, pieces: Sequence[Piece]) -> Part:
    """Write ``pieces`` into files of ``folder``, bring them to the disk and compare what lies there with what was sent.

    ``CheckpointError`` where it differs; ``OSError`` where it cannot be written.
    """
    results: list[WriteResult] = []
    entries: dict[str, Entry] = {}
    for number, group in enumerate(_groups(pieces)):
        name = f"__{rank}_{number}.distcp"
        with _HashedFile(folder / name) as file:
            results += [_write_record(file, name, piece) for piece in group]
        entries[name] = file.entry
        found = measure(folder / name)
        if found != file.entry:
            raise CheckpointError(f"{folder / name} reads {found}, written was {file.entry}: the disk lost bytes")
    return Part(results, entries)


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        size = piece.data.nbytes if isinstance(piece.data, Tensor) else len(piece.data.getbuffer())
        if group and num_bytes + size > FILE_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(piece)
        num_bytes += size
    if group:
        yield group


def _write_record(file: "_HashedFile", name: str, piece: Piece) -> WriteResult:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    start = file.tell()
    if isinstance(piece.data, Tensor):
        tensor = piece.data.detach().cpu()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save would write the whole storage
        with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]  # ours is XXH3
            torch.save(tensor, cast(IO[bytes], file))
    else:
        file.write(piece.data.getbuffer())
    length = file.tell() - start
    return WriteResult(piece.item.index, length, _StorageInfo(name, start, length))


class _HashedFile:
    """A new file that hashes what it is given. After its ``with`` block it is on the disk and out of the page cache, so
    that reading it back reads the disk."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._digest = xxh3_128()
        self._size = 0
        self._fault: OSError | None = None

    @property
    def entry(self) -> Entry:
        return Entry(self._size, self._digest.hexdigest())

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        try:
            written = self._file.write(data)
        except OSError as fault:
            self._fault = fault
            raise
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            with contextlib.suppress(*([OSError] if self._fault else [])):
                self._file.close()
        if self._fault:
            raise self._fault  # torch.save reports a position instead
