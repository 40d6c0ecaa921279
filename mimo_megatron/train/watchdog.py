"""Ends a run that stands still, and names the ranks that hold it.

The main loop says where it is (``at``: no communication). A thread in every rank publishes that place to the job's
key-value store, beside the collectives, so it works while NCCL or gloo hangs. A rank that stays in one place for the
time limit reads all places, and the first one to do so reports: ranks that show no sign of life, ranks behind the
others, or, where all are in the same phase, those that are not waiting inside a collective.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, Self, get_args

import torch.distributed as dist

from mimo_megatron.errors import HUNG_EXIT_CODE
from mimo_megatron.log import get_logger
from mimo_megatron.train.agreement import name_ranks

Phase = Literal[
    "start", "data", "rollout", "agreement", "forward-backward", "optimizer", "sync", "metrics", "save", "end"
]
PHASES: Sequence[Phase] = get_args(Phase)
"""In the order of a step."""
_LONGEST_INTERVAL_SECONDS = 10.0
_FRAMES_SHOWN = 3
_END_SECONDS = 2.0
"""For the thread to end; it may stand in a store whose host is gone, for as long as a collective may last."""
_WAITING_IN = ("torch.distributed", "megatron.core.pipeline_parallel.p2p_communication")


@dataclass(frozen=True)
class Place:
    """Where a rank is, as it published it."""

    step: int
    phase: Phase
    seconds: float
    """Since it got there."""
    stack: tuple[str, ...]
    """Innermost calls of the main thread, the innermost first."""
    is_waiting: bool
    """Inside a call of torch.distributed."""
    beat: int
    """Counts the publications."""

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)


class Watchdog:
    """Watches the thread that made it, within its ``with`` block. With no ``store`` (one rank) it does nothing."""

    def __init__(
        self, store: dist.Store | None, rank: int, world_size: int, timeout_seconds: float, report_folder: Path
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_seconds = timeout_seconds
        self._report_folder = report_folder
        self._interval_seconds = min(timeout_seconds / 8, _LONGEST_INTERVAL_SECONDS)
        self._main_thread = threading.get_ident()
        self._here: tuple[int, Phase, float] = (0, "start", time.monotonic())
        self._beat = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, phase: Phase) -> None:
        self._here = (step, phase, time.monotonic())

    def __enter__(self) -> Self:
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._store is not None:
            self._thread.join(_END_SECONDS)

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(self._interval_seconds):
                here = self._here
                self._publish()
                if time.monotonic() - here[2] > self._timeout_seconds and self._still_at(here):
                    self._end_the_run(here)
        except (RuntimeError, OSError) as error:  # the store's: its host is gone, and with it the job
            get_logger().warning("the job's store is gone (%s): a hang can no longer be explained", error)
            while not self._is_over.wait(self._interval_seconds):
                if time.monotonic() - self._here[2] > self._timeout_seconds:
                    os._exit(HUNG_EXIT_CODE)

    def _still_at(self, here: tuple[int, Phase, float]) -> bool:
        """Whether the main thread has not moved, some intervals later, in which every living rank publishes."""
        self._publish_for(2)
        return self._here == here and not self._is_over.is_set()

    def _end_the_run(self, here: tuple[int, Phase, float]) -> None:
        assert self._store is not None
        if self._store.add("reporters", 1) == 1:
            before = self._places()
            self._publish_for(3)
            text = explain(before, self._places(), self._world_size, self._timeout_seconds)
            self._report_folder.mkdir(parents=True, exist_ok=True)
            (self._report_folder / f"hang_step_{here[0]:06d}.txt").write_text(text + "\n")
            get_logger().error("%s", text)
            self._store.set("reported", "yes")
        for _ in range(8):  # the reporter may be at it
            if self._store.check(["reported"]):
                break
            self._publish_for(1)
        sys.stderr.flush()
        os._exit(HUNG_EXIT_CODE)  # the main thread cannot be woken from a collective

    def _publish_for(self, num_intervals: int) -> None:
        for _ in range(num_intervals):
            time.sleep(self._interval_seconds)
            self._publish()

    def _publish(self) -> None:
        assert self._store is not None
        step, phase, since = self._here
        stack, is_waiting = _stack(sys._current_frames().get(self._main_thread))
        self._beat += 1
        place = Place(step, phase, time.monotonic() - since, stack, is_waiting, self._beat)
        self._store.set(str(self._rank), json.dumps(asdict(place)))

    def _places(self) -> dict[int, Place]:
        assert self._store is not None
        known = [rank for rank in range(self._world_size) if self._store.check([str(rank)])]
        rows = {rank: json.loads(self._store.get(str(rank))) for rank in known}
        return {rank: Place(**row | {"stack": tuple(row["stack"])}) for rank, row in rows.items()}


def explain(before: Mapping[int, Place], now: Mapping[int, Place], world_size: int, timeout_seconds: float) -> str:
    """Which ranks hold the others up, from two readings of all places with some publications between them."""
    silent = [
        rank
        for rank in range(world_size)
        if rank not in now or (rank in before and now[rank].beat == before[rank].beat)
    ]
    alive = {rank: place for rank, place in now.items() if rank not in silent}
    furthest = max((place.progress for place in alive.values()), default=(0, 0))
    behind = [rank for rank, place in alive.items() if place.progress < furthest]
    elsewhere = [rank for rank, place in alive.items() if not place.is_waiting]
    lines = [f"nothing moved for {timeout_seconds:g} s; the run is ended (exit code {HUNG_EXIT_CODE})."]
    if silent:
        lines.append(f"no sign of life: {name_ranks(silent)}; last seen {_seen(now, silent)}")
    if behind:
        lines += [f"did not arrive: {line}" for line in _grouped({rank: alive[rank] for rank in behind})]
    elif elsewhere and len(elsewhere) < len(alive):
        lines += [f"not in a collective: {line}" for line in _grouped({rank: alive[rank] for rank in elsewhere})]
    elif elsewhere:
        lines.append("no rank is inside a collective: look at the disk, or at a device that does not answer")
    elif not silent:
        lines.append("all ranks wait inside collectives: look for ranks that wait in different ones")
    named = {*silent, *(behind or (elsewhere if len(elsewhere) < len(alive) else ()))}
    lines += [f"waiting: {line}" for line in _grouped({rank: alive[rank] for rank in alive if rank not in named})]
    return "\n  ".join(lines)


def _seen(now: Mapping[int, Place], ranks: Sequence[int]) -> str:
    known = sorted({now[rank].progress for rank in ranks if rank in now})
    return ", ".join(f"in step {step}, {PHASES[phase]}" for step, phase in known) or "never"


def _grouped(places: Mapping[int, Place]) -> list[str]:
    """One line for the ranks that are in the same place."""
    groups: dict[tuple[int, Phase, tuple[str, ...]], list[int]] = {}
    for rank, place in places.items():
        groups.setdefault((place.step, place.phase, place.stack), []).append(rank)
    return [
        f"{name_ranks(ranks)} in step {step}, {phase}, for {max(places[rank].seconds for rank in ranks):.0f} s "
        f"(at {' < '.join(stack) or 'an unknown place'})"
        for (step, phase, stack), ranks in groups.items()
    ]


def _stack(frame: FrameType | None) -> tuple[tuple[str, ...], bool]:
    """The innermost calls, and below torch's and megatron's own the nearest one of ours; whether a collective waits."""
    shown: list[str] = []
    is_waiting = has_ours = False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        is_waiting |= module.startswith(_WAITING_IN) and not shown[1:]
        is_ours = module.startswith("mimo_megatron")
        if len(shown) < _FRAMES_SHOWN or (is_ours and not has_ours):
            shown.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        has_ours |= is_ours
        frame = frame.f_back
    return tuple(shown), is_waiting
