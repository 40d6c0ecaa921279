"""What crosses from trainer to engine: an announcement of all tensors, then buckets of their bytes.

Everything has a fixed form: JSON of known keys, then raw bytes. Nothing is unpickled. Tensors are under their Hugging
Face names, whole, whatever the trainer's layout. Invariants, tested under these words:

* The form is canonical: what is read must write back to the same bytes, so an unknown, repeated or missing key, another
  type or a stray space is a ``SyncError``.
* A header fits its bucket: known dtypes, offsets at multiples of 64 bytes that rise without overlap, all inside.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

from mimo_megatron.convert.hf_io import DTYPE_NAMES, DTYPES
from mimo_megatron.errors import SyncError

ALIGNMENT = 64
MOST_HEADER_BYTES = 16 << 20
"""Of a manifest or header in JSON: a model of 7 B has 0.1 MB."""
STRICT = ConfigDict(extra="forbid", strict=True)
"""Of every form on the wire: no other keys, no conversion of types."""
Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_BLOCK_BYTES = 1 << 17
_Form = TypeVar("_Form")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of an update."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Annotated[str, Field(min_length=1, max_length=512)]
    dtype: str
    """As in safetensors: ``F32``, ``BF16``."""
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Manifest:
    """All tensors of one policy version, in the order in which they are sent."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    version: Count
    tensors: tuple[TensorEntry, ...]

    def to_json(self) -> bytes:
        return _MANIFEST.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """``SyncError`` for anything that ``to_json`` would not have written."""
        manifest = read_form(_MANIFEST, data, "a manifest")
        check_entries(manifest.tensors)
        return manifest


@dataclass(frozen=True)
class PackedTensor:
    """Where a tensor lies in its bucket."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    entry: TensorEntry
    offset: Count
    checksum: Annotated[int, Field(ge=0, lt=1 << 64)]
    """XXH3-64 of its bytes, computed where they came from."""

    @property
    def end(self) -> int:
        return self.offset + self.entry.num_bytes


@dataclass(frozen=True)
class BucketHeader:
    """A bucket without its bytes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    version: Count
    number: Count
    num_bytes: Count
    tensors: tuple[PackedTensor, ...]

    def to_json(self) -> bytes:
        return _HEADER.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> "BucketHeader":
        """``SyncError`` for anything that ``to_json`` would not have written, or that does not fit ``num_bytes``."""
        header = read_form(_HEADER, data, "a bucket's header")
        header.check()
        return header

    def check(self) -> None:
        """``SyncError`` where tensors do not lie one after another, aligned, inside the bucket."""
        check_entries(packed.entry for packed in self.tensors)
        end = 0
        for packed in self.tensors:
            if packed.offset % ALIGNMENT or packed.offset < end or packed.end > self.num_bytes:
                raise SyncError(
                    f"bucket {self.number}: tensor {packed.entry} cannot lie in bytes {packed.offset} to "
                    f"{packed.end}: the one before ends at {end}, the bucket at {self.num_bytes}, and offsets are "
                    f"multiples of {ALIGNMENT}"
                )
            end = packed.end

    def with_data(self, data: Tensor) -> "Bucket":
        """The bucket, its bytes being ``data``."""
        if data.dtype != torch.uint8 or data.shape != (self.num_bytes,):
            raise SyncError(
                f"bucket {self.number} announces {self.num_bytes} bytes and came with {data.dtype} "
                f"{list(data.shape)}; send the update again from its first bucket"
            )
        return Bucket(self.version, self.number, self.tensors, data)


@dataclass(frozen=True)
class Bucket:
    """Some tensors one after another, each at a multiple of 64 bytes."""

    version: int
    number: int
    """From 0, without gaps: buckets come in order."""
    tensors: tuple[PackedTensor, ...]
    data: Tensor
    """uint8 [num_bytes], contiguous."""

    @property
    def header(self) -> BucketHeader:
        return BucketHeader(self.version, self.number, self.data.numel(), self.tensors)

    def view(self, packed: PackedTensor) -> Tensor:
        """The tensor, without a copy."""
        return view(self.data, packed.entry, packed.offset)


_MANIFEST = TypeAdapter(Manifest)
_HEADER = TypeAdapter(BucketHeader)


def entry_of(name: str, tensor: Tensor) -> TensorEntry:
    return TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def checksum(tensor: Tensor) -> int:
    """XXH3-64 of a contiguous CPU tensor's bytes. Other threads run meanwhile."""
    return xxh3_64_intdigest(_bytes_of(tensor).data)


def copy_hashed(there: Tensor, here: Tensor, digest: xxh3_64) -> None:
    """Copy one contiguous CPU tensor to another of its dtype and shape, and add its bytes to ``digest``.

    By blocks, so that they are hashed out of the cache: 5.4 GB per CPU-second, where copying and then hashing whole
    tensors comes to 4.0 (copying alone: 6.4).
    """
    assert there.shape == here.shape and there.dtype == here.dtype
    to, of = _bytes_of(there), _bytes_of(here)
    for start in range(0, len(of), _BLOCK_BYTES):
        block = of[start : start + _BLOCK_BYTES]
        to[start : start + _BLOCK_BYTES] = block
        digest.update(block.data)


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def offsets_of(entries: Iterable[TensorEntry]) -> tuple[list[int], int]:
    """Where each tensor begins, one after another, and how many bytes they take together."""
    offsets, end = [], 0
    for entry in entries:
        offsets.append(round_up(end))
        end = offsets[-1] + entry.num_bytes
    return offsets, end


def round_up(num_bytes: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def view(data: Tensor, entry: TensorEntry, offset: int) -> Tensor:
    """The tensor whose bytes begin at ``offset`` of ``data``."""
    return data[offset : offset + entry.num_bytes].view(DTYPES[entry.dtype]).view(entry.shape)


def pack(version: int, number: int, tensors: Sequence[tuple[str, Tensor]]) -> Bucket:
    """A bucket of copies of these CPU tensors."""
    entries = [entry_of(name, tensor) for name, tensor in tensors]
    offsets, num_bytes = offsets_of(entries)
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    for entry, offset, (_, tensor) in zip(entries, offsets, tensors, strict=True):
        view(data, entry, offset).copy_(tensor)
    return sealed(version, number, entries, offsets, data)


def sealed(version: int, number: int, entries: Sequence[TensorEntry], offsets: Sequence[int], data: Tensor) -> Bucket:
    """The bucket over ``data``, which holds these tensors, with their checksums."""
    places = zip(entries, offsets, strict=True)
    packed = (PackedTensor(entry, offset, checksum(view(data, entry, offset))) for entry, offset in places)
    return Bucket(version, number, tuple(packed), data)


def check_entries(entries: Iterable[TensorEntry]) -> None:
    """``SyncError`` where a dtype is unknown or a name is there twice."""
    seen: set[str] = set()
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise SyncError(f"tensor {entry.name} has the unknown dtype {entry.dtype!r}; known: {', '.join(DTYPES)}")
        if entry.name in seen:
            raise SyncError(f"tensor {entry.name} is announced twice; each has one entry")
        seen.add(entry.name)


def read_form(form: TypeAdapter[_Form], data: bytes, what: str) -> _Form:
    """What ``data`` holds. ``SyncError`` unless it is, byte for byte, what the form would write of it."""
    if len(data) > MOST_HEADER_BYTES:
        raise SyncError(f"{what} of {len(data)} bytes is refused: at most {MOST_HEADER_BYTES}")
    try:
        found = form.validate_json(data)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise SyncError(f"this is not {what}: {where}: {first['msg']}; both sides must run one version") from fault
    if form.dump_json(found) != data:
        raise SyncError(f"this is not {what}: its bytes are not in the canonical form (a repeated key, or spaces)")
    return found


TensorOf = Callable[[str], Tensor]
"""The tensor that an engine holds under this name: whole, in the manifest's dtype and shape."""
