"""Processes that end with the one that started them, also where that one is killed."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def end_with_parent(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal when ``parent``, the process that started it, ends, or the thread of it that did. Only
    Linux has this; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it ended before this was asked for
        os.kill(os.getpid(), by)
