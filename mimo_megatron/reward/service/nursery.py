"""The service's side of the zygote: starts it, has workers forked, hears how each ended.

A worker is held by its pidfd, so a signal can never reach a process that has inherited its number.
"""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from mimo_megatron.errors import RewardError
from mimo_megatron.reward.service import frames
from mimo_megatron.reward.service.worker import Limits

_START_SECONDS = 120.0
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
"""What workers see of the service's environment: nothing that may hold a secret."""
_PYTHON_ARITHMETIC = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "OMP_NUM_THREADS": "1"}
"""gmpy2 computes a factorial of 10^9 in C, where no signal interrupts it, and without a bound on memory."""


class NurseryLost(Exception):
    """The zygote has died; a new one must be started."""


@dataclass(eq=False)
class Worker:
    pid: int
    _pidfd: int
    _sock: socket.socket
    ended: asyncio.Future[int]
    """The signal that ended it; 0 if it left by itself."""
    num_jobs: int = 0
    rss_bytes: int = 0
    _buffer: bytearray = field(default_factory=bytearray)
    _reply: asyncio.Future[dict[str, Any] | None] | None = None

    async def ask(self, frame: bytes, seconds: float) -> dict[str, Any] | None:
        """The worker's answer; None where its socket closed. ``TimeoutError`` after ``seconds``.

        A reply that stands in the socket when the time is up still counts: it was this process that was late.
        """
        loop = asyncio.get_running_loop()
        self.num_jobs += 1
        self._reply = loop.create_future()
        loop.add_reader(self._sock, self._read)
        sending = asyncio.ensure_future(loop.sock_sendall(self._sock, frame))
        try:
            await asyncio.wait({self._reply}, timeout=seconds)
            if not self._reply.done():
                self._read()
            if not self._reply.done():
                raise TimeoutError
            return self._reply.result()
        finally:
            loop.remove_reader(self._sock)
            sending.cancel()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await sending

    def _read(self) -> None:
        assert self._reply is not None
        try:
            while not self._reply.done():
                more = self._sock.recv(1 << 16)
                self._buffer += more
                message = frames.take(self._buffer) if more else None
                if message is not None or not more:
                    self._reply.set_result(message)
        except BlockingIOError:
            pass
        except (OSError, frames.BadFrame):
            if not self._reply.done():
                self._reply.set_result(None)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Kill it and forget it; harmless when repeated."""
        if self._pidfd >= 0:
            self.kill()
            os.close(self._pidfd)
            self._pidfd = -1
            self._sock.close()


class Nursery:
    """One zygote. ``target`` and ``warm`` name functions as ``module:name``; ``warm()`` lists what is wrong."""

    def __init__(self, target: str, warm: str, limits: Limits) -> None:
        self._arguments = [target, warm, str(limits.memory_bytes), str(limits.seconds)]
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._births: list[tuple[socket.socket, asyncio.Future[Worker]]] = []
        self._living: dict[int, Worker] = {}
        self.isolated = False
        """Workers stand in an empty network of their own."""

    @property
    def is_alive(self) -> bool:
        return self._control is not None

    async def start(self) -> None:
        """Returns when the zygote is warm. ``RewardError`` with what its self-test found."""
        assert self._control is None
        loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", "-m", "mimo_megatron.reward.service.zygote", str(theirs.fileno())]
        path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            self._process = subprocess.Popen(
                command + self._arguments,
                pass_fds=[theirs.fileno()],
                env={**environment, **_PYTHON_ARITHMETIC, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the service, which then ends it
            )
        except OSError:
            self._control.close()
            self._control = None  # nobody would ever answer on it
            raise
        finally:
            theirs.close()
        self._control.setblocking(False)
        self._ready = loop.create_future()
        loop.add_reader(self._control, self._hear)
        try:
            hello = await asyncio.wait_for(self._ready, _START_SECONDS)
        except (TimeoutError, NurseryLost) as error:
            await self.close()
            raise RewardError(f"reward workers did not start within {_START_SECONDS:.0f} s: {error!r}") from error
        if not hello["ready"]:
            await self.close()
            raise RewardError("reward workers fail their self-test:\n" + "\n".join(hello["problems"]))
        self.isolated = hello["isolated"]

    async def spawn(self) -> Worker:
        """A new worker, ready to be asked. ``NurseryLost`` when the zygote has died."""
        if self._control is None:
            raise NurseryLost
        ours, theirs = socket.socketpair()
        born: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        ours.setblocking(False)
        self._births.append((ours, born))
        try:
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        except OSError as error:
            self._lost()
            born.exception()
            raise NurseryLost from error
        finally:
            theirs.close()
        return await born

    async def close(self) -> None:
        """End the zygote, and by that every worker."""
        self._lost()
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None

    def _hear(self) -> None:
        while self._control is not None:
            try:
                data, handles, _, _ = socket.recv_fds(self._control, 1 << 16, 1)
            except BlockingIOError:
                return
            except OSError:
                data, handles = b"", []
            if not data:
                self._lost()
                return
            self._note(json.loads(data), handles)

    def _note(self, message: dict[str, Any], handles: list[int]) -> None:
        if "ready" in message:
            assert self._ready is not None
            self._ready.set_result(message)
        elif "pid" in message:
            sock, born = self._births.pop(0)
            if not handles:  # this process is out of file handles: the worker leaves when its socket closes
                sock.close()
                if not born.done():
                    born.set_exception(OSError(errno.EMFILE, "no handle for a new worker"))
                return
            worker = Worker(message["pid"], handles[0], sock, asyncio.get_running_loop().create_future())
            self._living[worker.pid] = worker
            if born.cancelled():
                worker.close()
            else:
                born.set_result(worker)
        elif message["exit"] in self._living:
            self._living.pop(message["exit"]).ended.set_result(message["signal"])

    def _lost(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(NurseryLost())
        for sock, born in self._births:
            sock.close()
            if not born.done():
                born.set_exception(NurseryLost())
        self._births.clear()
        for worker in self._living.values():
            worker.ended.set_result(int(signal.SIGKILL))
        self._living.clear()
