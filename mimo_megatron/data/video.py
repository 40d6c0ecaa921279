"""From the bytes of a video to uint8 patches: frames sampled evenly in time, resized alike, cut in pairs.

The plan of a video - which frames, what size - follows from the container alone: its packets are listed, none decoded.
Sampling goes by the packets' timestamps, so variable frame rates keep absolute time. Pixels are taken as stored, as
for images: a rotation flag is not applied. Invariants: ``video_grid`` equals the grid that ``encode_video`` returns; a
video stays under the token limit; whatever FFmpeg raises on damaged bytes becomes a ``DataError``. A WebM file cut off
between two packets is a shorter valid clip: its header does not say how many there were.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.config.run import VideoConfig
from mimo_megatron.data.image import smart_resize
from mimo_megatron.data.patches import patchify
from mimo_megatron.errors import DataError
from mimo_megatron.types import EncodedMedia


@dataclass(frozen=True)
class _Plan:
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


def encode_video(data: bytes, vision: VisionConfig, video: VideoConfig, *, min_pixels: int) -> EncodedMedia:
    """The video as uint8 patches in merge-block order, with its grid and the seconds between temporal steps."""
    plan = _plan(data, vision, video, min_pixels)
    kept: list[NDArray[np.uint8]] = []
    with _opened(data) as stream:
        for number, frame in enumerate(stream.container.decode(stream)):
            if number == plan.frames[len(kept)]:
                resized = frame.to_image().resize((plan.width, plan.height), Image.Resampling.BICUBIC)
                kept += [np.asarray(resized)] * plan.frames.count(number)
                if len(kept) == len(plan.frames):
                    break
    if len(kept) < len(plan.frames):
        raise DataError(
            f"video of {len(data)} bytes: frame {plan.frames[len(kept)]} is listed but cannot be decoded; "
            "drop the sample or replace the file"
        )
    return EncodedMedia("video", patchify(np.stack(kept), vision), plan.grid, plan.seconds_per_grid)


def _plan(data: bytes, vision: VisionConfig, video: VideoConfig, min_pixels: int) -> _Plan:
    with _opened(data) as stream:
        times_F = _presentation_times(stream)
        height, width = stream.codec_context.height, stream.codec_context.width
        frame_rate = float(stream.average_rate or video.fps)
    intervals = np.diff(times_F) if len(times_F) > 1 else np.array([1 / frame_rate])
    duration = float(intervals.mean() * len(times_F))

    pair = vision.temporal_patch_size
    most = min(video.max_frames, len(times_F)) // pair * pair
    num_frames = max(pair, min(round(duration * video.fps / pair) * pair, most))
    # The frame on screen at each time, with grace for containers that round timestamps (WebM: to milliseconds).
    sample_times = times_F[0] + np.arange(num_frames) * (duration / num_frames) + intervals.min() / 2
    frames = np.searchsorted(times_F, sample_times, side="right") - 1

    steps = num_frames // pair
    height, width = _frame_size(height, width, steps, vision, video, min_pixels)
    grid = (steps, height // vision.patch_size, width // vision.patch_size)
    return _Plan(tuple(frames.tolist()), height, width, grid, duration / steps)


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


def _presentation_times(stream: av.VideoStream) -> NDArray[np.float64]:
    """Seconds at which the frames appear, ascending, from the packets' timestamps.

    They come in decoding order and are sorted: AVI numbers H.264's reordered frames wrongly, but the set is right.
    """
    num_packets, ticks = 0, []
    for packet in stream.container.demux(stream):
        num_packets += packet.size > 0  # the last one is empty: a marker
        if packet.size and not packet.is_discard:
            ticks.append(packet.dts if packet.pts is None else packet.pts)
    if not ticks or None in ticks or num_packets < stream.frames:
        raise DataError(
            f"video stream announces {stream.frames} frames and holds {num_packets}, of which "
            f"{len(ticks) - ticks.count(None)} have a time; the file is damaged: drop the sample or replace it"
        )
    return np.sort(np.array(ticks, np.float64)) * float(stream.time_base)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[av.VideoStream]:
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise DataError(f"file of {len(data)} bytes has no video stream; drop the sample or replace the file")
            yield container.streams.video[0]
    except av.FFmpegError as fault:
        raise DataError(
            f"video of {len(data)} bytes cannot be decoded ({fault}); drop the sample or replace the file"
        ) from fault
