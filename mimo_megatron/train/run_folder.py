"""What lies in a run's folder, and which of its checkpoints is the newest.

``config.yaml``, ``metrics.jsonl``, ``events.jsonl``, ``skipped.jsonl``, ``tensorboard/``, ``checkpoints/step_000100/``,
``checkpoints/latest``, ``report.html``; ``faults/`` where there were some. A checkpoint folder appears under its name
only when it is whole (see ``mcore/checkpoint.py``).
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_megatron.config.manifest import sync
from mimo_megatron.errors import CheckpointError
from mimo_megatron.log import get_logger
from mimo_megatron.mcore.checkpoint import PARTIAL, REPLACED

_STEP = re.compile(r"step_(\d{6,})")
_LATEST = "latest"
_DAMAGED, _DROPPED = ".damaged", ".dropped"


@dataclass(frozen=True)
class RunFolder:
    root: Path

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

    def record_skipped(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._append("skipped.jsonl", row)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / name).open("a") as file:
            file.write(json.dumps(row) + "\n")
