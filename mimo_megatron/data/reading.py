"""Bytes of a stored file, read until they are right: tried again after a pause, then given up with a reason.

Reads are ``pread`` calls on a file opened for each of them: no descriptor is shared, leaks, or outlives a file that was
replaced, and decoding one image takes a thousand times longer. Invariants: what is returned has the length that was
asked for and, with ``verify``, the recorded SHA-256; no number of faults makes a read hang longer than its pauses.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Literal

from mimo_megatron.config.run import ReadConfig
from mimo_megatron.errors import DataError
from mimo_megatron.log import once
from mimo_megatron.types import MediaRef

ReadFault = Literal["missing", "truncated", "changed", "io_error"]

_failing: set[str] = set()
"""Files whose last read was given up. They are tried once a sample until one succeeds: a lost shard of 10,000 samples
would otherwise cost 10,000 times the pauses."""


class ReadError(DataError):
    """Bytes that could not be had; ``reason`` is what a sample is counted under that needed them."""

    def __init__(self, reason: ReadFault, detail: str) -> None:
        super().__init__(detail)
        self.reason: ReadFault = reason


def read_bytes(path: str | Path, offset: int, num_bytes: int) -> bytes:
    """Exactly these bytes of a file, tried once. ``ReadError`` if it is not there, ends before, or cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(file, num_bytes, offset)
            while (
                data and len(data) < num_bytes and (more := os.pread(file, num_bytes - len(data), offset + len(data)))
            ):
                data += more
        finally:
            os.close(file)
    except FileNotFoundError as error:
        raise ReadError("missing", f"{path} does not exist; put it back, or index the folder again") from error
    except OSError as error:
        raise ReadError("io_error", f"{path} cannot be read at offset {offset}: {error.strerror}") from error
    if len(data) != num_bytes:
        detail = f"{path} holds {len(data)} of {num_bytes} bytes at offset {offset}; the file was cut"
        raise ReadError("truncated", detail)
    return data


def read_until_right(path: str, offset: int, num_bytes: int, sha256: str, config: ReadConfig) -> bytes:
    """These bytes of a file, tried ``config.attempts`` times. ``sha256`` is empty where it was never computed."""
    attempts = 1 if path in _failing else config.attempts
    for attempt in range(attempts):
        if attempt:
            time.sleep(config.backoff_seconds * 2 ** (attempt - 1))
        try:
            data = read_bytes(path, offset, num_bytes)
            if config.verify and sha256 and hashlib.sha256(data).hexdigest() != sha256:
                detail = (
                    f"{path} at offset {offset} no longer has SHA-256 {sha256}; run `mimo-megatron data index` again"
                )
                raise ReadError("changed", detail)
        except ReadError as error:
            fault = error
            continue
        _failing.discard(path)
        if attempt:
            once(f"{path}: a read failed ({fault.reason}) and succeeded when it was repeated")
        return data
    _failing.add(path)
    raise fault


def read_media(ref: MediaRef, config: ReadConfig) -> bytes:
    """The bytes of one image or video."""
    return read_until_right(ref.path, ref.offset, ref.num_bytes, ref.sha256, config)
