"""The same tars found by megatron-energon: its index says where a sample's JSON and media lie.

Energon has no list of lengths, so what is planned comes from our index (``mimo-megatron data index``) and where it is
read from energon's (``energon prepare``); the folder must have both. Invariants: ids, samples, encodings and the plan
are those of ``IndexedSource``; where the two indexes disagree about a file, the sample is refused, never guessed; a
reader belongs to the process that opened it, so pickled and forked sources open their own.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_megatron.config.run import ReadConfig, SourceConfig
from mimo_megatron.data.reading import read_until_right
from mimo_megatron.data.records import Record, SampleError
from mimo_megatron.data.shards import JSON_NAME
from mimo_megatron.data.source import IndexedSource
from mimo_megatron.errors import ConfigError
from mimo_megatron.types import MediaRef

META_FOLDER = ".nv-meta"
INSTALL = 'pip install "mimo-megatron[energon]"'


def prepare_command(folder: Path) -> str:
    """What makes ``folder`` readable by energon. Splits are of no matter to us: our index has them."""
    return f"energon prepare {folder} --non-interactive --sample-type CrudeWebdataset --split-ratio 1,0,0"


def open_source(source: SourceConfig, split: str, reading: ReadConfig | None = None) -> IndexedSource:
    """The source of a recipe, opened by the back end that it names."""
    return (EnergonSource if source.backend == "energon" else IndexedSource)(source.path, split, reading)


class EnergonSource(IndexedSource):
    """One split of a folder that both ``build_index`` and ``energon prepare`` have indexed."""

    def __init__(self, folder: Path, split: str, reading: ReadConfig | None = None) -> None:
        super().__init__(folder, split, reading)
        self._tars = (folder / self._sidecar["shards_folder"]).resolve()
        if not (self._tars / META_FOLDER / "index.sqlite").is_file():
            raise ConfigError(
                f"data.sources: {self._tars} has no {META_FOLDER}/index.sqlite, which backend energon reads; run "
                f"`{prepare_command(self._tars)}`, or set backend=indexed"
            )
        self._opened: tuple[int, Any] = (-1, None)
        store = self._store()
        if missing := sorted(set(self._shards) - set(store.tar_filenames)):
            raise ConfigError(
                f"data.sources: energon's index of {self._tars} knows nothing of {', '.join(missing)}; {self._prepare}"
            )

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "backend": "energon"}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (-1, None)}

    @property
    def _prepare(self) -> str:
        return f"run `{prepare_command(self._tars)} --force-overwrite` again"

    def _store(self) -> Any:
        """Energon's reader of this process: SQLite's connections must not be carried over a fork."""
        if self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open_store(self._tars))
        return self._opened[1]

    def _read_json(self, row: Mapping[str, Any], path: str) -> bytes:
        offset, num_bytes = self._locate(row, path, JSON_NAME, (row["json_offset"], row["json_bytes"]))
        return read_until_right(path, offset, num_bytes, row["json_sha256"], self._reading)

    def _media(self, row: Mapping[str, Any], path: str, record: Record) -> tuple[MediaRef, ...]:
        media = []
        for (kind, name), known in zip(record.media, row["media"], strict=True):
            offset, num_bytes = self._locate(row, path, name, (known["offset"], known["num_bytes"]))
            media.append(MediaRef(kind, path, offset, num_bytes, known["sha256"]))
        return tuple(media)

    def _locate(self, row: Mapping[str, Any], path: str, name: str, known: tuple[int, int]) -> tuple[int, int]:
        """(offset, bytes) of the sample's file ``name`` by energon's index, which must say what ours does."""
        store = self._store()
        try:
            found = store.sqlite_reader.get_sample_part(row["key"], name)
        except KeyError as error:
            raise SampleError(row["id"], "energon", f"energon knows no {name!r} of it; {self._prepare}") from error
        place = (found.raw_byte_offset, found.raw_byte_size)
        shard = store.tar_filenames[found.tar_file_id]
        if shard != row["shard"] or place != known:
            raise SampleError(
                row["id"],
                "energon",
                f"energon has its {name!r} at {place} of {shard}, our index at {known} of {row['shard']}; "
                f"{self._prepare}, or index again",
            )
        return place


def _open_store(folder: Path) -> Any:
    try:
        from megatron.energon.cache.file_store import WebdatasetFileStore
        from megatron.energon.epathlib import EPath
    except ImportError as error:
        raise ConfigError(
            f"data.sources: backend energon needs the package megatron-energon ({error}); run `{INSTALL}`, or set "
            "backend=indexed, which reads the same tars"
        ) from error
    return WebdatasetFileStore(EPath(folder))
