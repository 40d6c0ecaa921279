"""uvicorn's HTTP connection with the bounds it lacks: how many there are, how long a request's head may take to arrive,
how long an answer may stay unread. Without them idle connections take every file handle, and unread answers all memory.
"""

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mimo_megatron.log import get_logger

HEAD_SECONDS = 20.0
UNREAD_SECONDS = 30.0
MAX_CONNECTIONS = 4096


class Connection(H11Protocol):
    """Closed without a word where a bound is broken."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            get_logger().warning("a connection is refused: %d are open", len(self.connections) - 1)
            transport.abort()
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head)
        _stop(self._unread)
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """The clock runs from the first byte of a head, or from the connection's beginning, to the head's end."""
        if self.conn.their_state is not h11.IDLE:
            _stop(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._end_head)

    def _end_head(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()


def max_connections() -> int:
    """Half of this process's file handles at most: workers, replicas and pictures need theirs."""
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
