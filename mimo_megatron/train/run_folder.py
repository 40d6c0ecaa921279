"""What lies in a run's folder, which of its checkpoints is the newest, and that one run writes into it at a time.

``config.yaml``, ``metrics.jsonl``, ``events.jsonl``, ``skipped.jsonl``, ``tensorboard/``, ``checkpoints/step_000100/``,
``checkpoints/latest``, ``report.html``; ``faults/`` where there were some. A checkpoint folder appears under its name
only when it is whole (see ``mcore/checkpoint.py``).
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mimo_megatron.config.manifest import sync
from mimo_megatron.errors import CheckpointError, ConfigError
from mimo_megatron.log import get_logger
from mimo_megatron.mcore.checkpoint import PARTIAL, REPLACED
from mimo_megatron.train.jsonl import keep_rows_until, open_to_append

_STEP = re.compile(r"step_(\d{6,})")
_LATEST = "latest"
_DAMAGED, _DROPPED = ".damaged", ".dropped"
_LOCK = ".in-use"
_LEASE_SECONDS = 120.0
"""After which NFS has set free what a lost machine held: its leases last 90 s."""
_END_SECONDS = 30.0
"""For a killed run of this machine to be gone: a process of it may stand in a write to the disk."""
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class RunFolder:
    root: Path

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The folder, made where it is not there, belongs to this process while the block lasts. Rank 0 alone calls it.

        ``ConfigError`` where another run uses it, whose checkpoints and rows would be overwritten, or where it cannot
        be written. The kernel ends the claim of processes that are gone. Those of a killed run may still be going, and
        another machine may be lost: both are waited for.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / _LOCK).open("a+")
        except OSError as error:
            raise ConfigError(
                f"dir {self.root} cannot be written ({error}): name another, or mend its rights"
            ) from error
        with file:
            _claim(file, self.root)
            yield

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def fault(self, step: int) -> Path:
        """What ``mimo-megatron replay`` needs of a step that could not be taken."""
        return self.faults / f"step_{step:06d}"

    @property
    def faults(self) -> Path:
        return self.root / "faults"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        folder = self.checkpoints
        names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def latest_step(self) -> int | None:
        """The step of the checkpoint that ``latest`` names, whether it is there or not; None without ``latest``."""
        path = self.checkpoints / _LATEST
        if not path.is_file():
            return None
        name = path.read_text().strip()
        match = _STEP.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path} names {name!r}, no checkpoint; write the name of a good one into it")
        return int(match[1])

    def point_to(self, step: int) -> None:
        """Make ``latest`` name this step's checkpoint, at once or not at all."""
        aside = self.checkpoints / f"{_LATEST}.tmp"
        aside.write_text(self.checkpoint(step).name + "\n")
        sync(aside)
        aside.replace(self.checkpoints / _LATEST)
        sync(self.checkpoints)

    def clear_leftovers(self) -> None:
        """Remove what a killed run left half written or half removed. One that was being replaced comes back."""
        for path in self.checkpoints.glob(f"*{REPLACED}"):
            if (whole := path.with_name(path.name.removesuffix(REPLACED))).exists():
                shutil.rmtree(path)
            else:
                path.rename(whole)
        for path in (*self.checkpoints.glob(f"*{PARTIAL}"), *self.checkpoints.glob(f"*{_DROPPED}")):
            get_logger().info("removed %s, which a killed run left behind", path)
            shutil.rmtree(path)

    def set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that nothing takes it for a good one; a gone one is left alone."""
        path = self.checkpoint(step)
        if path.exists():
            aside = path.with_name(f"{path.name}{_DAMAGED}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def newest_checkpoint(self) -> Path | None:
        steps = self.checkpoint_steps()
        return self.checkpoint(steps[-1]) if steps else None

    def drop_old_checkpoints(self, keep: int) -> None:
        for step in self.checkpoint_steps()[:-keep]:
            path = self.checkpoint(step)
            shutil.rmtree(path.rename(path.with_name(path.name + _DROPPED)))  # half removed, it has no good name

    def record_skipped(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Samples that were left out up to ``step``, since the step before."""
        if rows:
            with open_to_append(self._skipped) as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)

    def forget_skipped_after(self, step: int) -> None:
        """A run that goes on after ``step`` meets anew, and lists again, what an earlier attempt left out later."""
        keep_rows_until(self._skipped, step, without=0)  # older versions named no step

    @property
    def _skipped(self) -> Path:
        return self.root / "skipped.jsonl"


def _claim(file: TextIO, root: Path) -> None:
    here, began, is_told = socket.gethostname(), time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                get_logger().warning("%s: its file system has no locks (%s): start no second run there", root, error)
                return
        file.seek(0)
        holder = file.read().strip()
        if time.monotonic() - began > (_END_SECONDS if holder.partition(":")[0] == here else _LEASE_SECONDS):
            raise ConfigError(
                f"dir {root} is used by another run (process {holder}), and two runs would overwrite each other's "
                "checkpoints and metrics: wait for that one, end it, or name another dir"
            )
        if not is_told:
            get_logger().info("%s is used by another run (process %s): waiting for its end", root, holder)
            is_told = True
        time.sleep(_LOOK_SECONDS)
    file.truncate(0)
    print(f"{here}:{os.getpid()}", file=file, flush=True)
