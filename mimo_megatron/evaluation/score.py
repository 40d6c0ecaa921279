"""Log-probabilities of chat samples, token by token, from any checkpoint in any layout.

The forward is the training step's: samples packed, one pack a microbatch.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mimo_megatron.config.run import EncodingConfig, ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.data.packing import pack
from mimo_megatron.evaluation.opened import OpenModel, opened
from mimo_megatron.evaluation.output import check_out, write_lines
from mimo_megatron.loss.cross_entropy import token_losses
from mimo_megatron.mcore.boot import RankAddress, world
from mimo_megatron.mcore.schedule import run_forward
from mimo_megatron.model.local_pack import LocalPack, local_pack
from mimo_megatron.parallel import zigzag
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.types import EncodedSample

DEFAULT_PACK_TOKENS = 8192


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, and where to."""

    source: Path
    """A checkpoint of ours or a Hugging Face folder."""
    samples: Path
    """JSONL of ``{"id", "messages"}``; image and video paths are relative to it."""
    out: Path
    parallel: ParallelConfig
    encoding: EncodingConfig
    scratch: Path
    """A folder that all ranks see, for the conversion of a Hugging Face folder; nothing is left in it."""
    pack_tokens: int = DEFAULT_PACK_TOKENS
    """Slots of a pack; raised to the longest sample."""


@dataclass(frozen=True)
class _SlotLogprobs:
    """What one rank found in one pack: global slots, and the log-probability of the token after each."""

    pack: int
    slots: list[int]
    logprobs: list[float]


def score(address: RankAddress, request: ScoreRequest) -> None:
    """Write a row ``{"id", "token_ids", "logprobs"}`` for every sample, in the samples' order.

    ``logprobs[i]`` is log p(token i + 1 | tokens up to i): one value for every token after the first. The file appears
    under its name when it is complete.
    """
    if address.rank == 0:
        check_out(request.out)
    with opened(request.source, request.parallel, request.encoding, address, request.scratch) as open_model:
        samples = [_every_token(open_model.encode(raw)) for raw in read_jsonl(request.samples)]
        num_slots = _slots(samples, request)
        packs = [list(one) for one in pack([sample.num_tokens for sample in samples], num_slots)]
        found = _score_packs(open_model, samples, packs, num_slots)
        everything = [one for rank in gather_objects(found, world()) for one in rank]
        if address.rank == 0:
            write_lines(request.out, map(json.dumps, _rows(samples, packs, everything)))


def _every_token(sample: EncodedSample) -> EncodedSample:
    return replace(sample, loss_mask_T=np.ones(sample.num_tokens, dtype=np.bool_))


def _slots(samples: Sequence[EncodedSample], request: ScoreRequest) -> int:
    """Slots of a pack, rounded up to what the layout divides."""
    longest = max((sample.num_tokens for sample in samples), default=1)
    unit = 2 * request.parallel.cp * request.parallel.tp
    return math.ceil(max(longest, request.pack_tokens) / unit) * unit


def _score_packs(
    open_model: OpenModel, samples: Sequence[EncodedSample], packs: Sequence[Sequence[int]], num_slots: int
) -> list[_SlotLogprobs]:
    """This rank's part of the packs; empty on all but the last stage's first tp rank."""
    model, mesh = open_model.model, open_model.mesh
    numbers = range(mesh.dp.rank, len(packs), mesh.dp.size)
    found = []
    for number in numbers:
        batch = collate([samples[one] for one in packs[number]], model.model_config, num_slots)
        local = local_pack(batch, mesh.cp, sharing=model.sharing)
        slots = zigzag.local_slots(num_slots, mesh.cp.rank, mesh.cp.size)

        def use(logits_RV: Tensor, local: LocalPack, slots: Tensor = slots, number: int = number) -> _SlotLogprobs:
            losses_R = token_losses(logits_RV, local.lanes[0].labels_R, mesh.tp)
            return _SlotLogprobs(number, slots[local.lanes[0].rows_R.cpu()].tolist(), (-losses_R).tolist())

        found += run_forward([model], [local.to(open_model.device)], num_slots, use)
    return found if mesh.tp.rank == 0 else []


def _rows(
    samples: Sequence[EncodedSample], packs: Sequence[Sequence[int]], found: Sequence[_SlotLogprobs]
) -> Iterator[dict[str, Any]]:
    by_slot: list[dict[int, float]] = [{} for _ in packs]
    for one in found:
        by_slot[one.pack].update(zip(one.slots, one.logprobs, strict=True))
    first_slot = {}
    for number, members in enumerate(packs):
        start = 0
        for member in members:
            first_slot[member] = (number, start)
            start += samples[member].num_tokens
    for member, sample in enumerate(samples):
        number, start = first_slot[member]
        logprobs = [by_slot[number][start + token] for token in range(sample.num_tokens - 1)]
        yield {"id": sample.id, "token_ids": sample.token_ids_T.tolist(), "logprobs": logprobs}
