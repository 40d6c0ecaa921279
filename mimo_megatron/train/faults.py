"""A step that could not be taken, kept so that it can be taken again: its packs, its weights, its recipe.

``RUN/faults/step_000123/``: ``fault.json`` (what was seen, where, after which checkpoint), ``config.yaml``,
``weights/`` (a checkpoint without optimizer: the state before the step), ``packs_dp0000.pt`` and on (the microbatches
of each data-parallel rank). Pack files hold tensors and plain values only and are read with ``weights_only``.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimo_megatron.config.load import dump_resolved
from mimo_megatron.errors import CheckpointError, DataError, NonFiniteError
from mimo_megatron.mcore import checkpoint
from mimo_megatron.mcore.boot import world
from mimo_megatron.model.vision_share import all_pixels
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.train.agreement import name_ranks
from mimo_megatron.train.inspection import Inspection, MicrobatchView, inspect_step
from mimo_megatron.train.provenance import provenance
from mimo_megatron.train.run_folder import RunFolder
from mimo_megatron.train.step import Trainer
from mimo_megatron.types import PackedBatch, VisionLayout

WEIGHTS = "weights"
CONFIG = "config.yaml"
_FACTS_FILE = "fault.json"


def keep_fault(
    error: NonFiniteError, trainer: Trainer, batches: Sequence[PackedBatch], folder: RunFolder, step: int
) -> NonFiniteError:
    """``error`` with its cause named, after all that a replay needs was written. A collective over all ranks."""
    fault, mesh = folder.fault(step), trainer.mesh
    followed = folder.newest_checkpoint()
    if dist.get_rank() == 0:  # what an earlier attempt, perhaps on other ranks, left of the same step
        shutil.rmtree(fault, ignore_errors=True)
    dist.barrier()
    whole = [_with_all_pixels(batch, trainer) for batch in batches]
    inspection = inspect_step(trainer.config, mesh, trainer.device, trainer.chunks, batches)
    problem = ""
    try:
        checkpoint.save(fault / WEIGHTS, trainer.config.model, trainer.bare_chunks)
        if mesh.tp.rank == mesh.cp.rank == mesh.pp.rank == 0:
            write_packs(fault, mesh.dp.rank, whole)
        if dist.get_rank() == 0:
            dump_resolved(trainer.config, fault / CONFIG)
            facts = {
                "step": step,
                "error": str(error),
                "newest_checkpoint": followed.name if followed else None,
                "ranks": dist.get_world_size(),
                "layout": mesh.layout,
                "bad_weights": inspection.bad_weights,
                "microbatches": [_facts(one) for one in inspection.microbatches],
                **provenance(),
            }
            (fault / _FACTS_FILE).write_text(json.dumps(facts, indent=1, allow_nan=False))
    except (CheckpointError, OSError) as failed:  # what is wrong with the step matters more; it is said below
        problem = str(failed)
    # No rank ends, and takes the others with it, before all is written.
    problems = list(dict.fromkeys(filter(None, gather_objects(problem, world()))))
    again = f"mimo-megatron replay {fault} --ranks {dist.get_world_size()}"
    kept = f"The step is kept in {fault}: `{again}` takes it again. "
    if problems:
        kept = f"The step could not be kept whole in {fault}: {'; '.join(problems)}. "
    return NonFiniteError(
        f"{error}. {cause(inspection)} {kept}"
        "Lower the learning rate, lengthen the warm-up, or look at these samples with `mimo-megatron data preview`"
    )


def _with_all_pixels(batch: PackedBatch, trainer: Trainer) -> PackedBatch:
    """The pack with the pixels that the other ranks of its stage decoded. A collective over them."""
    sharing, pixels_Y = trainer.sharing, batch.pixels_Y
    if batch.pieces_held is None or sharing is None:
        return batch
    if batch.vision is not None:
        pixels_Y = all_pixels(gather_objects(pixels_Y, sharing.tp_cp), batch.vision, sharing)
    return replace(batch, pixels_Y=pixels_Y, pieces_held=None)


def _facts(view: MicrobatchView) -> dict[str, Any]:
    """For JSON, which has no words for what is not finite: null then."""
    facts = asdict(view) | {"is_finite": view.is_finite}
    facts["largest"] = [[name, norm if math.isfinite(norm) else None] for name, norm in view.largest]
    return facts | {"loss_sum": view.loss_sum if math.isfinite(view.loss_sum) else None}


def cause(inspection: Inspection) -> str:
    """Where the first number that is not finite stands."""
    parts = []
    if bad := inspection.bad_weights:
        parts.append(f"Weights that are not finite before the step: {', '.join(bad[:3])} ({len(bad)} in all).")
    if first := inspection.first_bad:
        num_bad = sum(not one.is_finite for one in inspection.microbatches)
        parts.append(f"First in {first}; computed by {name_ranks(first.ranks)}.")
        parts.append(f"{num_bad} of {len(inspection.microbatches)} microbatches are not finite.")
    else:
        largest = max(inspection.microbatches, key=lambda one: one.largest[0][1] if one.largest else 0.0)
        parts.append(
            "It did not show again when the microbatches were run one by one: gradients that overflow only in their "
            f"sum, or a device that computes wrongly. The largest: {largest}."
        )
    return " ".join(parts)


def write_packs(fault: Path, dp_rank: int, batches: Sequence[PackedBatch]) -> None:
    fault.mkdir(parents=True, exist_ok=True)
    torch.save([_plain(batch) for batch in batches], _pack_file(fault, dp_rank))


def read_packs(fault: Path) -> list[PackedBatch]:
    """All packs of the step, in the order in which they were dealt to the data-parallel ranks."""
    hands: list[list[PackedBatch]] = []
    while (path := _pack_file(fault, len(hands))).is_file():
        hands.append([_packed(row) for row in torch.load(path, weights_only=True)])
    if not hands:
        raise DataError(f"{fault} holds no packs_dp0000.pt; name a folder of a run's faults/, such as step_000123")
    return [pack for turn in zip(*hands, strict=True) for pack in turn]


def _pack_file(fault: Path, dp_rank: int) -> Path:
    return fault / f"packs_dp{dp_rank:04d}.pt"


def _plain(batch: PackedBatch) -> dict[str, Any]:
    row = {one.name: getattr(batch, one.name) for one in fields(batch)}
    return row | {"columns": dict(batch.columns), "vision": vars(batch.vision) if batch.vision else None}


def _packed(row: dict[str, Any]) -> PackedBatch:
    return PackedBatch(**row | {"vision": VisionLayout(**row["vision"]) if row["vision"] else None})
