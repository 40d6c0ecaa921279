"""The processes that make packs: a nursery that has opened the corpus once, and the workers that it forks.

    python -m mimo_megatron.data.worker CONTROL PARENT < settings.json

The trainer cannot fork them: it has threads of gloo, NCCL and OpenMP, whose locks nobody in a child would release. The
nursery is a fresh interpreter without threads; a worker forked from it takes milliseconds and shares its memory, the
index above all. Each message on CONTROL brings the socket of a worker to fork, and a page of shared memory for the
worker's ``Progress``. The nursery ends with
its parent, and the workers with the nursery (parent-death signals), or when their sockets close.

On a worker's socket, from the trainer: ``JOB`` (number of samples, bytes of text), then the samples' numbers and, as
JSON, the reasons of those to leave out. From the worker: ``REPLY`` (kind, value), with a file descriptor.
"""

import gc
import json
import mmap
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.making import make_pack
from mimo_megatron.data.media_part import MediaPart
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.shared_pack import write_shared
from mimo_megatron.lifetime import end_with_parent

JOB = struct.Struct("<qq")
REPLY = struct.Struct("<Bq")
BORN, MADE, FAILED = range(3)
"""Kinds of reply: pid with its pidfd; bytes of the pack with its memory; bytes of an error's text with its memory."""
_OOM_SCORE = "500"
"""Where memory runs out, the kernel ends a worker, which is replaced, before the trainer."""


class Progress:
    """What a worker is at, in a page of memory that the trainer has mapped too.

    Two aligned words, each of which a memoryview writes by one store. ``struct`` would write byte by byte, after zeros,
    and the trainer would now and then read a time long ago.
    """

    PAGE_BYTES = mmap.PAGESIZE

    def __init__(self, file: int) -> None:
        page = memoryview(mmap.mmap(file, self.PAGE_BYTES))
        self._since, self._place = page[:8].cast("d"), page[8:16].cast("q")

    def begin(self, place: int) -> None:
        self._since[0] = time.monotonic()
        self._place[0] = place

    @property
    def since(self) -> float:
        """When the worker was asked for, got its job, or began its sample; by the clock that all processes share."""
        return self._since[0]

    @property
    def place(self) -> int:
        """Of the sample in its pack; that after the last while the pack is put together."""
        return self._place[0]


def main(control_handle: int, parent: int) -> None:
    end_with_parent(parent, signal.SIGKILL)
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN)  # schedulers send them to all processes; the trainer decides, and ends this
    torch.set_num_threads(1)
    settings = json.load(sys.stdin)
    data, model = DataConfig.model_validate(settings["data"]), ModelConfig.model_validate(settings["model"])
    corpus = Corpus(data, model, MediaPart(*settings["part"]))
    control = socket.socket(fileno=control_handle)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers: their sockets say when they ended
    gc.collect()
    gc.freeze()  # the collector would otherwise copy every shared page in every worker
    me = os.getpid()
    while True:
        message, handles, _, _ = socket.recv_fds(control, 16, 2)
        if not message:
            return
        if os.fork() == 0:
            try:
                control.close()
                end_with_parent(me, signal.SIGKILL)
                work(socket.socket(fileno=handles[0]), Progress(handles[1]), corpus)
            finally:
                os._exit(0)
        for handle in handles:
            os.close(handle)


def work(sock: socket.socket, progress: Progress, corpus: Corpus) -> None:
    """Make the packs that are asked for on ``sock`` until it closes."""
    Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(sock, [REPLY.pack(BORN, os.getpid())], [pidfd])
    os.close(pidfd)
    while (job := _receive_job(sock)) is not None:
        numbers, left_out = job
        kind = MADE
        try:
            file, num_bytes = write_shared(make_pack(corpus, numbers, left_out, progress.begin))
        except Exception:
            kind = FAILED
            file, num_bytes = _written(traceback.format_exc().encode())
        socket.send_fds(sock, [REPLY.pack(kind, num_bytes)], [file])
        os.close(file)


def send_job(sock: socket.socket, numbers: Sequence[int], left_out: Mapping[int, SampleError]) -> None:
    """Ask a worker for the pack of these samples."""
    reasons = {number: [fault.sample_id, fault.reason, fault.detail] for number, fault in left_out.items()}
    text = json.dumps(list(reasons.items())).encode()
    sock.sendall(JOB.pack(len(numbers), len(text)) + np.asarray(numbers, "<i8").tobytes() + text)


def _receive_job(sock: socket.socket) -> tuple[list[int], dict[int, SampleError]] | None:
    head = _receive(sock, JOB.size)
    if head is None:
        return None
    num_samples, num_text = JOB.unpack(head)
    numbers, text = _receive(sock, 8 * num_samples), _receive(sock, num_text)
    if numbers is None or text is None:
        return None
    left_out = {number: SampleError(*fault) for number, fault in json.loads(text)}
    return np.frombuffer(numbers, "<i8").tolist(), left_out


def _receive(sock: socket.socket, num_bytes: int) -> bytes | None:
    """Exactly so many bytes; None where the socket closed."""
    data = bytearray()
    while len(data) < num_bytes:
        more = sock.recv(num_bytes - len(data))
        if not more:
            return None
        data += more
    return bytes(data)


def _written(text: bytes) -> tuple[int, int]:
    file = os.memfd_create("mimo-error", os.MFD_CLOEXEC)
    os.write(file, text)
    return file, len(text)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
