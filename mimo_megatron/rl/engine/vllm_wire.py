"""What the trainer and a vLLM process say to each other: frames of one JSON object of known keys, then raw bytes.

Both sides import this file, and the vLLM side has few packages: no imports beyond the standard library, numpy, torch,
xxhash. Nothing is unpickled. A frame that is not of the form below is refused with ``WireError``, and the connection
is of no more use.

Calls go one at a time and are answered in order by ``ok`` or ``refused``. Between answers the engine sends ``finished``
for each response, as soon as it is complete, and ``alive`` about once a second while it computes.
"""

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_LENGTHS = struct.Struct("!IQ")
MAX_HEADER_BYTES = 16 << 20
"""A prompt of a million tokens has less."""
MAX_PAYLOAD_BYTES = 16 << 30
"""The largest bucket is one tensor; of a 70B model the embedding has 2.5 GB."""
MAX_HELLO_BYTES = 4096
"""Before the token has been seen, nothing larger is read."""

CALLS: dict[str, dict[str, type]] = {
    "hello": {"token": str},
    "media": {"key": str, "kind": str, "shape": list, "seconds_per_grid": float},
    "forget": {"keys": list},
    "submit": {
        "id": str, "token_ids": list, "media": list, "num_responses": int, "max_new_tokens": int, "temperature": float,
        "seed": int,
    },
    "abort": {"ids": list},
    "logprobs": {"token_ids": list, "media": list},
    "begin_update": {"manifest": str},
    "bucket": {"header": str},
    "open_memory": {"path": str},
    "slot": {"notice": str},
    "finish_update": {},
    "open_gate": {},
    "status": {},
    "close": {},
}  # fmt: skip
ANSWERS: dict[str, dict[str, type]] = {
    "ok": {"result": dict},
    "refused": {"error": str, "message": str},
    "finished": {"id": str, "index": int, "num_tokens": int, "version": int, "reason": str},
    "alive": {"num_running": int},
}


class WireError(Exception):
    """Bytes that the other side of this program does not send, or a connection that ended inside a frame."""


@dataclass(frozen=True)
class Frame:
    kind: str
    fields: Mapping[str, Any]
    payload: bytearray


def keep_alive(sock: socket.socket) -> None:
    """End the connection where the other side's machine is gone, after about two minutes; a Unix socket needs none."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def send(sock: socket.socket, kind: str, fields: Mapping[str, Any], payload: Any = b"") -> None:
    """``payload`` is anything with a buffer of bytes."""
    header = json.dumps({"frame": kind, **fields}, allow_nan=False, separators=(",", ":")).encode()
    view = memoryview(payload).cast("B")
    sock.sendall(_LENGTHS.pack(len(header), len(view)) + header)
    if len(view):
        sock.sendall(view)


def receive(
    sock: socket.socket,
    forms: Mapping[str, Mapping[str, type]],
    max_header_bytes: int = MAX_HEADER_BYTES,
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
) -> Frame | None:
    """The next frame; None where the other side closed the connection between two frames."""
    lengths = _read(sock, _LENGTHS.size, may_end=True)
    if lengths is None:
        return None
    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    if header_bytes > max_header_bytes or payload_bytes > max_payload_bytes:
        raise WireError(f"a frame of {header_bytes} and {payload_bytes} bytes was announced")
    header, payload = _read(sock, header_bytes), _read(sock, payload_bytes)
    assert header is not None and payload is not None
    kind, fields = _checked(header, forms)
    return Frame(kind, fields, payload)


def _read(sock: socket.socket, num_bytes: int, may_end: bool = False) -> bytearray | None:
    data = bytearray(num_bytes)
    view = memoryview(data)
    done = 0
    while done < num_bytes:
        got = sock.recv_into(view[done:])
        if not got:
            if may_end and not done:
                return None
            raise WireError(f"the connection ended after {done} of {num_bytes} bytes")
        done += got
    return data


def _checked(header: bytearray, forms: Mapping[str, Mapping[str, type]]) -> tuple[str, dict[str, Any]]:
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError) as fault:
        raise WireError("a header is not JSON") from fault
    if not isinstance(fields, dict) or not isinstance(kind := fields.pop("frame", None), str) or kind not in forms:
        raise WireError("a frame of no known kind")
    form = forms[kind]
    if set(fields) != set(form) or any(type(fields[name]) is not wanted for name, wanted in form.items()):
        raise WireError(f"a frame {kind!r} has the fields {sorted(fields)}, expected {sorted(form)} of their types")
    return kind, fields


def pixels_hash(patches_PC: NDArray[np.uint8]) -> str:
    """XXH3-128 of the patches' bytes, hexadecimal: equal where both sides feed the encoder the same pixels."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(patches_PC).data)


def ids_hash(token_ids: NDArray[np.int64]) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(token_ids, dtype=np.int64).data)


@dataclass(frozen=True)
class EngineSettings:
    """All that a vLLM process is told at its start, as the JSON file that is its only argument."""

    model: str
    """A folder with a model's configuration and tokenizer, without weights: those come with the first update."""
    trained_model: dict[str, Any]
    """The trainer's own description of the model, by whose rule positions are counted."""
    tensors: str
    """A manifest as JSON: the tensors that an update must bring (its version has no meaning)."""
    listen: str
    """``unix:PATH`` or ``tcp:HOST:PORT`` (port 0: any)."""
    address_file: str
    """Appears, with address and token and for its owner's eyes only, when the engine can be called."""
    dtype: str
    """float32 or bfloat16."""
    max_model_len: int
    max_sequences: int
    kv_cache_bytes: int
    banned: list[int]
    """Tokens that are never sampled."""
    ends: list[int]
    """The tokens that end a response; the one that does stays in it."""
    is_owned: bool
    """End when the trainer's connection ends; else close the gate and wait for another."""
    parent: int
    """The process that starts it, and that it ends with."""


def read_settings(text: str) -> EngineSettings:
    """``WireError`` where the file is not one that ``start_engine`` writes."""
    try:
        return EngineSettings(**json.loads(text))
    except (TypeError, ValueError) as fault:
        raise WireError(f"not the settings of an engine: {fault}") from fault
