"""Sources of samples: lengths known up front, a sample read by its number, media left where they lie.

``IndexedSource`` reads what ``build_index`` wrote over a folder of tars. Invariants: it refuses an index whose
lengths were computed under other settings, and shards whose sizes changed since; what changes later is found by the
hash of each read; reads share nothing, so they are safe in threads and after a fork.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mimo_megatron.config.run import ReadConfig
from mimo_megatron.data.reading import read_until_right
from mimo_megatron.data.records import Record, SampleError, blame, parse_record
from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.types import MediaRef, RawSample

INDEX_VERSION = 2
INDEX_FILE = "index.parquet"
SIDECAR_FILE = "index.json"
LENGTH_COLUMNS = ("num_tokens", "num_patches", "segment_squares", "frame_squares")
_REBUILD = "run `mimo-megatron data index` again"


class SampleLengths(NamedTuple):
    """int64 [N] each, of every sample: tokens and vision patches, and what attention grows with.

    A source that does not know the squares leaves them out: they are then those of one segment and one frame a sample,
    the most they can be.
    """

    num_tokens_N: NDArray[np.int64]
    num_patches_N: NDArray[np.int64]
    segment_squares: NDArray[np.int64] | None = None
    """Sum over the segments of tokens squared."""
    frame_squares: NDArray[np.int64] | None = None
    """Sum over images and frames of patches squared."""

    @property
    def segment_squares_N(self) -> NDArray[np.int64]:
        return self.num_tokens_N**2 if self.segment_squares is None else self.segment_squares

    @property
    def frame_squares_N(self) -> NDArray[np.int64]:
        return self.num_patches_N**2 if self.frame_squares is None else self.frame_squares

    def take(self, numbers: NDArray[np.int64]) -> "SampleLengths":
        """Those of some of the samples."""
        return SampleLengths(
            self.num_tokens_N[numbers],
            self.num_patches_N[numbers],
            self.segment_squares_N[numbers],
            self.frame_squares_N[numbers],
        )


def joined(lengths: Sequence[SampleLengths]) -> SampleLengths:
    """The lengths of several sources, one after another."""
    return SampleLengths(
        np.concatenate([one.num_tokens_N for one in lengths]),
        np.concatenate([one.num_patches_N for one in lengths]),
        np.concatenate([one.segment_squares_N for one in lengths]),
        np.concatenate([one.frame_squares_N for one in lengths]),
    )


class DataSource(Protocol):
    """What the planner and the loader ask of a data set."""

    @property
    def lengths(self) -> SampleLengths: ...

    def sample_id(self, index: int) -> str: ...

    def read(self, index: int) -> RawSample: ...

    def describe(self) -> dict[str, Any]: ...


class IndexedSource:
    """One split of a folder written by ``build_index``."""

    def __init__(self, folder: Path, split: str, reading: ReadConfig | None = None) -> None:
        self.folder = folder
        self.split = split
        self._reading = reading or ReadConfig()
        self._sidecar = _read_sidecar(folder)
        self._shards = _check_shards(folder, self._sidecar)
        try:
            table = pq.read_table(folder / INDEX_FILE)
        except (OSError, pa.ArrowInvalid) as fault:
            raise ConfigError(f"data.sources: {folder / INDEX_FILE} cannot be read ({fault}); {_REBUILD}") from fault
        self._table = table.filter(pc.equal(table["split"], split)).combine_chunks()
        if not len(self._table):
            known = ", ".join(f"{name} ({count})" for name, count in self._sidecar["num_samples"].items())
            raise ConfigError(f"data.split: {folder} has no sample in split {split!r}; it has {known or 'none at all'}")
        self.lengths = SampleLengths(*(self._table[name].to_numpy() for name in LENGTH_COLUMNS))

    @property
    def name(self) -> str:
        return self._sidecar["source"]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """``ConfigError`` unless the lengths in the index were computed under these ``length_settings``."""
        built = self._sidecar["settings"]
        changed = [key for key in {**built, **settings} if built.get(key) != settings.get(key)]
        if changed:
            listed = "; ".join(f"{key}: index {built.get(key)!r}, recipe {settings.get(key)!r}" for key in changed)
            raise ConfigError(f"the index in {self.folder} was built under other settings ({listed}); {_REBUILD}")

    def sample_id(self, index: int) -> str:
        return self._table["id"][index].as_py()

    def read(self, index: int) -> RawSample:
        """The sample's messages and references to its media. ``SampleError`` if its JSON is not the indexed one."""
        row = self._table.slice(index, 1).to_pylist()[0]
        path = str(self._shards[row["shard"]])
        with blame(row["id"], "json"):
            text = self._read_json(row, path)
        record = parse_record(text, row["id"])
        kinds = [kind for kind, _ in record.media]
        if record.id != row["id"] or kinds != [media["kind"] for media in row["media"]]:
            raise SampleError(row["id"], "json", f"its JSON in {path} changed since it was indexed; {_REBUILD}")
        media = self._media(row, path, record)
        return RawSample(row["id"], self.name, record.messages, media, record.meta)

    def _read_json(self, row: Mapping[str, Any], path: str) -> bytes:
        return read_until_right(path, row["json_offset"], row["json_bytes"], row["json_sha256"], self._reading)

    def _media(self, row: Mapping[str, Any], path: str, record: Record) -> tuple[MediaRef, ...]:
        return tuple(
            MediaRef(one["kind"], path, one["offset"], one["num_bytes"], one["sha256"]) for one in row["media"]
        )

    def describe(self) -> dict[str, Any]:
        """What the source is, for logs and for the record kept beside a checkpoint."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "split": self.split,
            "num_samples": len(self._table),
            "num_tokens": int(self.lengths.num_tokens_N.sum()),
            "num_patches": int(self.lengths.num_patches_N.sum()),
        }


def _read_sidecar(folder: Path) -> dict[str, Any]:
    path = folder / SIDECAR_FILE
    if not path.is_file():
        why = "is not indexed yet" if folder.is_dir() else "does not exist"
        raise ConfigError(f"data.sources: {folder} {why}; `mimo-megatron data index RECIPE` indexes a recipe's sources")
    sidecar = json.loads(path.read_bytes())
    if sidecar.get("version") != INDEX_VERSION:
        raise ConfigError(
            f"{path} has version {sidecar.get('version')}, this program reads {INDEX_VERSION}; {_REBUILD}"
        )
    return sidecar


def _check_shards(folder: Path, sidecar: Mapping[str, Any]) -> dict[str, Path]:
    """Path of each shard by name, after a look at its size; to compare the recorded hash is to read every byte."""
    paths = {}
    for shard in sidecar["shards"]:
        path = (folder / sidecar["shards_folder"] / shard["name"]).resolve()
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes != shard["num_bytes"]:
            raise DataError(f"{path} has {num_bytes} bytes, {shard['num_bytes']} when it was indexed; {_REBUILD}")
        paths[shard["name"]] = path
    return paths
