"""Frames decoded from their key frames on against a full decode, bit for bit, and how many packets that takes."""

import io
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mimo_megatron.data import video_packets
from mimo_megatron.data.video_packets import decode, list_packets
from mimo_megatron.errors import DataError

NUM_FRAMES = 60
CLIPS = {
    "H.264, closed groups": ("a.mp4", "libx264", {"g": "12", "bf": "3"}),
    "H.264, open groups": ("a.mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "H.264, one group": ("a.mp4", "libx264", {"g": "1000", "bf": "2"}),
    "H.264, key frames only": ("a.mp4", "libx264", {"g": "1"}),
    "H.264 in Matroska": ("a.mkv", "libx264", {"g": "9", "bf": "2"}),
    "MPEG-4": ("a.mp4", "mpeg4", {"g": "10", "bf": "2"}),
    "HEVC, open groups": ("a.mp4", "libx265", {"x265-params": "keyint=12:min-keyint=12:open-gop=1:log-level=none"}),
    "VP9": ("a.webm", "libvpx-vp9", {"g": "10", "lag-in-frames": "0", "cpu-used": "8", "deadline": "realtime"}),
    "VP9, hidden frames": ("a.webm", "libvpx-vp9", {"g": "20", "lag-in-frames": "12", "auto-alt-ref": "1"}),
    "H.264 in AVI": ("a.avi", "libx264", {"g": "12", "bf": "2"}),
    "MPEG-4 in AVI": ("a.avi", "mpeg4", {"g": "12", "bf": "2"}),
}


@lru_cache
def clip(kind: str, is_uneven: bool = False) -> bytes:
    """A texture that moves and changes, so that every frame differs from every other."""
    name, codec, options = CLIPS[kind]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (12, 48, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    times = np.cumsum(rng.integers(1, 9, NUM_FRAMES)) if is_uneven else np.arange(NUM_FRAMES)
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            for number, time in enumerate(times.tolist()):
                pixels = np.roll(texture, -4 * number, axis=1)[:64, :96] // 2 + 2 * number
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels, np.uint8), format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 25)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path.read_bytes()


@lru_cache
def all_frames(kind: str, is_uneven: bool = False) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(clip(kind, is_uneven))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_frames_are_those_of_a_full_decode(kind: str, frames: Sequence[int], is_uneven: bool = False) -> None:
    data = clip(kind, is_uneven)
    got = [(number, one.to_ndarray(format="rgb24")) for number, one in decode(data, list_packets(data), frames)]
    assert [number for number, _ in got] == sorted(set(frames))
    for number, pixels in got:
        np.testing.assert_array_equal(pixels, all_frames(kind, is_uneven)[number], err_msg=f"{kind}, frame {number}")


@pytest.mark.parametrize("kind", CLIPS)
def test_every_frame_alone_is_that_of_a_full_decode(kind: str) -> None:
    for number in range(NUM_FRAMES):
        assert_frames_are_those_of_a_full_decode(kind, [number])


@settings(max_examples=60)
@given(st.sampled_from([*CLIPS]), st.sets(st.integers(0, NUM_FRAMES - 1), min_size=1))
def test_any_frames_together_are_those_of_a_full_decode(kind: str, frames: set[int]) -> None:
    assert_frames_are_those_of_a_full_decode(kind, [*frames])


@pytest.mark.parametrize("kind", ["H.264, open groups", "VP9", "MPEG-4"])
def test_frames_of_uneven_times_are_those_of_a_full_decode(kind: str) -> None:
    assert_frames_are_those_of_a_full_decode(kind, [0, 11, 12, 13, 30, 47, 59], is_uneven=True)
    assert len(np.unique(np.diff(list_packets(clip(kind, True)).times_F).round(3))) > 4


def test_decoding_from_the_last_key_frame_in_file_order_would_give_other_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In open groups, pictures that come after a key frame and are shown before it refer to the group before."""

    def nearest(self: video_packets.PacketList, frame: int) -> int:
        assert self.frame_ticks_F is not None
        own = np.flatnonzero(self.ticks_N == self.frame_ticks_F[frame])[0]
        return int(np.flatnonzero(self.is_key_N[: own + 1])[-1])

    test_every_frame_alone_is_that_of_a_full_decode("H.264, open groups")
    monkeypatch.setattr(video_packets.PacketList, "first_packet", nearest)
    with pytest.raises(AssertionError):
        test_every_frame_alone_is_that_of_a_full_decode("H.264, open groups")


@pytest.mark.parametrize(("kind", "most"), [("H.264, closed groups", 24), ("VP9", 20), ("H.264, one group", 61)])
def test_only_packets_of_the_groups_of_wanted_frames_are_decoded(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[av.Packet] = []
    plain = video_packets._decoded
    monkeypatch.setattr(video_packets, "_decoded", lambda packet: decoded.append(packet) or plain(packet))
    assert_frames_are_those_of_a_full_decode(kind, [5, 59])
    assert most // 2 <= len(decoded) <= most


def test_damage_never_raises_anything_but_a_data_error() -> None:
    rng, refused = np.random.default_rng(1), 0
    for kind in 25 * ["H.264, open groups", "VP9", "MPEG-4"]:
        whole = clip(kind)
        data = bytearray(whole[: rng.integers(len(whole) // 3, len(whole))] if rng.random() < 0.3 else whole)
        start = int(rng.integers(len(data)))
        data[start : start + 200] = rng.bytes(len(data[start : start + 200]))
        try:
            packets = list_packets(bytes(data))
            for _ in decode(bytes(data), packets, [0, len(packets.times_F) - 1]):
                pass
        except DataError:
            refused += 1
    assert refused > 5
