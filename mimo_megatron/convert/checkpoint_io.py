"""Distributed checkpoints, one tensor in memory at a time, without megatron and without a process group.

The folder is a torch distributed checkpoint: ``.metadata`` says in which file, at which offset and in which chunks each
tensor lies, and a chunk is a ``torch.save`` record. Beside it are megatron's two small files and our description.
Invariants: megatron's ``dist_checkpointing.load`` accepts, strictly, what is written here; what any layout saved is
read here as the same whole tensors.
"""

import contextlib
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from mimo_megatron.config.description import STATE_FILE, read_description, write_description
from mimo_megatron.config.manifest import check_whole, seal
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.convert.hf_io import write_json
from mimo_megatron.convert.storage import Scratch, Stored, map_tensor
from mimo_megatron.errors import CheckpointError

TRAINING_PREFIXES = ("optimizer.", "fp8.")
"""Of what a checkpoint holds beside the model: of use to training alone."""
_METADATA_FILE = ".metadata"
_DATA_FILE = "__0_0.distcp"
_RECORD_ALIGNMENT = 64


class CheckpointReader:
    """The model's tensors in a checkpoint folder, whole, whatever layout saved them. Training's own state is not seen.

    Opening one reads the whole folder once and refuses bytes that are not those written, unless
    it is about to be sealed.
    """

    def __init__(self, folder: Path, *, is_sealed: bool = True):
        self.folder = folder
        if is_sealed:
            check_whole(folder)
        self.model = read_description(folder)
        metadata = _read_metadata(folder)
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(TRAINING_PREFIXES)
        }
        self._scratch = Scratch()
        for key, entry in self._entries.items():
            self._check_complete(key, entry)

    @property
    def tensors(self) -> dict[str, Stored]:
        """Dtype and shape of every tensor, by key."""
        return {key: Stored(entry.properties.dtype, tuple(entry.size)) for key, entry in self._entries.items()}

    def read(self, key: str) -> Tensor:
        """The whole tensor: mapped from its file, or assembled in a buffer that the next ``read`` may overwrite."""
        entry = self._entries[key]
        if len(entry.chunks) == 1:
            return self._map_chunk(key, entry.chunks[0])
        whole = self._scratch.take(math.prod(entry.size), entry.properties.dtype).view(entry.size)
        for chunk in entry.chunks:
            place = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            whole[tuple(place)] = self._map_chunk(key, chunk)
        return whole

    def _map_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._places[MetadataIndex(key, chunk.offsets)]
        path = self.folder / info.relative_path
        with path.open("rb") as file:
            record = cast(IO[bytes], _create_file_view(file, info.offset, info.length))
            # Loaded to the meta device, a record gives its tensor's strides and where its bytes lie, and reads no data.
            layout = torch.load(record, map_location="meta", weights_only=True)
        storage = layout.untyped_storage()
        start = info.offset + storage._checkpoint_offset
        values = map_tensor(path, start, layout.dtype, storage.nbytes() // layout.dtype.itemsize)
        return values.as_strided(layout.size(), layout.stride(), layout.storage_offset())

    def _check_complete(self, key: str, entry: TensorStorageMetadata) -> None:
        held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if held != math.prod(entry.size):
            raise CheckpointError(
                f"{self.folder} is torn: the chunks of {key} {list(entry.size)} hold {held} of {math.prod(entry.size)} "
                "values; take an older checkpoint"
            )
        for chunk in entry.chunks:
            info = self._places[MetadataIndex(key, chunk.offsets)]
            path = self.folder / info.relative_path
            size = path.stat().st_size if path.is_file() else 0
            if size < info.offset + info.length:
                raise CheckpointError(
                    f"{self.folder} is torn: {key} should lie in bytes {info.offset} to {info.offset + info.length} of "
                    f"{info.relative_path}, which has {size}; take an older checkpoint"
                )


def _read_metadata(folder: Path) -> Metadata:
    if not (folder / _METADATA_FILE).is_file():
        raise CheckpointError(f"{folder} is not a finished checkpoint: it has no {_METADATA_FILE}")
    try:
        return FileSystemReader(folder).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError) as fault:
        raise CheckpointError(f"{folder / _METADATA_FILE} is torn: {fault!r}; take an older checkpoint") from fault


class CheckpointWriter:
    """Writes a checkpoint of weights into an empty folder, one whole tensor after the other.

    The folder is complete, and sealed, when the ``with`` block ends without an exception: what else belongs into it is
    put there before.
    """

    def __init__(self, folder: Path, model: ModelConfig):
        self._folder = folder
        self._model = model
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file = (folder / _DATA_FILE).open("wb")

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor."""
        origin = torch.Size([0] * tensor.dim())
        properties = TensorProperties.create_from_tensor(tensor)
        self._entries[key] = TensorStorageMetadata(
            properties, tensor.size(), [ChunkStorageMetadata(origin, tensor.size())]
        )
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save would write the whole storage
        self._write(MetadataIndex(key, origin), tensor)

    def add_object(self, key: str, value: object) -> None:
        """Write one megatron ``ShardedObject``: by its convention a list of one."""
        self._entries[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), [value])

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is not None:
            return
        write_description(self._folder, self._model)
        write_json(self._folder / STATE_FILE, {})
        backends = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        write_json(self._folder / "metadata.json", backends)
        torch.save({}, self._folder / "common.pt")
        metadata = Metadata(self._entries, None, self._places, StorageMeta(), CURRENT_DCP_VERSION)
        (self._folder / _METADATA_FILE).write_bytes(pickle.dumps(metadata))
        seal(self._folder)

    def _write(self, index: MetadataIndex, value: object) -> None:
        self._file.write(b"\0" * (-self._file.tell() % _RECORD_ALIGNMENT))
        start = self._file.tell()
        with _no_checksum():
            torch.save(value, self._file)
        self._places[index] = _StorageInfo(_DATA_FILE, start, self._file.tell() - start)


@contextlib.contextmanager
def _no_checksum() -> Iterator[None]:
    """torch.save without the CRC that torch.load does not check: 3.9 instead of 1.2 GB per CPU-second."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
