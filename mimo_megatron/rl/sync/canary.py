"""Engine against trainer: the log-probabilities of a few fixed prompts, after every update of the engine's weights.

Checksums show that the bytes arrived. The canary shows that they mean the same: that no cache of the old weights is
left, no tensor went to another's place, and that both sides read the same tokens and pixels.

Dims: S slots of a pack, T tokens of a sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.rl import SyncConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import SyncError
from mimo_megatron.loss.cross_entropy import Logits, token_losses
from mimo_megatron.mcore.boot import world
from mimo_megatron.mcore.schedule import run_forward
from mimo_megatron.model.local_pack import LocalPack
from mimo_megatron.parallel import zigzag
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.train.step import Trainer, local_packs
from mimo_megatron.types import EncodedSample


@dataclass(frozen=True)
class Gap:
    """|log p of the engine - log p of the trainer| over the tokens of one kind of prompt."""

    mean: float
    largest: float


def trainer_logprobs(trainer: Trainer, samples: Sequence[EncodedSample]) -> list[NDArray[np.float32]]:
    """[T - 1] of each sample: log p(token i + 1 | tokens up to i), in the trainer's own layout. Every rank calls it and
    gets them all. They are one pack; the ranks of other data-parallel shares compute the same."""
    mesh, model = trainer.mesh, trainer.config.model
    unit = 2 * mesh.cp.size * mesh.tp.size
    num_slots = math.ceil(sum(one.num_tokens for one in samples) / unit) * unit
    every_token = [
        EncodedSample(one.id, one.token_ids_T, np.ones(one.num_tokens, np.bool_), one.media) for one in samples
    ]
    batch = collate(every_token, model, num_slots)
    (pack,) = local_packs(model.text, mesh, trainer.bare_chunks, [batch])
    slots = zigzag.local_slots(num_slots, mesh.cp.rank, mesh.cp.size)

    def use(logits_RV: Logits, pack: LocalPack) -> dict[int, float]:
        losses_R = token_losses(logits_RV, pack.lanes[0].labels_R, mesh.tp)
        return dict(zip(slots[pack.lanes[0].rows_R.cpu()].tolist(), (-losses_R).tolist(), strict=True))

    found = run_forward(trainer.bare_chunks, [pack.to(trainer.device)], num_slots, use)
    own = found[0] if found and mesh.tp.rank == 0 and mesh.dp.rank == 0 else {}
    by_slot = {slot: value for rank in gather_objects(own, world()) for slot, value in rank.items()}
    bounds = batch.segment_bounds
    return [
        np.array([by_slot[bounds[place] + token] for token in range(one.num_tokens - 1)], np.float32)
        for place, one in enumerate(samples)
    ]


def compare(
    engine: Sequence[NDArray[np.float32]], trainer: Sequence[NDArray[np.float32]], limits: SyncConfig, version: int
) -> list[Gap]:
    """The gap of each prompt. ``SyncError`` where one is above the recipe's limits, or is no number."""
    gaps = []
    for number, (theirs, ours) in enumerate(zip(engine, trainer, strict=True)):
        apart = np.abs(theirs.astype(np.float64) - ours)
        gap = Gap(float(apart.mean()), float(apart.max()))
        if not (gap.mean <= limits.max_mean_gap and gap.largest <= limits.max_gap):
            raise SyncError(
                f"policy version {version}: at prompt {number} of the canary, engine and trainer differ by "
                f"{gap.mean:.4g} on average and by up to {gap.largest:.4g} in log-probability; rl.sync.max_mean_gap is "
                f"{limits.max_mean_gap} and max_gap {limits.max_gap}. Nothing was sampled with these weights"
            )
        gaps.append(gap)
    return gaps
