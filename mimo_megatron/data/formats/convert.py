"""``data convert``: rows of another format into tar shards of ours, streamed, resumable, with a report of bad rows.

Work goes into ``OUT.part`` and is renamed when it is whole, so a folder that is there is a finished conversion. After
every shard the state is written; a conversion that was stopped continues after its last whole shard, and ends with the
bytes of one that was not. Keys of samples count through all shards, as energon asks.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import xxhash

from mimo_megatron.data.formats.base import Format, Row
from mimo_megatron.data.formats.chat import Chat, RowError
from mimo_megatron.data.formats.sample import Reading, sample_of
from mimo_megatron.data.shards import ShardSample, write_shard
from mimo_megatron.errors import DataError
from mimo_megatron.log import get_logger

STATE_FILE = "convert.json"
REPORT_FILE = "convert_skipped.jsonl"
VERSION = 1


@dataclass
class Conversion:
    """How far a conversion is, and what it met: written after every shard."""

    rows_done: int = 0
    num_samples: int = 0
    num_shards: int = 0
    report_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    num_renamed: int = 0
    """Samples whose id an earlier row had: ``ID#2``, ``ID#3``, ..."""
    left_out: set[str] = field(default_factory=set)
    """Keys of rows that JSON cannot hold, and that are therefore not in the samples' meta."""


def convert(
    source: Path,
    out: Path,
    form: Format,
    reading: Reading,
    *,
    is_strict: bool = False,
    samples_per_shard: int = 10_000,
    shard_bytes: int = 1 << 30,
) -> Conversion:
    """What was converted, into the shards of ``out``. With ``is_strict`` the first bad row is a ``DataError``."""
    files = form.files(source)
    if not files:
        raise DataError(f"{source} has no file of the format {form.name}")
    task = _task(source, files, form, reading, samples_per_shard, shard_bytes)
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise DataError(f"{out} exists already; choose another folder, or remove it")
    part.mkdir(parents=True, exist_ok=True)
    done = _resume(part, task)
    with (part / REPORT_FILE).open("a", encoding="utf-8") as report:
        report.truncate(done.report_bytes)
        report.seek(done.report_bytes)
        samples = iter(_Samples(files, form, reading, done, report, is_strict))
        while True:
            path = part / f"shard-{done.num_shards:06d}.tar"
            num_samples = write_shard(path, _cut(samples, samples_per_shard, shard_bytes))
            if not num_samples:
                break
            done.num_samples += num_samples
            done.num_shards += 1
            _write_state(part, task, done, report)
            get_logger().info("%s: %d samples, %d rows left out", path.name, done.num_samples, done.skipped.total())
        _write_state(part, task, done, report)
    if not done.num_samples:
        raise DataError(f"not one row of {source} could be used ({_reasons(done)}); see {part / REPORT_FILE}")
    os.replace(part, out)
    return done


def _cut(samples: Iterator[ShardSample], most_samples: int, most_bytes: int) -> Iterator[ShardSample]:
    """The next samples, up to a number or a size; none is taken that is not given."""
    num_bytes = 0
    for _ in range(most_samples):
        if num_bytes >= most_bytes or (sample := next(samples, None)) is None:
            return
        num_bytes += sum(len(content) for content in sample.members.values())
        yield sample


class _Samples:
    """The good rows as samples, after those that are done; bad ones go to the report."""

    def __init__(
        self, files: list[Path], form: Format, reading: Reading, done: Conversion, report: TextIO, is_strict: bool
    ) -> None:
        self._files, self._form, self._reading = files, form, reading
        self._report, self._is_strict = report, is_strict
        self._ids: set[int] = set()
        self._skip_rows = done.rows_done
        self._done = done

    def __iter__(self) -> Iterator[ShardSample]:
        number = 0
        for file in self._files:
            for row in self._form.rows(file):
                number += 1
                sample = self._sample(row, number)
                if number > self._skip_rows:
                    self._done.rows_done = number
                if sample is not None:
                    yield sample

    def _sample(self, row: Row, number: int) -> ShardSample | None:
        """The row's sample; None where it is bad or was done before. Its id is taken either way, for those to come."""
        is_done = number <= self._skip_rows
        sample_id = None
        try:
            if isinstance(row.tree, RowError):
                raise row.tree
            chat: Chat = self._form.read(row.tree)
            given = chat.id or f"{row.file.name}:{number}"
            sample_id = self._unique(given)
            if is_done:
                return None
            sample, left_out = sample_of(chat, sample_id, f"{number:09d}", row.file, row.split, self._reading)
        except RowError as error:
            if not is_done:
                self._skip(row, sample_id, error)
            return None
        self._done.num_renamed += sample_id != given
        self._done.left_out |= left_out
        return sample

    def _unique(self, given: str) -> str:
        """The id, with a number behind it where an earlier row has it: many sets ask twice about one picture."""
        found, place = given, 1
        while (digest := _digest(found)) in self._ids:
            place += 1
            found = f"{given}#{place}"
        self._ids.add(digest)
        return found

    def _skip(self, row: Row, sample_id: str | None, error: RowError) -> None:
        if self._is_strict:
            raise DataError(f"{row.file} row {row.number}, {error} (reason {error.reason}); mend it, or drop --strict")
        self._done.skipped[error.reason] += 1
        line = {
            "file": str(row.file),
            "row": row.number,
            "id": sample_id,
            "field": error.field,
            "reason": error.reason,
            "detail": error.detail,
        }
        self._report.write(json.dumps(line) + "\n")


def _digest(sample_id: str) -> int:
    """Kept in place of the id: 10^7 of them are no burden."""
    return xxhash.xxh3_64_intdigest(sample_id.encode("utf-8", "surrogatepass"))


def _task(
    source: Path, files: list[Path], form: Format, reading: Reading, samples_per_shard: int, shard_bytes: int
) -> dict[str, Any]:
    """All that decides the shards: what must be the same for a conversion to be continued."""
    listing = hashlib.sha256()  # of a folder of pictures there may be millions
    for file in files:
        stat = file.stat()
        listing.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return {
        "version": VERSION,
        "from": str(source.resolve()),
        "files": {"count": len(files), "digest": listing.hexdigest()},
        "format": form.name,
        "reading": json.loads(json.dumps(asdict(reading), default=str)),
        "samples_per_shard": samples_per_shard,
        "shard_bytes": shard_bytes,
    }


def _resume(part: Path, task: Mapping[str, Any]) -> Conversion:
    """Where an earlier attempt stopped; what it wrote beyond its last whole shard is removed."""
    path = part / STATE_FILE
    saved = json.loads(path.read_bytes()) if path.is_file() else {"task": task, "done": {}}
    changed = [key for key in task if saved["task"].get(key) != task[key]]
    if changed:
        raise DataError(
            f"{part} is an unfinished conversion with another {', '.join(changed)}; remove it to start anew"
        )
    state = saved["done"]
    done = Conversion(
        **{**state, "skipped": Counter(state.get("skipped", {})), "left_out": set(state.get("left_out", ()))}
    )
    whole = {f"shard-{number:06d}.tar" for number in range(done.num_shards)}
    for file in part.glob("shard-*"):
        if file.name not in whole:
            file.unlink()
    if done.rows_done:
        get_logger().info("%s: going on after row %d", part, done.rows_done)
    return done


def _write_state(part: Path, task: Mapping[str, Any], done: Conversion, report: TextIO) -> None:
    report.flush()
    done.report_bytes = report.tell()
    state = {**asdict(done), "skipped": dict(done.skipped), "left_out": sorted(done.left_out)}
    new = part / f"{STATE_FILE}.part"
    new.write_text(json.dumps({"task": task, "done": state}, indent=1), encoding="utf-8")
    os.replace(new, part / STATE_FILE)


def _reasons(done: Conversion) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in done.skipped.most_common()) or "it has no rows"
