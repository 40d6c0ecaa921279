"""The index over a folder of tar shards: one Parquet row a sample, with byte offsets and exact lengths.

With it a data set is shuffled and packed without opening a tar. Invariants: lengths equal those of ``encode_sample``;
every sample of the tars is either a row or a line of ``index_skipped.jsonl`` (a torn shard is one line for all that is
lost); the sidecar ``index.json`` gets its name last, so an index that is there is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mimo_megatron.config.manifest import sync
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig, ReadConfig
from mimo_megatron.data.encode import length_settings
from mimo_megatron.data.pairs import measure_stored
from mimo_megatron.data.reading import ReadError, read_until_right
from mimo_megatron.data.records import Record, SampleError, parse_record
from mimo_megatron.data.shards import JSON_NAME, Member, scan_samples
from mimo_megatron.data.source import INDEX_FILE, INDEX_VERSION, SIDECAR_FILE
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.errors import DataError
from mimo_megatron.log import get_logger
from mimo_megatron.types import MediaRef, RawSample

SKIPPED_FILE = "index_skipped.jsonl"

_MEDIA = pa.struct({"kind": pa.string(), "offset": pa.int64(), "num_bytes": pa.int64(), "sha256": pa.string()})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "shard": pa.string(),
        "key": pa.string(),
        "json_offset": pa.int64(),
        "json_bytes": pa.int64(),
        "json_sha256": pa.string(),
        "media": pa.list_(_MEDIA),
        "num_tokens": pa.int64(),
        "num_patches": pa.int64(),
        "segment_squares": pa.int64(),
        "frame_squares": pa.int64(),
        "split": pa.string(),
    }
)


@dataclass
class IndexReport:
    """What an index holds: samples by split, their sums, and what was left out by reason."""

    num_samples: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_patches: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    num_over_capacity: int = 0
    """Samples in the index that a pack of this recipe cannot hold; the loader leaves them out and says so."""
    num_long_texts: int = 0
    """Those of them that are cut where the recipe says ``long_samples: split``, and in how many parts."""
    num_parts: int = 0


def build_index(
    folder: Path,
    tokenizer: TextTokenizer,
    model: ModelConfig,
    data: DataConfig,
    *,
    out: Path | None = None,
    held_out_fraction: float = 0.0,
) -> IndexReport:
    """What was indexed. Writes the index of ``folder/*.tar`` into ``out`` (default: the same folder).

    A sample without a ``split`` of its own goes to "validation" with the chance ``held_out_fraction``, decided by a
    hash of its id, else to "train".
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} holds no *.tar shard; write some with mimo_megatron.data.shards.write_shards")
    if not 0 <= held_out_fraction < 1:
        raise DataError(f"held_out_fraction {held_out_fraction} must be at least 0 and below 1")
    out = out or folder
    source = folder.resolve().name
    indexer = _Indexer(source, tokenizer, model, data, held_out_fraction)
    with _replaced_whole(out, (INDEX_FILE, SKIPPED_FILE, SIDECAR_FILE)) as (index, skipped, sidecar):
        described = _write_rows(indexer, shards, index, skipped)
        report = indexer.report
        about = {
            "version": INDEX_VERSION,
            "source": source,
            "shards_folder": os.path.relpath(folder.resolve(), out.resolve()),
            "settings": length_settings(tokenizer, model, data),
            "num_samples": dict(report.num_samples),
            "num_tokens": report.num_tokens,
            "num_patches": report.num_patches,
            "skipped": dict(report.skipped),
            "shards": described,
        }
        sidecar.write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    return report


def _write_rows(indexer: "_Indexer", shards: Sequence[Path], index: Path, skipped: Path) -> list[dict[str, Any]]:
    """Name, size and hash of each shard, with its samples written into the one file or the other."""
    described = []
    with pq.ParquetWriter(index, SCHEMA) as table, skipped.open("w", encoding="utf-8") as left_out:
        for shard in shards:
            try:
                rows, faults = indexer.index_shard(shard)
                with shard.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                described.append({"name": shard.name, "num_bytes": shard.stat().st_size, "sha256": digest})
            except OSError as error:
                raise DataError(f"{shard} cannot be read ({error}); mend its storage and index again") from error
            table.write_table(pa.Table.from_pylist(rows, SCHEMA))
            left_out.writelines(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults)
            get_logger().info("indexed %s: %d samples, %d skipped", shard, len(rows), len(faults))
    return described


@contextlib.contextmanager
def _replaced_whole(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Files to write, which take their names together when the block ends well, the last name last of all.

    ``DataError`` where the disk is full or fails; whatever went wrong, nothing half written is left, and what was there
    before still is.
    """
    parts = [folder / f"{name}.part" for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield parts
        for part in parts:
            sync(part)
        (folder / names[-1]).unlink(missing_ok=True)  # the old one does not speak of the new files
        for part, name in zip(parts, names, strict=True):
            part.replace(folder / name)
        sync(folder)
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise DataError(
            f"the index cannot be written to {folder} ({error}); {free:,} bytes are free there: make room, or name "
            "another folder"
        ) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


class _Indexer:
    def __init__(
        self, source: str, tokenizer: TextTokenizer, model: ModelConfig, data: DataConfig, held_out_fraction: float
    ) -> None:
        self._source = source
        self._tokenizer, self._model, self._data = tokenizer, model, data
        self._held_out_fraction = held_out_fraction
        self._seen: set[str] = set()
        self.report = IndexReport()

    def index_shard(self, shard: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """The rows of a shard's good samples, and who was left out, where and why."""
        rows: list[dict[str, Any]] = []
        faults: list[dict[str, str]] = []

        def skip(fault: SampleError, key: str) -> None:
            self.report.skipped[fault.reason] += 1
            found = {"id": fault.sample_id, "shard": shard.name, "key": key}
            faults.append({**found, "reason": fault.reason, "detail": fault.detail})

        try:
            for key, members in scan_samples(shard):
                try:
                    rows.append(self._row(shard, key, members))
                except SampleError as fault:
                    skip(fault, key)
        except DataError as error:
            if isinstance(error, ReadError) and error.reason in ("missing", "io_error"):
                raise  # the storage is at fault, not the shard: an index without it would be silently smaller
            skip(SampleError(shard.name, "shard", str(error)), "")
        return rows, faults

    def _row(self, shard: Path, key: str, members: Sequence[Member]) -> dict[str, Any]:
        found = read_record(shard, key, members, self._data.read)
        record, by_name = found.record, found.members
        if record.id in self._seen:
            raise SampleError(record.id, "duplicate_id", "an earlier sample has the same id")
        check_names(record.id, [name for _, name in record.media], by_name)
        contents = {name: read_member(shard, member, self._data.read) for name, member in by_name.items()}
        media = tuple(
            MediaRef(
                kind,
                str(shard),
                by_name[name].offset,
                by_name[name].num_bytes,
                hashlib.sha256(contents[name]).hexdigest(),
            )
            for kind, name in record.media
        )
        raw = RawSample(record.id, self._source, record.messages, media, record.meta)
        measure = measure_stored(
            raw, [contents[name] for _, name in record.media], self._tokenizer, self._model, self._data
        )
        self._seen.add(record.id)
        split = record.split or ("validation" if _chance(record.id) < self._held_out_fraction else "train")
        self._count(split, measure.num_tokens, measure.num_patches)
        return {
            "id": record.id,
            "shard": shard.name,
            "key": key,
            "json_offset": found.home.offset,
            "json_bytes": found.home.num_bytes,
            "json_sha256": hashlib.sha256(found.text).hexdigest(),
            "media": [
                {"kind": one.kind, "offset": one.offset, "num_bytes": one.num_bytes, "sha256": one.sha256}
                for one in media
            ],
            **measure._asdict(),
            "split": split,
        }

    def _count(self, split: str, num_tokens: int, num_patches: int) -> None:
        self.report.num_samples[split] += 1
        self.report.num_tokens += num_tokens
        self.report.num_patches += num_patches
        capacity = self._data.pack_tokens
        self.report.num_over_capacity += num_tokens > capacity or num_patches > self._data.pack_patches
        if num_tokens > capacity and not num_patches and self._model.text.head != "reward":
            self.report.num_long_texts += 1
            self.report.num_parts += -(-num_tokens // capacity)


@dataclass(frozen=True)
class FoundSample:
    """A sample in its tar: where its JSON lies and what it says, and its other files by name."""

    home: Member
    text: bytes
    record: Record
    members: Mapping[str, Member]


def read_record(shard: Path, key: str, members: Sequence[Member], reading: ReadConfig) -> FoundSample:
    """The sample of these members, its JSON read. ``SampleError`` where it has none that can be used."""
    default_id = f"{shard.stem}/{key}"
    by_name = {member.name: member for member in members}
    if len(by_name) < len(members):
        raise SampleError(default_id, "duplicate_name", f"two files of key {key!r} have one name")
    if JSON_NAME not in by_name:
        raise SampleError(default_id, "json", f"{key}.{JSON_NAME} is missing; there are {sorted(by_name)}")
    home = by_name.pop(JSON_NAME)
    text = read_member(shard, home, reading)
    return FoundSample(home, text, parse_record(text, default_id), by_name)


def check_names(sample_id: str, named: Iterable[str], members: Mapping[str, Member]) -> None:
    """``SampleError`` unless the files that the messages name are those that the sample has."""
    named = set(named)
    if missing := sorted(named - set(members)):
        raise SampleError(sample_id, "media_missing", f"the messages name {missing}; the shard has {sorted(members)}")
    if unused := sorted(set(members) - named):
        raise SampleError(sample_id, "media_unused", f"the shard has {unused}, which no message shows")


def read_member(shard: Path, member: Member, reading: ReadConfig) -> bytes:
    return read_until_right(str(shard), member.offset, member.num_bytes, "", reading)


def _chance(sample_id: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") / 2**64
