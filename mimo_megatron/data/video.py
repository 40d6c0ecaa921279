"""From the bytes of a video to uint8 patches: frames sampled evenly in time, resized alike, cut in pairs.

The plan of a video - which frames, what size - follows from the container alone: its packets are listed, none decoded.
Sampling goes by the packets' timestamps, so variable frame rates keep absolute time. Decoding then starts at the key
frame before a wanted frame and ends with it (``video_packets.py``). Pixels are taken as stored, as for images: a
rotation flag is not applied. Invariants: ``video_grid`` equals the grid that ``encode_video`` returns; frames are those
of a full decode; a video stays under the token limits; whatever FFmpeg raises on damaged bytes becomes a ``DataError``.
A WebM file cut off between two packets is a shorter valid clip: its header does not say how many there were.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.config.run import VideoConfig
from mimo_megatron.data.image import smart_resize
from mimo_megatron.data.patches import resize_to_patches
from mimo_megatron.data.video_packets import PacketList, decode, list_packets
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedMedia


@dataclass(frozen=True)
class _Plan:
    packets: PacketList
    frames: tuple[int, ...]
    """Ascending numbers, in presentation order, of the frames to keep; a long-standing frame may come twice."""
    height: int
    width: int
    grid: tuple[int, int, int]
    seconds_per_grid: float


def video_grid(
    data: bytes, vision: VisionConfig, video: VideoConfig, *, min_pixels: int
) -> tuple[tuple[int, int, int], float]:
    """((frames / 2, height / 14, width / 14), seconds between temporal steps), without decoding pixels."""
    plan = _plan(data, vision, video, min_pixels)
    return plan.grid, plan.seconds_per_grid


def encode_video(
    data: bytes, vision: VisionConfig, video: VideoConfig, *, min_pixels: int, steps: Sequence[int] | None = None
) -> EncodedMedia:
    """The video as uint8 patches in merge-block order, with its grid and the seconds between temporal steps.

    ``steps``, ascending, are those to decode; all, where they are left out.
    """
    plan = _plan(data, vision, video, min_pixels)
    num_steps, rows, columns = plan.grid
    pair = vision.temporal_patch_size
    chosen = range(num_steps) if steps is None else steps
    wanted = [plan.frames[pair * step + half] for step in chosen for half in range(pair)]
    patches_TPC = np.empty((len(chosen), rows * columns, vision.patch_bytes), np.uint8)
    kept = 0
    for number, frame in decode(data, plan.packets, wanted):
        pixels_HW3 = frame.to_ndarray(format="rgb24")
        for _ in range(wanted.count(number)):
            step, half = divmod(kept, pair)
            resize_to_patches(pixels_HW3, (plan.height, plan.width), vision, patches_TPC[step], half)
            kept += 1
    if kept < len(wanted):
        raise DataError(
            f"video of {len(data)} bytes: frame {wanted[kept]} is listed but cannot be decoded; "
            "drop the sample or replace the file"
        )
    patches_PC = patches_TPC.reshape(-1, vision.patch_bytes)
    return EncodedMedia("video", patches_PC, plan.grid, plan.seconds_per_grid)


def _plan(data: bytes, vision: VisionConfig, video: VideoConfig, min_pixels: int) -> _Plan:
    packets = list_packets(data)
    times_F = packets.times_F
    intervals = np.diff(times_F) if len(times_F) > 1 else np.array([1 / (packets.frame_rate or video.fps)])
    duration = float(intervals.mean() * len(times_F))

    pair = vision.temporal_patch_size
    most = min(video.max_frames, len(times_F)) // pair * pair
    num_frames = max(pair, min(round(duration * video.fps / pair) * pair, most))
    # The frame on screen at each time, with grace for containers that round timestamps (WebM: to milliseconds).
    sample_times = times_F[0] + np.arange(num_frames) * (duration / num_frames) + intervals.min() / 2
    frames = np.searchsorted(times_F, sample_times, side="right") - 1

    steps = num_frames // pair
    height, width = _frame_size(packets.height, packets.width, steps, vision, video, min_pixels)
    grid = (steps, height // vision.patch_size, width // vision.patch_size)
    return _Plan(packets, tuple(frames.tolist()), height, width, grid, duration / steps)


def _frame_size(
    height: int, width: int, steps: int, vision: VisionConfig, video: VideoConfig, min_pixels: int
) -> tuple[int, int]:
    """(height, width) of every sampled frame: within the limit of a frame and its share of the video's tokens."""
    multiple = vision.pixel_multiple
    share = video.max_total_tokens // steps * multiple**2
    max_pixels = min(video.max_pixels_per_frame, share)
    if min_pixels <= max_pixels:
        new = smart_resize(height, width, multiple=multiple, min_pixels=min_pixels, max_pixels=max_pixels)
        if new[0] * new[1] <= share:
            return new
    raise DataError(
        f"video of {steps} frame pairs of {height}x{width} pixels cannot be shrunk to data.video.max_total_tokens "
        f"({video.max_total_tokens}) with data.min_pixels {min_pixels}; raise the limit or lower data.video.max_frames"
    )
