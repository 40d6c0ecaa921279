"""Safetensors folders, one tensor in memory at a time: a reader that maps, a writer that knows its headers beforehand.

Invariants: what the writer wrote, the safetensors package reads; a torn or inconsistent folder is a ``CheckpointError``
that names the file, before any tensor is read.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mimo_megatron.convert.rules import Spec
from mimo_megatron.convert.storage import Stored, map_tensor
from mimo_megatron.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LENGTH_BYTES = 8
DTYPES = {  # as safetensors spells them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Location(Stored):
    path: Path
    start: int


class SafetensorsFolder:
    """The tensors of a folder by their released names, mapped one at a time.

    transformers 5 calls ``visual.*`` and ``model.*`` in memory ``model.visual.*`` and ``model.language_model.*``;
    folders with those names are read as if they had the released ones.
    """

    def __init__(self, folder: Path):
        self._tensors: dict[str, _Location] = {}
        for path, listed in _files_of(folder).items():
            found = _read_header(path)
            lost = sorted(listed - found.keys())
            if lost:
                raise CheckpointError(f"{path}: {INDEX_FILE} promises {lost[0]} here, which the file does not hold")
            for stored_name, location in found.items():
                name = _released_name(stored_name)
                if name in self._tensors:
                    raise CheckpointError(f"{folder}: tensor {name} is there twice, also in {self._tensors[name].path}")
                self._tensors[name] = location

    @property
    def tensors(self) -> dict[str, Stored]:
        """Dtype and shape of every tensor, by name."""
        return dict(self._tensors)

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file."""
        at = self._tensors[name]
        return map_tensor(at.path, at.start, at.dtype, math.prod(at.shape)).view(at.shape)


def _files_of(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a folder, each with the names that the index promises in it (none without an index)."""
    index = folder / INDEX_FILE
    if index.exists():
        files: dict[Path, set[str]] = {}
        for name, file in read_json(index).get("weight_map", {}).items():
            files.setdefault(folder / file, set()).add(name)
    else:
        files = {folder / SINGLE_FILE: set()}
    absent = [str(path) for path in files if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} is not a complete Hugging Face folder of safetensors: no file {', '.join(absent)}. "
            "Download it again; weights in another format must first be saved as safetensors"
        )
    return files


def _read_header(path: Path) -> dict[str, _Location]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < length <= size - _LENGTH_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: header of {length} bytes in a file of {size}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as fault:
            raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON ({fault})") from fault
    header.pop("__metadata__", None)
    data = _LENGTH_BYTES + length
    found = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{path}: tensor {name} has dtype {entry['dtype']}, which cannot be converted")
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
            raise CheckpointError(
                f"{path} is torn: tensor {name} {list(shape)} {dtype} should lie in bytes {data + begin} to "
                f"{data + end} of a file of {size}"
            )
        found[name] = _Location(dtype, shape, path, data + begin)
    return found


def _released_name(name: str) -> str:
    for newer, released in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(newer):
            return released + name.removeprefix(newer)
    return name


class SafetensorsWriter:
    """Writes tensors into a folder in the order announced, cut into files of at most ``shard_bytes``.

    A tensor larger than that gets a file of its own. An index is written where there is more than one file.
    """

    def __init__(self, folder: Path, specs: Sequence[Spec], dtype: torch.dtype, shard_bytes: int):
        self._folder = folder
        self._dtype = dtype
        self._shards = _plan_shards(specs, dtype, shard_bytes)
        self._pending = [(shard, spec) for shard, members in enumerate(self._shards) for spec in members][::-1]
        self._open_shard = -1
        self._file: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which must be the one announced."""
        shard, spec = self._pending.pop()
        assert (name, tuple(tensor.shape), tensor.dtype) == (spec.name, spec.shape, self._dtype), (name, spec)
        if shard != self._open_shard:
            self._close_file()
            self._file = (self._folder / self._file_name(shard)).open("wb")
            self._file.write(_header(self._shards[shard], self._dtype))
            self._open_shard = shard
        assert self._file is not None
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._close_file()
        if kind is not None:
            return
        assert not self._pending, f"never written: {[spec.name for _, spec in self._pending]}"
        if len(self._shards) > 1:
            total = sum(spec.numel for members in self._shards for spec in members) * self._dtype.itemsize
            weight_map = {
                spec.name: self._file_name(shard) for shard, members in enumerate(self._shards) for spec in members
            }
            write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _file_name(self, shard: int) -> str:
        if len(self._shards) == 1:
            return SINGLE_FILE
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _plan_shards(specs: Sequence[Spec], dtype: torch.dtype, shard_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        size = spec.numel * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += size
    return shards


def _header(specs: Sequence[Spec], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.numel * dtype.itemsize
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ``CheckpointError`` where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a Hugging Face model folder: it has no {path.name}")
    try:
        content = json.loads(path.read_text())
    except ValueError as fault:
        raise CheckpointError(f"{path} is not JSON: {fault}") from fault
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
