"""WebDataset tars: files of a sample lie side by side and share the part of the name before its first dot.

Sample ``k`` is ``k.json`` and any number of ``k.NAME`` (``k.image0.jpg``, ``k.video0.mp4``). Invariants: written
bytes are a function of the samples alone (no time stamps, no owners); a shard appears under its name only when it is
whole.
"""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_megatron.errors import DataError

JSON_NAME = "json"


@dataclass(frozen=True)
class ShardSample:
    """A sample to be written: its record, and the bytes of the files that the record names."""

    key: str
    record: Mapping[str, Any]
    members: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """A file inside a tar: the key of its sample, its own name, and where its bytes lie."""

    key: str
    name: str
    offset: int
    num_bytes: int


def write_shards(samples: Iterable[ShardSample], folder: Path, samples_per_shard: int) -> list[Path]:
    """The paths of the written shards ``shard-000000.tar``, ... in the order of the samples."""
    assert samples_per_shard > 0
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    remaining = iter(samples)
    while write_shard(folder / f"shard-{len(paths):06d}.tar", itertools.islice(remaining, samples_per_shard)):
        paths.append(folder / f"shard-{len(paths):06d}.tar")
    return paths


def write_shard(path: Path, samples: Iterable[ShardSample]) -> int:
    """How many samples the shard at ``path`` now holds; where there are none, no file is made."""
    remaining = iter(samples)
    first = next(remaining, None)
    if first is None:
        return 0
    if path.exists():
        raise DataError(f"{path} exists already; write to an empty folder, or remove its shards and index first")
    part = path.with_suffix(".tar.part")
    keys: set[str] = set()
    with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in itertools.chain([first], remaining):
            if sample.key in keys:
                raise DataError(f"sample {sample.key!r}: two samples of one shard have this key; give each its own")
            keys.add(sample.key)
            _write_sample(tar, sample)
    os.replace(part, path)
    return len(keys)


def scan_samples(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """Each sample's key and members, in the order of the tar; headers only, so the bytes are skipped over.

    ``DataError`` at the place where a tar is torn; the samples before it have been given by then.
    """
    for key, members in itertools.groupby(_scan_members(path), key=lambda member: member.key):
        yield key, list(members)


def _scan_members(path: Path) -> Iterator[Member]:
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isreg():
                    continue
                folder, slash, file_name = info.name.rpartition("/")
                key, _, name = file_name.partition(".")
                yield Member(folder + slash + key, name, info.offset_data, info.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"shard {path} is torn or not a tar ({error}); write it again") from error


def _write_sample(tar: tarfile.TarFile, sample: ShardSample) -> None:
    if not sample.key or "." in sample.key:
        raise DataError(f"sample {sample.key!r}: a key must not be empty or hold a dot, where the file's name begins")
    if JSON_NAME in sample.members:
        raise DataError(f"sample {sample.key!r}: the name {JSON_NAME!r} belongs to the record; rename the member")
    record = json.dumps(sample.record, ensure_ascii=False, allow_nan=False).encode()
    for name, data in {JSON_NAME: record, **sample.members}.items():
        info = tarfile.TarInfo(f"{sample.key}.{name}")
        info.size = len(data)  # every other field keeps its default: mode 0644, time, user and group 0
        tar.addfile(info, io.BytesIO(data))
