"""A made pack in a piece of shared memory without a name: written by the process that made it, mapped by the one that
trains on it, gone when its last tensor is.

The arrays come first, each at a multiple of 64 bytes, then a description of the rest in JSON; nothing is pickled. There
is no file, so nothing is left behind by a killed process and no limit of /dev/shm applies. Linux only.
"""

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from mimo_megatron.data.making import MadePack
from mimo_megatron.data.records import SampleError
from mimo_megatron.types import PackedBatch, VisionLayout

_ALIGNMENT = 64
_KINDS = {kind.__name__: kind for kind in (PackedBatch, VisionLayout)}


def write_shared(pack: MadePack) -> tuple[int, int]:
    """A file descriptor of its memory, and its length there in bytes."""
    arrays: list[np.ndarray[Any, Any]] = []
    about = {
        "batch": _described(pack.batch, arrays),
        "faults": [[number, fault.sample_id, fault.reason, fault.detail] for number, fault in pack.faults],
        "digest": pack.digest.hex(),
    }
    file = os.memfd_create("mimo-pack", os.MFD_CLOEXEC)
    try:
        offset = 0
        for array in arrays:
            _write_all(file, array.data.cast("B") if array.size else b"", offset)
            offset = _aligned(offset + array.nbytes)
        text = json.dumps(about).encode()
        _write_all(file, text, offset)
        os.ftruncate(file, offset + len(text) + 8)
        _write_all(file, len(text).to_bytes(8, "little"), offset + len(text))
    except BaseException:
        os.close(file)
        raise
    return file, offset + len(text) + 8


def read_shared(file: int, num_bytes: int) -> MadePack:
    """The pack whose memory this is; its tensors are that memory. The descriptor stays the caller's."""
    memory = mmap.mmap(file, num_bytes)
    length = int.from_bytes(memory[-8:], "little")
    about = json.loads(memory[num_bytes - 8 - length : num_bytes - 8])
    faults = tuple((number, SampleError(*fault)) for number, *fault in about["faults"])
    return MadePack(_restored(about["batch"], memory), faults, bytes.fromhex(about["digest"]))


def _described(value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    """JSON that ``_restored`` turns into an equal value; tensors go to ``arrays``."""
    if isinstance(value, torch.Tensor):
        array = np.ascontiguousarray(value.numpy())
        offset = sum(_aligned(one.nbytes) for one in arrays)
        arrays.append(array)
        return {"array": [array.dtype.str, array.shape, offset]}
    if is_dataclass(value):
        inner = {one.name: _described(getattr(value, one.name), arrays) for one in fields(value)}
        return {"kind": type(value).__name__, "fields": inner}
    if isinstance(value, tuple):
        return {"tuple": [_described(one, arrays) for one in value]}
    if isinstance(value, Mapping):
        return {"mapping": {key: _described(one, arrays) for key, one in value.items()}}
    assert value is None or isinstance(value, bool | int | float | str), f"a pack holds a {type(value).__name__}"
    return value


def _restored(about: Any, memory: mmap.mmap) -> Any:
    match about:
        case {"array": [dtype, shape, offset]}:
            count = int(np.prod(shape))
            array = np.frombuffer(memory, dtype, count, offset if count else 0)
            return torch.from_numpy(array.reshape(shape))
        case {"kind": kind, "fields": inner}:
            return _KINDS[kind](**{name: _restored(one, memory) for name, one in inner.items()})
        case {"tuple": members}:
            return tuple(_restored(one, memory) for one in members)
        case {"mapping": members}:
            return {key: _restored(one, memory) for key, one in members.items()}
    return about


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
