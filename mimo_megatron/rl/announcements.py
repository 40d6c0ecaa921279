"""How a trainer finds what runs on other machines: each service writes a file into a folder that all machines share.

A file holds an address and the token that the address asks for, so only its owner may read it. It appears whole and
goes with its service; one that a killed service left names an address where nothing answers, and is passed over.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mimo_megatron.errors import ConfigError


@contextmanager
def announced(folder: Path, name: str, content: Mapping[str, str]) -> Iterator[Path]:
    """``folder/name`` while the block lasts."""
    path = folder / name
    partial = folder / f".{name}.{socket.gethostname()}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(dict(content), file)
        partial.rename(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; it is where the trainer looks for services") from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def read_announcement(path: Path, keys: tuple[str, ...]) -> dict[str, str] | None:
    """None where there is none. ``ConfigError`` where the file is not of this kind."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; remove it, and start its service again") from error
    if (
        not isinstance(found, dict)
        or set(found) != set(keys)
        or not all(isinstance(one, str) for one in found.values())
    ):
        raise ConfigError(f"{path} announces no service: expected {', '.join(keys)}; remove it")
    return found
