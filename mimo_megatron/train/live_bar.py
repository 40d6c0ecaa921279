"""The foot of a terminal while a run goes: the bar, what the step does now, and the last record's figures.

The log goes through rich meanwhile, so that its lines appear above.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from mimo_megatron.log import get_logger

_REFRESHES_PER_SECOND = 4


@dataclass(frozen=True)
class _Phase:
    """Frozen, since another thread draws it."""

    step: int
    name: str
    began: float
    """On the clock, had it never been left."""
    seconds: Mapping[str, float]
    """Of each of the step's phases, as they were first entered; this one's, until it was entered last."""
    detail: str

    def line(self, now: float) -> Text:
        text = Text(f"step {self.step}: ")
        until_now = {**self.seconds, self.name: now - self.began}
        for place, (name, seconds) in enumerate(until_now.items()):
            text.append(" › " if place else "")
            text.append(f"{name} {seconds:,.0f} s", "bold" if name == self.name else "dim")
        return text.append(f" · {self.detail}" if self.detail else "")


class LiveBar:
    """From its making to ``close``. ``clock`` in seconds."""

    def __init__(self, name: str, step: int, total_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        )
        self._task = self._progress.add_task(name, completed=step, total=total_steps)
        self._clock = clock
        self._phase: _Phase | None = None
        self._figures = ""
        console = Console(stderr=True, force_terminal=True)
        self._live = Live(get_renderable=self.foot, console=console, refresh_per_second=_REFRESHES_PER_SECOND)
        self._live.start()
        _send_log_to_stderr()  # as rich now stands in for sys.stderr, log lines appear above the bar

    def update(self, step: int, figures: str) -> None:
        """``step`` is done, with these figures."""
        self._figures = figures
        self._progress.update(self._task, completed=step)

    def at(self, step: int, phase: str, detail: str = "") -> None:
        """``step`` is in ``phase``, and so far in it; the seconds of a phase that is entered again go on."""
        last, now = self._phase, self._clock()
        if last is not None and (last.step, last.name) == (step, phase):
            self._phase = replace(last, detail=detail)
            return
        seconds = dict(last.seconds) if last is not None and last.step == step else {}
        if last is not None and seconds:
            seconds[last.name] = now - last.began
        self._phase = _Phase(step, phase, now - seconds.setdefault(phase, 0.0), seconds, detail)
        self._live.refresh()  # shown even where it is over before the bar is drawn again

    def foot(self) -> Group:
        """What is drawn; phases only where they are told."""
        phase = self._phase.line(self._clock()) if self._phase else None
        figures = Text(self._figures, style="dim") if self._figures else None
        return Group(self._progress, *(line for line in (phase, figures) if line is not None))

    def close(self) -> None:
        self._live.stop()
        _send_log_to_stderr()


def _send_log_to_stderr() -> None:
    for handler in get_logger().handlers:
        if type(handler) is logging.StreamHandler:  # a FileHandler is one too, and keeps its file
            handler.setStream(sys.stderr)
