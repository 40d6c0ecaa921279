"""Scores of whole responses: each a segment of a pack, read at its last token; in any layout."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.data.packing import pack
from mimo_megatron.evaluation.opened import OpenModel
from mimo_megatron.mcore.boot import world
from mimo_megatron.mcore.schedule import run_forward
from mimo_megatron.model.local_pack import LocalPack, local_pack
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.types import EncodedSample

Score = tuple[int, int, float]
"""(pack, row, score)"""


def scores_of(
    open_model: OpenModel, parallel: ParallelConfig, samples: Sequence[EncodedSample], pack_tokens: int
) -> list[float]:
    """The score of every sample, in order, the same on every rank; each with ``reads_reward``. A collective.

    ``pack_tokens`` are the slots of a pack, raised to the longest sample and to what the layout divides. A score does
    not depend on what else is scored.
    """
    model, mesh = open_model.model, open_model.mesh
    lengths = [sample.num_tokens for sample in samples]
    unit = 2 * parallel.cp * parallel.tp
    num_slots = math.ceil(max([pack_tokens, *lengths]) / unit) * unit
    packs = [list(one) for one in pack(np.array(lengths), num_slots)] if samples else []
    found: list[Score] = []
    for number in range(mesh.dp.rank, len(packs), mesh.dp.size):
        members = [samples[one] for one in packs[number]]
        used = math.ceil(sum(one.num_tokens for one in members) / unit) * unit
        local = local_pack(collate(members, model.model_config, used), mesh.cp, sharing=model.sharing)

        def rows(rewards_R1: Tensor, local: LocalPack, number: int = number) -> list[Score]:
            numbers, scores = local.lanes[0].labels_R.tolist(), rewards_R1.squeeze(-1).tolist()
            return [(number, row, score) for row, score in zip(numbers, scores, strict=True)]

        for own in run_forward([model], [local.to(open_model.device)], used, rows):
            found += own
    everything = [one for rank in gather_objects(found, world()) for one in rank]
    by_row = {(number, row): score for number, row, score in everything}
    scores = [math.nan] * len(samples)
    for number, members_of in enumerate(packs):
        for row, member in enumerate(members_of):
            scores[member] = by_row[number, row]
    return scores
