"""The wish to stop: SIGTERM (a scheduler's warning) and SIGUSR1 are noted as they come and heeded between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopWish:
    """Within its ``with`` block a signal no longer ends the process; ``name`` is then the signal's, else empty."""

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {one: signal.signal(one, self._note) for one in SIGNALS}
        else:
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
