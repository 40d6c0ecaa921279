"""How the service and its workers talk: four bytes of length, then one JSON object. Nothing else crosses the pipe."""

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
HEADER_BYTES = _LENGTH.size
MAX_FRAME_BYTES = 2 << 20
"""An item of 256 KiB grows to at most six times as much where every sign must be escaped."""


class BadFrame(Exception):
    """Bytes that no worker of ours sends."""


def encode(message: dict[str, Any]) -> bytes:
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    assert len(body) <= MAX_FRAME_BYTES, len(body)
    return _LENGTH.pack(len(body)) + body


def take(buffer: bytearray) -> dict[str, Any] | None:
    """The first whole message, removed from ``buffer``; None while it is incomplete. ``BadFrame`` if it is none."""
    if len(buffer) < HEADER_BYTES:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    if length > MAX_FRAME_BYTES:
        raise BadFrame(f"{length} bytes announced")
    if len(buffer) < HEADER_BYTES + length:
        return None
    body = bytes(buffer[HEADER_BYTES : HEADER_BYTES + length])
    del buffer[: HEADER_BYTES + length]
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadFrame("not JSON") from error
    if not isinstance(message, dict):
        raise BadFrame("not an object")
    return message


def receive(sock: socket.socket, buffer: bytearray) -> dict[str, Any] | None:
    """The next message of a blocking socket; None where the other side has closed it."""
    while (message := take(buffer)) is None:
        if not (more := sock.recv(1 << 16)):
            return None
        buffer += more
    return message
