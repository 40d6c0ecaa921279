"""A worker: one job at a time from its socket, one answer each, until the socket closes or the memory is gone."""

import gc
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from mimo_megatron.reward.service import confine, frames

Job = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    memory_bytes: int = 1 << 30
    seconds: float = 5.0
    """From dispatch to SIGKILL. The worker's own limit is CPU time, one second later."""


def run(sock: socket.socket, job: Job, limits: Limits, parent: int) -> NoReturn:
    """Serve until the socket ends. Answers are ``{"value", "rss"}``, ``{"fault": "error", "text"}``; ``{"fault":
    "memory"}`` is the last one of this process, which can no longer be trusted to have what it needs."""
    confine.die_with(parent)
    confine.limit(limits.memory_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)  # file sizes are limited to 0, and what libraries print may hold answers
    os.close(nothing)
    buffer = bytearray()
    exhausted = False
    try:
        while (message := frames.receive(sock, buffer)) is not None:
            confine.allow_cpu(limits.seconds + 1)
            sock.sendall(frames.encode(_answer(job, message)))
    except MemoryError:
        exhausted = True
    except OSError:
        pass  # the service has gone
    if exhausted:  # said here, where the traceback has let go of what it held
        gc.collect()
        sock.sendall(frames.encode({"fault": "memory"}))
    os._exit(0)


def _answer(job: Job, message: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": job(message), "rss": confine.resident_bytes()}
    except MemoryError:
        raise
    except BaseException as error:  # a library's timeout may be no Exception; the job's fault is reported, never lost
        return {"fault": "error", "text": f"{type(error).__name__}: {str(error)[:200]}"}
