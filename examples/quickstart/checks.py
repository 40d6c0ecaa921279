"""What must hold of a stage and of its export, read from the files they left."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from mimo_megatron.config.run import RunConfig
from mimo_megatron.convert.checkpoint_io import CheckpointReader
from mimo_megatron.convert.storage import same_bits
from mimo_megatron.errors import MimoError
from mimo_megatron.mcore.optimizer import MODULES

_ENDS = 1 / 3
"""Fraction of the steps at each end whose losses are compared. Of 20 steps of stage 4 the mean has a standard error of
0.04 from their samples alone, nearly what the stage learns."""


class CheckFailed(MimoError):
    """Something that the demo promises does not hold."""


def check_frozen(before: Path, after: Path, config: RunConfig) -> dict[str, tuple[int, int]]:
    """For each module (tensors that changed, tensors). A frozen module has changed in none, a trained one in some."""
    old, new = CheckpointReader(before), CheckpointReader(after)
    if old.tensors.keys() != new.tensors.keys():
        raise CheckFailed(f"{before} and {after} hold different tensors: {sorted(old.tensors.keys() ^ new.tensors)}")
    found = {}
    for module in MODULES:
        names = [name for name in old.tensors if name.startswith(f"{module}.")]
        changed = [name for name in names if not same_bits(old.read(name), new.read(name))]
        is_frozen = config.train.module(module).is_frozen
        if is_frozen and changed:
            raise CheckFailed(
                f"{config.name}: {module} is frozen, but {len(changed)} of its tensors changed: {changed[0]}"
            )
        if not is_frozen and not changed:
            raise CheckFailed(f"{config.name}: {module} is trained, but none of its {len(names)} tensors changed")
        found[str(module)] = (len(changed), len(names))
    return found


def check_loss(run_dir: Path) -> tuple[float, float]:
    """Mean loss of the trained tokens in the first and in the last third of the steps; the second is smaller."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    count = max(1, round(_ENDS * len(rows)))
    first, last = (
        fmean((row["loss"] for row in part), weights=[row["num_trained_tokens"] for row in part])
        for part in (rows[:count], rows[-count:])
    )
    if not last < first:
        raise CheckFailed(f"{run_dir}: the loss did not fall: {first:.4f} in the first third, {last:.4f} in the last")
    return first, last


def check_answers(ours: Sequence[Mapping[str, str]], theirs: Mapping[str, str]) -> int:
    """How many answers were compared; every one of ours is the other client's answer to the question of that id."""
    for row in ours:
        if row["answer"] != theirs[row["id"]]:
            raise CheckFailed(f"{row['id']}: generate says {row['answer']!r}, transformers {theirs[row['id']]!r}")
    return len(ours)
