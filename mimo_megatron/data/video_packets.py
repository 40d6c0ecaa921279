"""The packets of a video, listed without decoding any; and chosen frames, decoding no more packets than they need.

A frame can be decoded from any key frame before it on screen: what follows a key frame in both orders, of decoding and
of presentation, refers to nothing before it. So the packets between a wanted frame and the key frame of the next one
are passed over. That needs packets that say when their frame appears: MP4, MOV, Matroska and WebM have them. Elsewhere
(AVI) frames are told apart by counting, and decoding starts at the first packet. Invariant: the frames are those of a
full decode, bit for bit.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from mimo_megatron.errors import DataError

_TIMED_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}


@dataclass(frozen=True)
class PacketList:
    """Dims: N packets in the order of decoding, F frames in the order of presentation."""

    height: int
    width: int
    frame_rate: float | None
    times_F: NDArray[np.float64]
    """Seconds at which the frames appear, ascending."""
    ticks_N: NDArray[np.int64]
    """The frames' times in the container's unit; the decoding time where there is no other."""
    is_key_N: NDArray[np.bool_]
    frame_ticks_F: NDArray[np.int64] | None
    """Of each frame, distinct and ascending; None where the container's times do not tell frames apart."""

    def first_packet(self, frame: int) -> int:
        """The packet from which to decode for this frame: its key frame's."""
        if self.frame_ticks_F is None:
            return 0
        tick = self.frame_ticks_F[frame]
        own = np.flatnonzero(self.ticks_N == tick)[0]
        keys = np.flatnonzero(self.is_key_N[: own + 1] & (self.ticks_N[: own + 1] <= tick))
        return int(keys[-1]) if len(keys) else 0


def list_packets(data: bytes) -> PacketList:
    """The packets of the first video stream. ``DataError`` where some are missing or have no time."""
    with _opened(data) as stream:
        packets, ticks, is_key, is_shown = 0, [], [], []
        is_timed = stream.container.format.name in _TIMED_CONTAINERS
        for packet in stream.container.demux(stream):
            if not packet.size:  # the last one: a marker
                continue
            packets += 1
            is_timed &= packet.pts is not None
            ticks.append(packet.dts if packet.pts is None else packet.pts)
            is_key.append(packet.is_keyframe)
            is_shown.append(not packet.is_discard)
        shown = list(itertools.compress(ticks, is_shown))
        if not shown or None in ticks or packets < stream.frames:
            raise DataError(
                f"video stream announces {stream.frames} frames and holds {packets}, of which "
                f"{len(shown) - shown.count(None)} have a time; the file is damaged: drop the sample or replace it"
            )
        # They come in decoding order, and are sorted: AVI numbers H.264's reordered frames wrongly; the set is right.
        ticks_N, ticks_F = np.array(ticks, np.int64), np.sort(np.array(shown, np.int64))
        is_timed &= len(np.unique(ticks_N)) == len(ticks_N)
        return PacketList(
            height=stream.codec_context.height,
            width=stream.codec_context.width,
            frame_rate=float(stream.average_rate) if stream.average_rate else None,
            times_F=ticks_F.astype(np.float64) * float(stream.time_base),
            ticks_N=ticks_N,
            is_key_N=np.array(is_key, np.bool_),
            frame_ticks_F=ticks_F if is_timed else None,
        )


def decode(data: bytes, packets: PacketList, frames: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) of these frames, ascending and each once, as far as they can be decoded."""
    wanted = sorted(set(frames), reverse=True)
    first = {number: packets.first_packet(number) for number in wanted}
    tick_of = packets.frame_ticks_F
    number_of = None if tick_of is None else {int(tick_of[number]): number for number in wanted}
    with _opened(data) as stream:
        stream.thread_count = 1  # samples are decoded side by side, not the frames of one
        counter, is_open, not_before = itertools.count(), False, 0
        for place, packet in enumerate(stream.container.demux(stream)):
            if not is_open and place == first[wanted[-1]]:
                is_open = True
                not_before = 0 if tick_of is None else min(packet.pts, tick_of[wanted[-1]])
            if not is_open or (number_of is not None and packet.size and packet.pts < not_before):
                continue  # passed over; or shown before the key frame, and in need of what was passed over
            for frame in _decoded(packet):
                number = next(counter) if number_of is None else number_of.get(frame.pts)
                if number != wanted[-1]:
                    continue
                yield wanted.pop(), frame
                if not wanted:
                    return
                if first[wanted[-1]] > place:
                    is_open = False
                    stream.codec_context.flush_buffers()
                    break


def _decoded(packet: av.Packet) -> list[av.VideoFrame]:
    """The frames that are complete with this packet; a place at which tests count."""
    return packet.decode()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[av.VideoStream]:
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.streams.video:
                raise DataError(f"file of {len(data)} bytes has no video stream; drop the sample or replace the file")
            yield container.streams.video[0]
    except av.FFmpegError as fault:
        raise DataError(
            f"video of {len(data)} bytes cannot be decoded ({fault}); drop the sample or replace the file"
        ) from fault
