"""When and how a run's checkpoints are written and found again.

Invariants, tested with planted faults and kills: a checkpoint is announced only once it is whole; a background write
that failed is raised at the next ``check``, ``save`` or ``finish``; an old checkpoint goes only after the new one is
there; a damaged one is never loaded, and never passed over in silence.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from mimo_megatron.errors import CheckpointError, DamagedCheckpointError
from mimo_megatron.log import get_logger
from mimo_megatron.mcore import checkpoint
from mimo_megatron.mcore.shard_files import HostBuffers
from mimo_megatron.train.run_folder import RunFolder
from mimo_megatron.train.step import Trainer

Position = Callable[[], dict[str, Any]]
Announce = Callable[[str, int, str], None]


class Saver:
    """Saves the state of ``trainer`` and, beside it, what ``position`` gives. Every rank has one and calls it in step.

    ``announce(event, step, detail)`` is called on every rank, in the training thread, when a checkpoint is published.
    The ``with`` block's end waits for the write in flight.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder, position: Position, announce: Announce):
        self._trainer, self._folder = trainer, folder
        self._position, self._announce = position, announce
        self._settings = trainer.config.train.checkpoint
        # The thread's own: training's collectives never meet it. It waits for the slowest rank's disk.
        limit = timedelta(seconds=2 * trainer.config.train.collective_timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=limit)
        self._buffers = HostBuffers()
        self._write: _Write | None = None
        self._last_step: int | None = None

    def save(self, step: int, *, wait: bool = False) -> None:
        """Save what training has reached after ``step``. With ``wait``, or in mode ``sync``, it is published on return.

        A write in flight is waited for first. Saving a step again does nothing but, with ``wait``, that.
        """
        if step == self._last_step:
            if wait:
                self.finish()
            return
        if self._write is not None and self.is_writing:
            began = time.perf_counter()
            self._write.thread.join()
            get_logger().info(
                "step %d waited %.1f s for the checkpoint of step %d: they are due faster than the disk takes them",
                step,
                time.perf_counter() - began,
                self._write.step,
            )
        self.check()
        in_background = self._settings.mode == "async" and not wait
        config = self._trainer.config
        staged = checkpoint.stage(
            self._folder.checkpoint(step),
            config.model,
            self._trainer.bare_chunks,
            self._trainer.optimizer,
            {"step": step, **self._position()},
            encoding=config.data,
            buffers=self._buffers if in_background else None,
        )
        self._last_step = step
        self._write = _Write(step, lambda: self._publish(staged, step))
        if in_background:
            self._write.thread.start()
        else:
            self._write.run()
            self.check()

    @property
    def is_writing(self) -> bool:
        """Whether a write is in flight."""
        return self._write is not None and self._write.is_alive

    def check(self) -> None:
        """Announce a write that has ended, or raise its ``CheckpointError``. Cheap; call it every step."""
        write = self._write
        if write is None or write.is_alive:
            return
        self._write = None
        if write.fault is not None:
            raise write.fault
        self._announce("checkpoint", write.step, str(self._folder.checkpoint(write.step)))

    def finish(self) -> None:
        """Wait for the write in flight, then ``check``."""
        if self._write is not None and self.is_writing:
            self._write.thread.join()
        self.check()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.finish()
        except CheckpointError as fault:
            if kind is None:
                raise
            get_logger().error("%s", fault)  # beside the error that ends the run

    def _publish(self, staged: checkpoint.StagedCheckpoint, step: int) -> None:
        staged.publish(self._group)
        if dist.get_rank() == 0:
            self._folder.point_to(step)
            self._folder.drop_old_checkpoints(self._settings.keep)


@dataclass
class _Write:
    """One publishing, in a thread or not. Its fault is kept until someone asks."""

    step: int
    body: Callable[[], None]
    fault: CheckpointError | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.run, name=f"checkpoint-{self.step}", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def run(self) -> None:
        try:
            self.body()
        except CheckpointError as error:
            self.fault = error
        except Exception as error:
            self.fault = CheckpointError(f"the checkpoint of step {self.step} failed after it was written: {error!r}")
            self.fault.__cause__ = error


@dataclass(frozen=True)
class Resumed:
    """The newest good checkpoint of a run folder, now loaded."""

    path: Path
    state: dict[str, Any]
    refused: list[tuple[int, str]]
    """(step, reason) of the newer ones that were damaged."""


def resume_newest(trainer: Trainer, folder: RunFolder) -> Resumed | None:
    """Load the newest good checkpoint; None where none was ever published. A collective over all ranks.

    A damaged one is passed over with a warning and set aside as ``NAME.damaged``. ``CheckpointError`` where no good one
    is left, or the newest holds another model.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        folder.clear_leftovers()
        found[0] = folder.checkpoint_steps()[::-1], folder.latest_step()
    dist.broadcast_object_list(found, src=0)
    steps, latest = found[0]
    refused: list[tuple[int, str]] = []
    if latest is not None and latest not in steps:
        refused.append((latest, f"{folder.checkpoint(latest)}: `latest` names it, but it is not there"))
    for step in steps:
        path = folder.checkpoint(step)
        try:
            state = checkpoint.load(path, trainer.config.model, trainer.bare_chunks, trainer.optimizer)
            if state.get("step") != step:
                raise DamagedCheckpointError(f"{path} holds step {state.get('step')}: folders were exchanged")
        except DamagedCheckpointError as error:
            refused.append((step, str(error)))
            continue
        _tell_and_set_aside(folder, step, refused)
        return Resumed(path, state, refused)
    if refused:
        reasons = "\n".join(reason for _, reason in refused)
        raise CheckpointError(
            f"{folder.root} has no good checkpoint left to resume from:\n{reasons}\n"
            f"Bring one back, or remove {folder.checkpoints} to start from the beginning"
        )
    return None


def _tell_and_set_aside(folder: RunFolder, step: int, refused: list[tuple[int, str]]) -> None:
    if dist.get_rank() == 0:
        for bad_step, reason in refused:
            get_logger().warning("not resumed from step %d, but from step %d: %s", bad_step, step, reason)
            folder.set_aside(bad_step)
        if refused:
            folder.point_to(step)
    dist.barrier()
