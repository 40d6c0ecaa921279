"""Encoded videos against a direct computation from all decoded frames, on clips made here in several containers."""

import io
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import VideoConfig
from mimo_megatron.data.image import encode_image
from mimo_megatron.data.video import encode_video, video_grid
from mimo_megatron.errors import DataError

VISION = preset("tiny-vl").vision
assert VISION is not None
MIN_PIXELS = 3136
CODECS = {
    "h264.mp4": "libx264",
    "mpeg4.mp4": "mpeg4",
    "vp9.webm": "libvpx-vp9",
    "vp8.webm": "libvpx",
    "mpeg4.avi": "mpeg4",
    "h264.avi": "libx264",
}


@lru_cache
def clip(
    name: str = "h264.mp4",
    num_frames: int = 40,
    fps: int = 10,
    height: int = 56,
    width: int = 84,
    times_ms: tuple[int, ...] | None = None,
    header_first: bool = False,
) -> bytes:
    """Frame i is a grey of 10 + 5 i with a bar that moves; coded with B-frames where the codec has them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        with av.open(str(path), "w", options={"movflags": "faststart"} if header_first else {}) as out:
            stream = out.add_stream(CODECS[name], rate=fps)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {} if "webm" in name else {"bf": "2"}
            if times_ms:
                stream.codec_context.time_base = Fraction(1, 1000)
            for i in range(num_frames):
                pixels = np.full((height, width, 3), 10 + 5 * i, np.uint8)
                pixels[:, 2 * i % width :][:, :8] = 255 - pixels[0, 0]
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if times_ms:
                    frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path.read_bytes()


def decoded(data: bytes) -> list[Image.Image]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def patches_of(frames: list[Image.Image], grid: tuple[int, int, int]) -> NDArray[np.uint8]:
    """[P, 1176] by the definition, patch by patch: unit rows, unit columns, then the four patches of a unit."""
    steps, rows, columns = grid
    pixels = [np.asarray(frame.resize((columns * 14, rows * 14), Image.Resampling.BICUBIC)) for frame in frames]
    patches = []
    for step in range(steps):
        for unit_row in range(0, rows, 2):
            for unit_column in range(0, columns, 2):
                for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    y, x = 14 * (unit_row + row), 14 * (unit_column + column)
                    pair = [one[y : y + 14, x : x + 14] for one in pixels[2 * step : 2 * step + 2]]
                    patches.append(np.stack(pair).transpose(3, 0, 1, 2).ravel())
    return np.stack(patches)


@pytest.mark.parametrize("name", CODECS)
def test_patches_are_those_of_the_frames_at_even_times(name: str) -> None:
    data = clip(name)
    one = encode_video(data, VISION, VideoConfig(fps=2), min_pixels=MIN_PIXELS)
    assert one.kind == "video" and one.grid == (4, 4, 6)  # 4 seconds, 8 frames
    assert one.seconds_per_grid == pytest.approx(1.0, abs=0.01)
    frames = decoded(data)
    np.testing.assert_array_equal(one.patches_PC, patches_of([frames[i] for i in range(0, 40, 5)], one.grid))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("fps", [0.3, 1.0, 3.0, 7.0, 60.0])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 25, 40])
def test_the_grid_is_known_without_decoding(name: str, num_frames: int, fps: float) -> None:
    data = clip(name, num_frames)
    video = VideoConfig(fps=fps, max_frames=32)
    one = encode_video(data, VISION, video, min_pixels=MIN_PIXELS)
    assert video_grid(data, VISION, video, min_pixels=MIN_PIXELS) == (one.grid, one.seconds_per_grid)
    assert len(one.patches_PC) == one.num_patches
    wanted = min(max(num_frames / 10 * fps, 2), video.max_frames, num_frames)
    assert abs(2 * one.grid[0] - wanted) < 1.01  # the nearest even number
    assert one.seconds_per_grid == pytest.approx(num_frames / 10 / one.grid[0], rel=0.03)


def test_a_single_frame_fills_both_halves_like_an_image() -> None:
    data = clip(num_frames=1)
    one = encode_video(data, VISION, VideoConfig(), min_pixels=MIN_PIXELS)
    still = io.BytesIO()
    decoded(data)[0].save(still, "PNG")
    image = encode_image(still.getvalue(), VISION, min_pixels=MIN_PIXELS, max_pixels=10**6)
    assert one.grid == image.grid
    np.testing.assert_array_equal(one.patches_PC, image.patches_PC)


def test_uneven_frames_are_taken_by_their_time_on_screen() -> None:
    data = clip(num_frames=6, times_ms=(0, 100, 200, 300, 3000, 4000))  # lasts 4.8 s; the fourth frame stands for 2.7 s
    one = encode_video(data, VISION, VideoConfig(fps=1), min_pixels=MIN_PIXELS)
    assert one.grid[0] == 2 and one.seconds_per_grid == pytest.approx(2.4)
    frames = decoded(data)
    np.testing.assert_array_equal(one.patches_PC, patches_of([frames[i] for i in (0, 3, 3, 4)], one.grid))


@pytest.mark.parametrize(
    ("video", "grid"),
    [
        (VideoConfig(fps=2), (4, 8, 12)),
        (VideoConfig(fps=2, max_pixels_per_frame=56 * 84), (4, 4, 6)),
        (VideoConfig(fps=2, max_total_tokens=24), (4, 4, 6)),
        (VideoConfig(fps=2, max_total_tokens=24, max_frames=2), (1, 8, 12)),
    ],
    ids=["free", "frame limit", "token limit", "fewer frames"],
)
def test_frames_shrink_to_the_limits(video: VideoConfig, grid: tuple[int, int, int]) -> None:
    data = clip(height=112, width=168)
    assert video_grid(data, VISION, video, min_pixels=MIN_PIXELS)[0] == grid
    assert encode_video(data, VISION, video, min_pixels=MIN_PIXELS).grid == grid


@pytest.mark.parametrize("max_total_tokens", [3, 15])
def test_a_video_over_the_token_limit_is_refused_with_the_remedy(max_total_tokens: int) -> None:
    video = VideoConfig(fps=2, max_total_tokens=max_total_tokens)
    with pytest.raises(
        DataError, match=rf"4 frame pairs of 56x84 .*max_total_tokens \({max_total_tokens}\).*lower data"
    ):
        video_grid(clip(), VISION, video, min_pixels=MIN_PIXELS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no video at all",
        clip()[:-200],
        clip()[: len(clip()) // 2],
        clip(header_first=True)[: len(clip()) * 3 // 4],
        clip("mpeg4.avi")[: len(clip("mpeg4.avi")) // 2],
    ],
    ids=["empty", "text", "without an index", "half", "half behind its index", "half an AVI"],
)
def test_a_damaged_file_is_refused_with_the_remedy(data: bytes) -> None:
    for read in (encode_video, video_grid):
        with pytest.raises(DataError, match="drop the sample or replace"):
            read(data, VISION, VideoConfig(), min_pixels=MIN_PIXELS)


def test_overwritten_packets_never_raise_anything_but_a_data_error() -> None:
    rng = np.random.default_rng(0)
    num_refused = 0
    for name in CODECS:
        for _ in range(10):
            data = bytearray(clip(name))
            start = int(rng.integers(len(data)))
            data[start : start + 60] = rng.bytes(len(data[start : start + 60]))
            try:
                one = encode_video(bytes(data), VISION, VideoConfig(), min_pixels=MIN_PIXELS)
            except DataError:
                num_refused += 1
                continue
            assert len(one.patches_PC) == one.num_patches
    assert num_refused > 5


def test_a_file_without_pictures_is_refused() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(DataError, match="no video stream"):
        video_grid(out.getvalue(), VISION, VideoConfig(), min_pixels=MIN_PIXELS)
