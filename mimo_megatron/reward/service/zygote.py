"""The process that workers are forked from: it has loaded and warmed the libraries, so that a new worker takes
milliseconds, and nothing else: neither torch nor the HTTP server.

    python -P -m mimo_megatron.reward.service.zygote FD TARGET WARM MEMORY_BYTES SECONDS

Its only input is the socket FD (messages with boundaries). ``{"ready", "isolated", "problems"}`` is the first thing it
says. Each message it receives holds the socket of a worker to fork; it answers ``{"pid"}`` with its pidfd, and
later ``{"exit": pid, "signal"}``. It ends, and all workers by their parent-death signal with it, when the socket ends
or its own parent has changed.
"""

import gc
import importlib
import json
import os
import select
import socket
import sys
import threading
from typing import Any

from mimo_megatron.reward.service import confine, worker

_PARENT_CHECK_MS = 1000


def main(arguments: list[str]) -> None:
    parent = os.getppid()
    control = socket.socket(fileno=int(arguments[0]))
    limits = worker.Limits(int(arguments[3]), float(arguments[4]))
    sys.dont_write_bytecode = True
    try:
        job, warm = _named(arguments[1]), _named(arguments[2])
        problems = warm()
    except Exception as error:  # said to the service, which refuses to start
        problems = [f"{type(error).__name__}: {error}"]
    if not problems and threading.active_count() > 1:
        problems = ["a library has started threads; workers cannot be forked"]
    confine.forbid_new_privileges()
    isolated = confine.leave_network()
    _say(control, {"ready": not problems, "isolated": isolated, "problems": problems})
    if not problems:
        gc.collect()
        gc.freeze()  # the collector would otherwise copy every shared page in every worker
        _serve(control, job, limits, parent)


def _serve(control: socket.socket, job: worker.Job, limits: worker.Limits, parent: int) -> None:
    children: dict[int, int] = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while os.getppid() == parent:
        for ready, _ in poll.poll(_PARENT_CHECK_MS):
            if ready in children:
                poll.unregister(ready)
                ended = os.waitid(os.P_PIDFD, ready, os.WEXITED)
                assert ended is not None
                signal = 0 if ended.si_code == os.CLD_EXITED else ended.si_status
                _say(control, {"exit": children.pop(ready), "signal": signal})
                os.close(ready)
                continue
            try:
                message, handles, _, _ = socket.recv_fds(control, 16, 1)
            except ConnectionResetError:
                return
            if not message:
                return
            (handle,) = handles
            pid = _fork(control, handle, list(children), job, limits)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = pid
            poll.register(pidfd, select.POLLIN)
            os.close(handle)
            _say(control, {"pid": pid}, pidfd)


def _fork(control: socket.socket, handle: int, others: list[int], job: worker.Job, limits: worker.Limits) -> int:
    me = os.getpid()
    if pid := os.fork():
        return pid
    try:
        control.close()
        for pidfd in others:
            os.close(pidfd)
        worker.run(socket.socket(fileno=handle), job, limits, me)
    finally:
        os._exit(1)


def _named(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _say(control: socket.socket, message: dict[str, Any], *handles: int) -> None:
    try:
        socket.send_fds(control, [json.dumps(message).encode()], handles)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
