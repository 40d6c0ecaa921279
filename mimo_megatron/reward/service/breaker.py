"""A circuit breaker: after five failures in a row a replica is left alone for ten seconds, then tried once."""

import time

FAILURES_TO_OPEN = 5
OPEN_SECONDS = 10.0


class Breaker:
    def __init__(self, open_seconds: float = OPEN_SECONDS) -> None:
        self._open_seconds = open_seconds
        self._failures = 0
        self._closed_again = 0.0
        self._is_trying = False

    @property
    def is_open(self) -> bool:
        """No request may be sent now."""
        return self._failures >= FAILURES_TO_OPEN and (self._is_trying or time.monotonic() < self._closed_again)

    def begin(self) -> None:
        """A request is being sent. After the pause only one may be under way."""
        self._is_trying = self._failures >= FAILURES_TO_OPEN

    def succeed(self) -> None:
        self._failures, self._is_trying = 0, False

    def fail(self) -> None:
        self._failures += 1
        self._is_trying = False
        self._closed_again = time.monotonic() + self._open_seconds

    def drop(self) -> None:
        """The request was taken back before it said anything about the replica."""
        self._is_trying = False
