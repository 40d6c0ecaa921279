"""The vLLM process: one engine, one connection, one thread.

``python -m mimo_megatron.rl.engine.vllm_process SETTINGS.json`` in vLLM's environment; ``rl/engine/vllm.py`` starts it.
Between two passes of the model every call that has come is answered, so an answer takes at most a pass.
"""

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mimo_megatron.errors import EngineError, MimoError, SyncError
from mimo_megatron.lifetime import end_with_parent
from mimo_megatron.rl.engine import vllm_wire as wire
from mimo_megatron.rl.engine.vllm_offline import Finished, Medium, OfflineEngine
from mimo_megatron.rl.sync.buckets import BucketHeader, Manifest
from mimo_megatron.rl.sync.shared_memory import SlotNotice, SlotReader

_ALIVE_SECONDS = 1.0
_HELLO_SECONDS = 10.0
_OWNER_SECONDS = 60.0
"""Without a call from its owner by then the process ends: the owner is gone."""
_GATHER_SECONDS = 0.002
"""After a call, wait so long for the next before a pass: groups are submitted in bursts."""
_MAX_PIXEL_BYTES = 1 << 30


def main() -> None:
    settings = wire.read_settings(Path(sys.argv[1]).read_text())
    end_with_parent(settings.parent)
    engine = OfflineEngine(settings)
    listener, address = _listen(settings.listen)
    token = secrets.token_hex(32)
    _announce(Path(settings.address_file), {"address": address, "token": token})
    if settings.is_owned:
        listener.settimeout(_OWNER_SECONDS)
    while True:
        connection, _ = listener.accept()
        with connection:
            if _is_welcome(connection, token, settings):
                is_closed = _Session(engine, connection).serve()
                if is_closed or settings.is_owned:
                    return


class _Session:
    """A trainer's connection. When it ends, whatever was asked ends, and the gate is closed."""

    def __init__(self, engine: OfflineEngine, connection: socket.socket) -> None:
        self.engine = engine
        self.connection = connection
        self.said = time.monotonic()

    def serve(self) -> bool:
        """True where the trainer asked for the engine's end; False where the connection went."""
        try:
            while True:
                wait = 0.0 if self.engine.num_running else None
                while self._is_readable(wait):
                    frame = wire.receive(self.connection, wire.CALLS)
                    if frame is None:
                        return False
                    if frame.kind == "close":
                        self._send("ok", {"result": {}})
                        return True
                    self._answer(frame)
                    wait = _GATHER_SECONDS if self.engine.num_running else None
                for one in self.engine.step():
                    self._send_response(one)
                if time.monotonic() - self.said > _ALIVE_SECONDS:
                    self._send("alive", {"num_running": self.engine.num_running})
        except (OSError, wire.WireError) as fault:
            print(f"the connection failed: {fault}", file=sys.stderr)
            return False
        finally:
            self.engine.abort_all()
            self.engine.forget_trainer()

    def _is_readable(self, seconds: float | None) -> bool:
        return bool(select.select([self.connection], [], [], seconds)[0])

    def _answer(self, frame: wire.Frame) -> None:
        """``refused`` for what the call got wrong; anything else ends this process, and the trainer notices."""
        try:
            result, payload = _call(self.engine, frame)
        except (EngineError, ValueError) as fault:  # vLLM's complaints about a request are ValueErrors
            self._send("refused", {"error": type(fault).__name__, "message": str(fault)})
        else:
            self._send("ok", {"result": result}, payload)

    def _send(self, kind: str, fields: dict[str, Any], payload: Any = b"") -> None:
        wire.send(self.connection, kind, fields, payload)
        self.said = time.monotonic()

    def _send_response(self, one: Finished) -> None:
        fields = {
            "id": one.request_id,
            "index": one.index,
            "num_tokens": len(one.token_ids_T),
            "version": one.version,
            "reason": one.reason,
        }
        self._send("finished", fields, one.token_ids_T.tobytes() + one.logprobs_T.tobytes())


def _call(engine: OfflineEngine, frame: wire.Frame) -> tuple[dict[str, Any], bytes]:
    """(result, payload) of the answer."""
    fields = dict(frame.fields)
    match frame.kind:
        case "media":
            engine.add_medium(fields["key"], _medium(fields, frame.payload))
        case "forget":
            engine.forget_media(fields["keys"])
        case "submit":
            return engine.submit(fields.pop("id"), **fields), b""
        case "abort":
            engine.abort(fields["ids"])
        case "logprobs":
            report, logprobs = engine.logprobs(**fields)
            return report, logprobs.tobytes()
        case "begin_update":
            engine.begin_update(Manifest.from_json(fields["manifest"].encode()))
        case "bucket":
            if not frame.payload:
                raise SyncError("a bucket came without bytes")
            data = torch.frombuffer(frame.payload, dtype=torch.uint8)
            engine.receive(BucketHeader.from_json(fields["header"].encode()).with_data(data))
        case "open_memory":
            engine.memory = SlotReader(Path(fields["path"]))
        case "slot":
            if engine.memory is None:
                raise SyncError("no memory was opened in which the bucket could lie")
            lent = engine.memory.read(SlotNotice.from_json(fields["notice"].encode()))
            # Copied, since vLLM may keep tensors until their layer is complete, and the slot is written again.
            engine.receive(lent.header.with_data(lent.data.clone()))
        case "finish_update":
            return dict(engine.finish_update()), b""
        case "open_gate":
            engine.open_gate()
        case "status":
            return engine.status(), b""
        case kind:
            raise EngineError(f"{kind!r} is not said here")
    return {}, b""


def _medium(fields: dict[str, Any], payload: bytearray) -> Medium:
    shape = fields["shape"]
    if len(shape) != 4 or any(type(size) is not int or size <= 0 for size in shape) or shape[3] != 3:
        raise EngineError(f"pixels of the shape {shape}; expected frames, height, width, 3")
    if int(np.prod(shape)) != len(payload) or len(payload) > _MAX_PIXEL_BYTES:
        raise EngineError(f"{len(payload)} bytes of pixels for the shape {shape}")
    if fields["kind"] not in ("image", "video") or (fields["kind"] == "image" and shape[0] != 1):
        raise EngineError(f"{shape[0]} frames of a {fields['kind']!r}")
    return Medium(fields["kind"], np.frombuffer(payload, np.uint8).reshape(shape), fields["seconds_per_grid"])


def _is_welcome(connection: socket.socket, token: str, settings: wire.EngineSettings) -> bool:
    """Whether the first frame, which must come soon and be small, brings the token."""
    connection.settimeout(_HELLO_SECONDS)
    try:
        hello = {"hello": wire.CALLS["hello"]}
        frame = wire.receive(connection, hello, wire.MAX_HELLO_BYTES, max_payload_bytes=0)
        if frame is None or not hmac.compare_digest(frame.fields["token"].encode(), token.encode()):
            return False
        wire.send(connection, "ok", {"result": {"max_model_len": settings.max_model_len}})
    except (OSError, wire.WireError):
        return False
    connection.settimeout(None)
    wire.keep_alive(connection)
    return True


def _listen(where: str) -> tuple[socket.socket, str]:
    kind, _, rest = where.partition(":")
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(rest)
        Path(rest).chmod(0o600)
        listener.listen(1)
        return listener, where
    host, _, port = rest.rpartition(":")
    listener = socket.create_server((host, int(port)))
    return listener, f"tcp:{host}:{listener.getsockname()[1]}"


def _announce(path: Path, content: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
    partial.rename(path)


if __name__ == "__main__":
    try:
        main()
    except MimoError as fault:
        sys.exit(f"{type(fault).__name__}: {fault}")
