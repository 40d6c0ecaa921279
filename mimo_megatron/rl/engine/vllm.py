"""The engine ``vllm``: real vLLM in a process of its own, spoken to over a socket (docs/vllm-engine.md).

Nothing of vLLM is imported here. Beside the protocol's invariants: what vLLM's own processor makes of a prompt equals
what the trainer has, in every expanded id and every pixel, else ``EngineError``; a process that is gone, or says
nothing for too long, is an ``EngineLostError``, never a wait without end.
"""

import contextlib
import json
import select
import socket
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.rl import VllmConfig
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.errors import EngineError, EngineLostError, SyncError
from mimo_megatron.rl.engine import vllm_wire as wire
from mimo_megatron.rl.engine.engine_media import SentMedium, collapse, frames_of, sent_media
from mimo_megatron.rl.engine.protocol import GenerationRequest
from mimo_megatron.rl.engine.vllm_start import EngineProcess, start_process
from mimo_megatron.rl.sync.buckets import Bucket, Manifest
from mimo_megatron.rl.sync.shared_memory import LocalBuckets
from mimo_megatron.types import EncodedSample, Rollout

START_SECONDS = 600.0
"""Start of the process: 25 s for a tiny model on 2 idle cores; a 7B model's memory has to be filled."""
CALL_SECONDS = 600.0
"""Longest answer; the first pass of vLLM on a CPU takes up to 40 s."""
HELLO_SECONDS = 10.0
"""An engine that serves another trainer does not answer."""
_PIXELS_KEPT_BYTES = 1 << 30
"""Pixels that an engine keeps for prompts to come."""


class VllmEngine:
    """A ``RolloutEngine``. ``VllmEngine.start`` on this machine, ``VllmEngine.connect`` to one that runs elsewhere."""

    def __init__(
        self,
        model: ModelConfig,
        address_file: Path,
        process: EngineProcess | None = None,
        memory: LocalBuckets | None = None,
    ) -> None:
        self._model = model
        self._process = process
        self._memory = memory
        self.is_closed = False
        self._socket, self._max_tokens = _connected(address_file, self._lost)
        self._version: int | None = None
        self._coming: int | None = None
        self._missing: dict[str, int] = {}
        """Responses that each request still owes."""
        self._finished: list[Rollout] = []
        self._sent_bytes: dict[str, int] = {}
        """Pixels that the engine holds, by key, oldest first."""
        self._heard = time.monotonic()
        if memory is not None:
            self._call("open_memory", {"path": str(memory.path)})

    @classmethod
    def start(
        cls,
        model: ModelConfig,
        encoding: EncodingConfig,
        config: VllmConfig,
        *,
        dtype: torch.dtype = torch.float32,
        max_sequences: int = 64,
        memory: LocalBuckets | None = None,
    ) -> "VllmEngine":
        """A vLLM of this machine without weights: its gate opens after the first update. It ends with ``close``.
        Weights come through ``memory``, or without one through the socket."""
        process = start_process(model, encoding, config, dtype=dtype, max_sequences=max_sequences)
        try:
            process.wait_until_ready(START_SECONDS)
            return cls(model, process.address_file, process, memory)
        except BaseException:
            process.popen.kill()
            process.end()
            raise

    @classmethod
    def connect(cls, model: ModelConfig, address_file: Path) -> "VllmEngine":
        """The engine that wrote ``address_file``; it stays when this connection ends, with its gate closed."""
        return cls(model, address_file)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.popen.pid

    @property
    def policy_version(self) -> int | None:
        return self._version

    @property
    def num_running(self) -> int:
        return sum(self._missing.values()) + len(self._finished)

    def submit(self, request: GenerationRequest) -> None:
        """Begin a group. ``EngineError`` also where vLLM reads the prompt otherwise than the trainer."""
        if self._version is None:
            raise EngineError(f"request {request.id!r}: the gate is closed; send weights and open it first")
        if request.id in self._missing:
            raise EngineError(f"request {request.id!r} runs already; give each an id of its own")
        if request.temperature not in (0.0, 1.0):
            raise EngineError(
                f"request {request.id!r}: temperature {request.temperature}; vLLM reports log-probabilities at the "
                "temperature it samples at: another policy than at 1; only 1 and, for evaluation, 0 are taken"
            )
        self._check_fits(request.prompt, request.max_new_tokens)
        prompt = self._send_prompt(request.prompt)
        report, _ = self._call(
            "submit",
            {
                **prompt,
                "id": request.id,
                "num_responses": request.num_responses,
                "max_new_tokens": request.max_new_tokens,
                "temperature": float(request.temperature),
                "seed": request.seed,
            },
        )
        self._missing[request.id] = request.num_responses
        try:
            check_report(request.prompt, report)
        except EngineError:
            self.abort([request.id])
            raise

    def abort(self, request_ids: Collection[str]) -> None:
        self._call("abort", {"ids": list(request_ids)})
        for request_id in request_ids:
            self._missing.pop(request_id, None)
        self._finished = [one for one in self._finished if one.request_id not in request_ids]

    def poll(self, seconds: float) -> list[Rollout]:
        deadline = time.monotonic() + seconds
        while self._is_readable(0.0 if self._finished else max(0.0, deadline - time.monotonic())):
            self._take(self._receive())
        if self._missing and time.monotonic() - self._heard > CALL_SECONDS:
            raise self._lost(f"vLLM has {self.num_running} responses to make and was silent for {CALL_SECONDS:.0f} s")
        finished, self._finished = self._finished, []
        return finished

    def logprobs(self, samples: list[EncodedSample]) -> list[NDArray[np.float32]]:
        """[T - 1] of each sample, over the whole vocabulary, by a prefill that reads no cache of prefixes."""
        found = []
        for sample in samples:
            self._check_fits(sample, 1)
            report, payload = self._call("logprobs", self._send_prompt(sample))
            check_report(sample, report)
            found.append(np.frombuffer(payload, np.float32))
        return found

    def begin_update(self, manifest: Manifest) -> None:
        if self.num_running:
            raise SyncError(f"{self.num_running} responses are being sampled; abort them before an update")
        self._version = None
        self._coming = manifest.version
        if self._memory is not None:
            self._memory.begin()
        self._call("begin_update", {"manifest": manifest.to_json().decode()})

    def receive(self, bucket: Bucket) -> None:
        if self._memory is None:
            self._call("bucket", {"header": bucket.header.to_json().decode()}, bucket.data.numpy())
        else:
            self._call("slot", {"notice": self._memory.notice(bucket).to_json().decode()})

    def finish_update(self) -> None:
        self.last_update, _ = self._call("finish_update", {})

    def open_gate(self) -> None:
        self._call("open_gate", {})
        self._version = self._coming

    def status(self) -> Mapping[str, Any]:
        """What the process says of itself: num_running, num_unfinished (vLLM's own count), version, media."""
        return self._call("status", {})[0]

    def close(self) -> None:
        self.is_closed = True
        with contextlib.suppress(EngineError):
            if self._process is not None and self._process.popen.poll() is None:
                self._call("close", {})
        self._socket.close()
        if self._process is not None:
            self._process.end()

    def _check_fits(self, prompt: EncodedSample, num_new: int) -> None:
        if prompt.num_tokens + num_new > self._max_tokens:
            raise EngineError(
                f"sample {prompt.id!r}: a prompt of {prompt.num_tokens} tokens and {num_new} new ones do not fit in "
                f"the engine's {self._max_tokens}; prompts are never cut: raise rl.vllm.max_model_len or drop it"
            )

    def _send_prompt(self, sample: EncodedSample) -> dict[str, Any]:
        """The prompt as vLLM takes it, after its pixels, which go once."""
        media = sent_media(sample)
        for one in media:
            if one.key not in self._sent_bytes:
                self._send_pixels(one)
        self._forget_old({one.key for one in media})
        return {"token_ids": collapse(sample, self._model), "media": [one.key for one in media]}

    def _send_pixels(self, one: SentMedium) -> None:
        frames = np.ascontiguousarray(frames_of(one.media, self._model))
        fields = {
            "key": one.key,
            "kind": one.media.kind,
            "shape": list(frames.shape),
            "seconds_per_grid": float(one.media.seconds_per_grid),
        }
        self._call("media", fields, frames)
        self._sent_bytes[one.key] = frames.nbytes

    def _forget_old(self, needed: Collection[str]) -> None:
        old = []
        excess = sum(self._sent_bytes.values()) - _PIXELS_KEPT_BYTES
        for key, num_bytes in self._sent_bytes.items():
            if excess <= 0:
                break
            if key not in needed:
                old.append(key)
                excess -= num_bytes
        if old:
            self._call("forget", {"keys": old})
        for key in old:
            del self._sent_bytes[key]

    def _call(self, kind: str, fields: Mapping[str, Any], payload: Any = b"") -> tuple[dict[str, Any], bytearray]:
        """The answer; responses that come before it are kept for ``poll``."""
        deadline = time.monotonic() + CALL_SECONDS
        try:
            wire.send(self._socket, kind, fields, payload)
        except OSError as fault:
            raise self._lost(f"vLLM could not be asked to {kind}: {fault}") from fault
        while True:
            if not self._is_readable(max(0.0, deadline - time.monotonic())):
                raise self._lost(f"vLLM did not answer {kind!r} within {CALL_SECONDS:.0f} s")
            frame = self._receive()
            if frame.kind == "ok":
                return frame.fields["result"], frame.payload
            if frame.kind == "refused":
                error = SyncError if frame.fields["error"] == "SyncError" else EngineError
                raise error(f"vLLM refused {kind}: {frame.fields['message']}")
            self._take(frame)

    def _take(self, frame: wire.Frame) -> None:
        if frame.kind == "alive":
            return
        if frame.kind != "finished":
            raise self._lost(f"vLLM said {frame.kind!r} where it was not asked")
        one = _rollout(frame)
        if self._missing.get(one.request_id, 0) > 0:  # else it was aborted meanwhile
            self._missing[one.request_id] -= 1
            if not self._missing[one.request_id]:
                del self._missing[one.request_id]
            self._finished.append(one)

    def _is_readable(self, seconds: float) -> bool:
        return bool(select.select([self._socket], [], [], seconds)[0])

    def _receive(self) -> wire.Frame:
        try:
            frame = wire.receive(self._socket, wire.ANSWERS)
        except (OSError, wire.WireError) as fault:
            raise self._lost(f"the connection to vLLM failed: {fault}") from fault
        if frame is None:
            raise self._lost("vLLM ended its connection")
        self._heard = time.monotonic()
        return frame

    def _lost(self, what: str) -> EngineLostError:
        """The gate is closed for good."""
        self._version = None
        if self._process is None:
            return EngineLostError(f"{what}; look at its log, and start another")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.popen.wait(1.0)
        code = self._process.popen.poll()
        state = "still runs" if code is None else f"ended with code {code}"
        return EngineLostError(f"{what}; its process {state}; its last lines:\n{self._process.last_words()}")


def check_report(sample: EncodedSample, report: Mapping[str, Any]) -> None:
    """``EngineError`` where what vLLM made of a prompt is not what the trainer has."""
    if report["num_tokens"] != sample.num_tokens:
        raise EngineError(
            f"sample {sample.id!r}: vLLM expands the prompt to {report['num_tokens']} tokens, the trainer to "
            f"{sample.num_tokens}; their image processors or placeholders differ"
        )
    if report["ids_hash"] != wire.ids_hash(sample.token_ids_T):
        raise EngineError(f"sample {sample.id!r}: vLLM expands the prompt to as many, but other, tokens")
    pixels: dict[str, list[str]] = {}
    for one in sent_media(sample):
        pixels.setdefault(one.media.kind, []).append(one.pixels)
    if report["pixels"] != pixels:
        raise EngineError(
            f"sample {sample.id!r}: vLLM's encoder would read other pixels ({report['pixels']}) than the trainer's "
            f"({pixels}); compare the two image processors"
        )
    seconds = [float(np.float32(one.seconds_per_grid)) for one in sample.media if one.kind == "video"]
    if report["seconds"] != seconds:
        raise EngineError(
            f"sample {sample.id!r}: the steps of its videos last {report['seconds']} s in vLLM, {seconds} s in the "
            "trainer; sample them at another rate"
        )


def _rollout(frame: wire.Frame) -> Rollout:
    fields, num_tokens = frame.fields, frame.fields["num_tokens"]
    if len(frame.payload) != 12 * num_tokens or fields["reason"] not in ("stop", "length"):
        raise EngineError(f"a response of {num_tokens} tokens came as {len(frame.payload)} bytes: {fields['reason']!r}")
    return Rollout(
        fields["id"],
        fields["index"],
        np.frombuffer(frame.payload, np.int64, num_tokens),
        np.frombuffer(frame.payload, np.float32, num_tokens, 8 * num_tokens),
        np.full(num_tokens, fields["version"], np.int64),
        cast(Literal["stop", "length"], fields["reason"]),
    )


def _connected(address_file: Path, lost: Any) -> tuple[socket.socket, int]:
    """A connection that knows the token, and the engine's longest sequence."""
    found = json.loads(address_file.read_text())
    kind, _, rest = found["address"].partition(":")
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    sock.settimeout(HELLO_SECONDS)
    try:
        if kind == "unix":
            sock.connect(rest)
        else:
            host, _, port = rest.rpartition(":")
            sock.connect((host, int(port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.send(sock, "hello", {"token": found["token"]})
        frame = wire.receive(sock, wire.ANSWERS)
    except (OSError, wire.WireError) as fault:
        sock.close()
        raise lost(f"vLLM at {found['address']} cannot be reached: {fault}") from fault
    if frame is None or frame.kind != "ok":
        raise lost(f"vLLM at {found['address']} does not take the token of {address_file}")
    sock.settimeout(CALL_SECONDS)
    wire.keep_alive(sock)
    return sock, frame.fields["result"]["max_model_len"]
