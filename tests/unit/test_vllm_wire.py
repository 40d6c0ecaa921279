"""Frames between trainer and vLLM process: what goes through, what is refused; and what the vLLM side imports."""

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mimo_megatron
from mimo_megatron.rl.engine import vllm_wire as wire


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    one.settimeout(5)
    other.settimeout(5)
    with one, other:
        yield one, other


def raw(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("!IQ", len(header), len(payload)) + header + payload


def test_a_frame_comes_out_as_it_went_in(ends):
    fields = {"key": "k", "kind": "image", "shape": [1, 2, 2, 3], "seconds_per_grid": 0.0}
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    wire.send(ends[0], "media", fields, pixels)
    wire.send(ends[0], "status", {})
    frame = wire.receive(ends[1], wire.CALLS)
    assert frame is not None and frame.kind == "media" and frame.fields == fields
    assert np.array_equal(np.frombuffer(frame.payload, np.uint8), pixels.ravel())
    second = wire.receive(ends[1], wire.CALLS)
    assert second is not None and second.kind == "status" and not second.payload
    ends[0].close()
    assert wire.receive(ends[1], wire.CALLS) is None


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b'{"frame": "unknown"}',
        b'{"frame": ["abort"], "ids": []}',
        b'{"frame": "abort"}',
        b'{"frame": "abort", "ids": [], "more": 1}',
        b'{"frame": "abort", "ids": "x"}',
        b'{"frame": "finish_update", "fields": {}}',
        json.dumps(
            {"frame": "submit", "id": "a", "token_ids": [1], "media": [], "num_responses": True, "max_new_tokens": 1,
             "temperature": 1.0, "seed": 0}
        ).encode(),
    ],
)  # fmt: skip
def test_a_header_of_another_form_is_refused(ends, header):
    ends[0].sendall(raw(header))
    with pytest.raises(wire.WireError):
        wire.receive(ends[1], wire.CALLS)


def test_nothing_larger_than_allowed_is_read(ends):
    ends[0].sendall(struct.pack("!IQ", wire.MAX_HEADER_BYTES + 1, 0))
    with pytest.raises(wire.WireError, match="announced"):
        wire.receive(ends[1], wire.CALLS)
    ends[0].sendall(struct.pack("!IQ", 10, 1))
    with pytest.raises(wire.WireError, match="announced"):
        wire.receive(ends[1], wire.CALLS, wire.MAX_HELLO_BYTES, 0)


@pytest.mark.parametrize("cut", [1, 11, 12, 20, -1])
def test_a_frame_that_ends_in_its_middle_is_an_error_not_an_end(ends, cut):
    whole = raw(b'{"frame":"ok","result":{}}', b"12345678")
    ends[0].sendall(whole[:cut])
    ends[0].close()
    with pytest.raises(wire.WireError, match="ended after"):
        wire.receive(ends[1], wire.ANSWERS)


def test_settings_with_an_unknown_key_are_refused():
    with pytest.raises(wire.WireError, match="settings"):
        wire.read_settings('{"model": "m", "surprise": 1}')


def test_the_vllm_side_imports_nothing_that_only_the_trainer_has(tmp_path):
    """vLLM's environment has torch, numpy, pydantic, safetensors, pillow and xxhash, but no megatron, av or pyarrow."""
    (tmp_path / "mimo_megatron").symlink_to(Path(mimo_megatron.__file__).parent)
    code = (
        "import sys\n"
        "for name in ('megatron', 'av', 'pyarrow', 'rich', 'matplotlib', 'tensorboard'): sys.modules[name] = None\n"
        "import mimo_megatron.rl.sync.receiver, mimo_megatron.rl.engine.vllm_wire, mimo_megatron.types\n"
        "assert not [name for name in sys.modules if name.startswith(('mimo_megatron.mcore', 'mimo_megatron.model'))]\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
