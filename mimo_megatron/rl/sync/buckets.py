"""What crosses from trainer to engine: an announcement of all tensors, then buckets of their bytes.

Everything has a fixed form: JSON of known keys, then raw bytes. Nothing is unpickled. Tensors are under their Hugging
Face names, whole, whatever the trainer's layout.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of an update."""

    name: str
    dtype: str
    """As in safetensors: ``F32``, ``BF16``."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """All tensors of one policy version, in the order in which they are sent."""

    version: int
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class PackedTensor:
    """Where a tensor lies in its bucket."""

    entry: TensorEntry
    offset: int
    checksum: int
    """XXH3-64 of its bytes, computed where they came from."""


@dataclass(frozen=True)
class Bucket:
    """Some tensors one after another, each at a multiple of 64 bytes."""

    version: int
    number: int
    """From 0, without gaps: buckets come in order."""
    tensors: tuple[PackedTensor, ...]
    data: Tensor
    """uint8 [num_bytes], contiguous."""
