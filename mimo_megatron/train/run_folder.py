"""What lies in a run's folder, and which of its checkpoints is the newest.

``config.yaml``, ``metrics.jsonl``, ``events.jsonl``, ``skipped.jsonl``, ``tensorboard/``, ``checkpoints/step_000100/``,
``report.html``; ``faults/`` where there were some. A checkpoint folder appears under its name only when it is whole
(see ``mcore/checkpoint.py``).
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class RunFolder:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    def checkpoint(self, step: int) -> Path:
        return self.root / "checkpoints" / f"step_{step:06d}"

    def fault(self, step: int) -> Path:
        """What ``mimo-megatron replay`` needs of a step that could not be taken."""
        return self.faults / f"step_{step:06d}"

    @property
    def faults(self) -> Path:
        return self.root / "faults"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        folder = self.root / "checkpoints"
        names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def newest_checkpoint(self) -> Path | None:
        steps = self.checkpoint_steps()
        return self.checkpoint(steps[-1]) if steps else None

    def drop_old_checkpoints(self, keep: int) -> None:
        for step in self.checkpoint_steps()[:-keep]:
            shutil.rmtree(self.checkpoint(step))

    def record_skipped(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._append("skipped.jsonl", row)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / name).open("a") as file:
            file.write(json.dumps(row) + "\n")
