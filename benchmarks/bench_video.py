"""A long clip: frames decoded from their key frames on, beside a decode of everything before the last wanted frame.

    python benchmarks/bench_video.py
    python benchmarks/bench_video.py --minutes 4 --frames 34     # as many to a minute, in less time

The clip is a picture that moves over the demo's photographs, 25 frames a second, coded here with a key frame every 2
seconds (as streamed video has them) and every 10 (x264's own choice); 256 frames of it are wanted, as MiMo-VL's
evaluation takes of half an hour. Both ways resize alike and give equal patches. CPU seconds of one thread.
"""

import argparse
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import av
import numpy as np
from PIL import Image
from provenance import write_rows

from examples.quickstart.assets import load_assets
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import VideoConfig
from mimo_megatron.data import video, video_packets

VISION = preset("mimo-vl-7b").vision
assert VISION is not None
FRAMES_PER_SECOND = 25
HEIGHT, WIDTH = 108, 192
MIN_PIXELS = 3136


def clip(minutes: float, seconds_between_keys: int) -> bytes:
    photos = [np.asarray(Image.fromarray(one).resize((640, 360))) for one in load_assets("train").photos]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w") as out:
            keys = {"g": str(seconds_between_keys * FRAMES_PER_SECOND), "bf": "2", "preset": "veryfast"}
            stream = out.add_stream("libx264", rate=FRAMES_PER_SECOND, options=keys)
            stream.height, stream.width, stream.pix_fmt, stream.thread_count = HEIGHT, WIDTH, "yuv420p", 1
            for number in range(round(minutes * 60 * FRAMES_PER_SECOND)):
                shot, moved = divmod(number, 100)
                pixels = photos[shot % len(photos)][moved : moved + HEIGHT, 2 * moved : 2 * moved + WIDTH]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path.read_bytes()


def counted(read: Callable[[], Any]) -> tuple[Any, int, float]:
    """(what it gave, packets decoded, CPU seconds)"""
    decoded, plain = 0, video_packets._decoded

    def count(packet: av.Packet) -> list[av.VideoFrame]:
        nonlocal decoded
        decoded += 1
        return plain(packet)

    video_packets._decoded = count
    try:
        start = time.process_time()
        result = read()
        return result, decoded, time.process_time() - start
    finally:
        video_packets._decoded = plain


def from_the_start(read: Callable[[], Any]) -> Callable[[], Any]:
    """The same reading, with the first packet for every frame's key frame."""

    def patched() -> Any:
        plain = video_packets.PacketList.first_packet
        video_packets.PacketList.first_packet = lambda _self, _frame: 0  # type: ignore[method-assign]
        try:
            return read()
        finally:
            video_packets.PacketList.first_packet = plain  # type: ignore[method-assign]

    return patched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--frames", type=int, default=256, help="frames wanted")
    parser.add_argument("--out", type=Path, help="CSV file; benchmarks/results/ by default")
    args = parser.parse_args()
    settings = VideoConfig(max_frames=args.frames)
    rows = []
    for seconds in (2, 10):
        data = clip(args.minutes, seconds)
        with av.open(io.BytesIO(data)) as container:
            num_frames = container.streams.video[0].frames
        read = lambda data=data: video.encode_video(data, VISION, settings, min_pixels=MIN_PIXELS)  # noqa: E731
        whole, all_packets, slow = counted(from_the_start(read))
        ours, packets, fast = counted(read)
        assert np.array_equal(ours.pixels_PZ, whole.pixels_PZ) and ours.grid == whole.grid
        start = time.process_time()
        video.video_grid(data, VISION, settings, min_pixels=MIN_PIXELS)
        listing = time.process_time() - start
        rows.append(
            dict(
                minutes=args.minutes,
                megabytes=f"{len(data) / 1e6:.1f}",
                frames=num_frames,
                wanted=2 * ours.grid[0],
                seconds_between_key_frames=seconds,
                decoded_from_the_start=all_packets,
                decoded_by_ours=packets,
                cpu_seconds_from_the_start=f"{slow:.2f}",
                cpu_seconds_of_ours=f"{fast:.2f}",
                of_which_listing_packets=f"{listing:.2f}",
                ratio=f"{slow / fast:.2f}",
            )
        )
        print(" · ".join(f"{name} {value}" for name, value in rows[-1].items()))
    packages = ("av", "numpy", "pillow")
    print(write_rows("video", rows, ("mimo_megatron", "csrc", "benchmarks/bench_video.py"), packages, args.out))


if __name__ == "__main__":
    main()
