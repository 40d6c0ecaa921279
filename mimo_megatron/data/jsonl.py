"""Chat samples from a JSONL file, with media as files whose names are relative to it; for scoring and generation.

A line is a record as in a shard (see ``records``): ``{"id": ..., "messages": [...]}``. A bad line is an error that
names the file and line: a list of prompts is short, and an answer that is silently missing is worse than a stop.
"""

from collections.abc import Iterator
from pathlib import Path

from mimo_megatron.data.records import SampleError, parse_record
from mimo_megatron.errors import DataError
from mimo_megatron.types import MediaRef, RawSample


def read_jsonl(path: Path) -> Iterator[RawSample]:
    """The samples of the file in order; a sample without ``id`` is called after its line, ``NAME:LINE``."""
    try:
        lines = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name a JSONL file of samples") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            record = parse_record(line, default_id=place)
            media = []
            for kind, name in record.media:
                file = path.parent / name
                if not file.is_file():
                    raise SampleError(record.id, "media_missing", f"{place} names {name!r}, but {file} does not exist")
                media.append(MediaRef(kind, str(file), 0, file.stat().st_size, ""))
            yield RawSample(record.id, str(path), record.messages, tuple(media), record.meta)
