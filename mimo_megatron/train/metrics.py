"""What a run tells the world while it trains: one record a step, to a JSONL file, to TensorBoard and to the console.

Rates are of useful work: real tokens, never the capacity of the packs; the fill says how far the two are apart.

Invariants, tested under these names: a resumed run's file holds every step once; values that are not finite are null in
standard JSON; rows reach the disk before the run ends.
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from mimo_megatron.config.run import RunConfig
from mimo_megatron.log import get_logger
from mimo_megatron.train.jsonl import keep_rows_until, open_to_append
from mimo_megatron.train.live_bar import LiveBar
from mimo_megatron.train.provenance import provenance

_SHOWN_STALL = 0.02  # share of a step that it may wait for data before the log says so
_ETA_MEMORY = 0.9  # weight of the past in the mean step time behind the ETA: about the last ten records


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, summed over all ranks."""

    step: int
    loss: float
    """Mean over the trained tokens, or pairs."""
    grad_norm: float
    lrs: Mapping[str, float]
    """Learning rate of each trained module; a frozen one is left out."""
    num_tokens: int
    """Slots that held real tokens: the useful ones."""
    num_trained_tokens: int
    """Tokens with a loss weight above 0; of a reward model, pairs."""
    num_slots: int
    """Capacity of the step's packs."""
    num_patches: int
    num_images: int
    num_samples: int
    seconds: float
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Samples skipped since the run began, by reason."""
    segment_squares: int = 0
    """Sum over segments of tokens squared; with ``frame_squares`` what `mimo-megatron data calibrate` fits."""
    frame_squares: int = 0
    """Sum over images and frames of patches squared."""
    model_flops: int = 0
    """``step_flops(...).total``; 0 where it was not counted."""
    vision_imbalance: float | None = None
    """Where images are shared out over ranks: the heaviest rank's predicted cost over the mean; 1 is level. Ranks wait
    for each other in every pack, so both are sums over packs. None in a step without images too."""
    pair_accuracy: float | None = None
    """Of a reward model: share of the step's pairs that it ranks right."""
    mtp_loss: float | None = None
    """Mean loss of the multi-token-prediction layers, per trained token of the decoder; None where there are none."""
    data_seconds: float | None = None
    """Of ``seconds``, how long the step waited for its packs: the rank that waited longest."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by TensorBoard tag (``reward/count``), such as those of reinforcement learning."""

    @property
    def fill(self) -> float:
        return self.num_tokens / self.num_slots

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def patches_per_second(self) -> float:
        return self.num_patches / self.seconds


class MetricsWriter:
    """Writes the records of one run, from ``open_for`` to the end of its ``with`` block. Made on rank 0 only.

    ``peak_flops`` is that of all ranks' devices together; with it, records say their MFU.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        total_steps: int,
        is_tty: bool,
        *,
        num_ranks: int = 1,
        peak_flops: float | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._total_steps = total_steps
        self._is_tty = is_tty
        self._num_ranks = num_ranks
        self._peak_flops = peak_flops
        self._mean_seconds: float | None = None
        self._open = ExitStack()

    def open_for(self, step: int) -> Self:
        """Itself, ready for the records after ``step`` (0 begins a run); rows of an earlier attempt beyond it go."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        metrics = self._run_dir / "metrics.jsonl"
        keep_rows_until(metrics, step)
        self._rows = self._open.enter_context(open_to_append(metrics))
        self._events = self._open.enter_context(open_to_append(self._run_dir / "events.jsonl"))
        self._tensorboard = self._open.enter_context(
            SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1)
        )
        self._bar = LiveBar(self._config.name, step, self._total_steps) if self._is_tty else None
        if self._bar:
            self._open.callback(self._bar.close)
        self.event("resume" if step else "start", step, {"ranks": self._num_ranks, **provenance()})
        return self

    def write(self, record: StepRecord) -> None:
        """Keep the record, and show it: on a terminal always, in a log every ``train.log_every`` steps."""
        row = self._row(record)
        print(json.dumps(row), file=self._rows, flush=True)
        for tag, value in _scalars(row):
            self._tensorboard.add_scalar(tag, value, record.step)
        is_first, is_last = self._mean_seconds is None, record.step == self._total_steps
        mean_seconds = record.seconds if self._mean_seconds is None else self._mean_seconds
        self._mean_seconds = _ETA_MEMORY * mean_seconds + (1 - _ETA_MEMORY) * record.seconds
        eta = timedelta(seconds=round(self._mean_seconds * (self._total_steps - record.step)))
        line = status_line(record, row["mfu"], eta)
        if self._bar:
            self._bar.update(record.step, line)
        elif is_first or is_last or record.step % self._config.train.log_every == 0:
            get_logger().info("step %d/%d · %s", record.step, self._total_steps, line)

    def at(self, step: int, phase: str, detail: str = "") -> None:
        """``step`` is in ``phase``, and so far in it: for who watches a terminal; kept nowhere."""
        if self._bar:
            self._bar.at(step, phase, detail)

    def event(self, event: str, step: int, detail: str | Mapping[str, Any] = "") -> None:
        """Append a row to ``events.jsonl``: a start, a resume, a checkpoint, whatever the run's log should tell."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        print(json.dumps(dict(time=time, event=event, step=step, detail=detail)), file=self._events, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _row(self, record: StepRecord) -> dict[str, Any]:
        mfu = None
        if self._peak_flops and record.model_flops:
            mfu = record.model_flops / record.seconds / self._peak_flops
        row = vars(record) | dict(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            fill=record.fill,
            tokens_per_second=record.tokens_per_second,
            patches_per_second=record.patches_per_second,
            mfu=mfu,
        )
        row["numbers"] = {tag: _finite(value) for tag, value in record.numbers.items()}
        return {key: _finite(value) for key, value in row.items()}


def status_line(record: StepRecord, mfu: float | None, eta: timedelta) -> str:
    """The figures of a step in one line, most watched first."""
    parts = [
        f"loss {record.loss:.4f}",
        f"grad norm {record.grad_norm:.3g}",
        "lr " + " ".join(f"{module} {lr:.2e}" for module, lr in record.lrs.items()),
        f"{record.tokens_per_second:,.0f} tokens/s",
        f"{record.patches_per_second:,.0f} patches/s",
        f"fill {record.fill:.1%}",
    ]
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%}")
    if record.pair_accuracy is not None:
        parts.insert(1, f"pairs right {record.pair_accuracy:.1%}")
    if "reward/mean" in record.numbers:
        parts.insert(0, f"reward {record.numbers['reward/mean']:.3f}")
    if record.mtp_loss is not None:
        parts.insert(1, f"mtp loss {record.mtp_loss:.4f}")
    if record.vision_imbalance is not None:
        parts.append(f"vision imbalance {record.vision_imbalance:.2f}")
    if record.data_seconds is not None and record.data_seconds > _SHOWN_STALL * record.seconds:
        parts.append(f"waited for data {record.data_seconds / record.seconds:.0%}")
    if num_skipped := sum(record.skipped.values()):
        parts.append(f"skipped {num_skipped}")
    return " · ".join([*parts, f"{record.seconds:.2f} s", f"ETA {eta}"])


def _scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """A row as TensorBoard tags and values; what is unknown is left out."""
    named = {
        "train/loss": row["loss"],
        "train/mtp_loss": row["mtp_loss"],
        "train/pair_accuracy": row["pair_accuracy"],
        "train/grad_norm": row["grad_norm"],
        "data/fill": row["fill"],
        "data/skipped": sum(row["skipped"].values()),
        "speed/tokens_per_second": row["tokens_per_second"],
        "speed/patches_per_second": row["patches_per_second"],
        "speed/step_seconds": row["seconds"],
        "speed/mfu": row["mfu"],
        "speed/vision_imbalance": row["vision_imbalance"],
        "speed/data_stall": None if row["data_seconds"] is None else row["data_seconds"] / row["seconds"],
    }
    named |= {f"lr/{module}": lr for module, lr in row["lrs"].items()} | row["numbers"]
    return [(tag, value) for tag, value in named.items() if value is not None]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
