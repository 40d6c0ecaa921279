"""What all ranks settle before a step touches anything: whether to stop, and that they train on the same data.

One all-reduce (MAX) of 6 + 2 x dp int64 numbers over all ranks, the longest wait for data among them. Of each digest it
carries the number and its negative, so that every rank learns the largest and the smallest. Where they differ
because a rank could not decode its part of a pack's media, the ranks of that pack leave the sample out and look again;
else every rank raises the same error.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.loader import PackLoader, short_digest
from mimo_megatron.data.making import DECODING
from mimo_megatron.data.records import SampleError
from mimo_megatron.errors import DataError
from mimo_megatron.mcore.boot import world
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.types import PackedBatch

_ABSENT = -(2**63)
"""Below every digest and its negative."""

# Where files lie may differ from machine to machine; what is trained may not.
_PLACES: Mapping[str, set[str] | bool] = {"dir": True, "start_from": True, "data": {"sources", "tokenizer"}}


def recipe_digest(config: RunConfig) -> int:
    """Of every key but the paths."""
    text = config.model_dump_json(exclude=_PLACES)
    return short_digest(hashlib.sha256(text.encode()).digest())


class Agreement(NamedTuple):
    """Of all ranks."""

    stop: bool
    """Some rank wishes to."""
    waited_seconds: float
    """For the step's packs, by the rank that waited longest."""
    batches: list[PackedBatch]
    """What this data-parallel rank trains on: without the samples that one of its ranks could not decode."""


def agree(
    wishes_to_stop: bool,
    waited_seconds: float,
    recipe: int,
    loader: PackLoader,
    batches: list[PackedBatch],
    mesh: Mesh,
    device: torch.device,
    step: int,
) -> Agreement:
    """What holds for all ranks before ``step``, of which ``loader`` gave ``batches``. A collective over all ranks, with
    one host sync.

    ``DataError`` on all ranks where they hold different recipes, plans, or, within a data-parallel rank, packs.
    """
    while True:
        stop, waited, is_same = _compare(wishes_to_stop, waited_seconds, recipe, loader, mesh, device)
        if is_same:
            return Agreement(stop, waited, batches)
        views = gather_objects(_view(recipe, loader, mesh), world())
        if not _decoding_differs(views):
            raise DataError(divergence(step, [{**one.shared, one.packs: one.packs_digest} for one in views]))
        found = [one.undecoded for one in views if one.packs == views[dist.get_rank()].packs]
        faults = {number: SampleError(*row) for theirs in found for number, row in theirs.items()}
        batches = loader.leave_out(batches, faults)


class _View(NamedTuple):
    """Of one rank, where the ranks do not hold the same."""

    shared: Mapping[str, int]
    """Digests that must be equal on all ranks."""
    packs: str
    """Whose packs they are: the same words on all ranks that must have the same."""
    packs_digest: int
    undecoded: Mapping[int, tuple[str, str, str]]
    """Samples of these packs, by number, that could not be decoded: id, reason, detail."""


def _view(recipe: int, loader: PackLoader, mesh: Mesh) -> _View:
    faults = {number: fault for number, fault in loader.faults.items() if fault.reason in DECODING}
    return _View(
        {"recipe": recipe, "data plan": loader.plan_digest},
        f"packs of dp rank {mesh.dp.rank}",
        loader.packs_digest,
        {number: (fault.sample_id, fault.reason, fault.detail) for number, fault in faults.items()},
    )


def _decoding_differs(views: Sequence[_View]) -> bool:
    """Whether some rank left a sample out that another one of the same packs has: then to leave it out helps."""
    undecoded: dict[str, set[int]] = {}
    is_one_stream = all(one.shared == views[0].shared for one in views)
    return is_one_stream and any(undecoded.setdefault(one.packs, {*one.undecoded}) != {*one.undecoded} for one in views)


def _compare(
    wishes_to_stop: bool, waited_seconds: float, recipe: int, loader: PackLoader, mesh: Mesh, device: torch.device
) -> tuple[bool, float, bool]:
    """Whether to stop, the longest wait in seconds, whether all ranks hold the same."""
    own = [int(wishes_to_stop), round(waited_seconds * 1e6), recipe, -recipe, loader.plan_digest, -loader.plan_digest]
    packs = [_ABSENT, _ABSENT] * mesh.dp.size
    packs[2 * mesh.dp.rank : 2 * mesh.dp.rank + 2] = loader.packs_digest, -loader.packs_digest
    largest = torch.tensor(own + packs, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    stop, waited, *extremes = largest.tolist()
    is_same = all(high == -negative for high, negative in zip(extremes[::2], extremes[1::2], strict=True))
    return bool(stop), waited / 1e6, is_same


def divergence(step: int, facts: Sequence[Mapping[str, int]]) -> str:
    """What differs between the ranks, given every rank's digests by what they are of."""
    holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, own in enumerate(facts):
        for what, digest in own.items():
            holders[what][digest].append(rank)
    lines = []
    for what, digests in holders.items():
        if len(digests) > 1:
            by_size = sorted(digests.items(), key=lambda one: -len(one[1]))
            listed = "; ".join(f"{digest:016x} on {name_ranks(ranks)}" for digest, ranks in by_size)
            lines.append(f"{what}: {listed}")
    return (
        f"step {step}: the ranks do not train on the same thing, found before the forward pass; nothing was updated. "
        + ". ".join(lines)
        + ". Compare the recipe, the overrides and the indexed data folders on the machines of these ranks"
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1][1:] = [rank]
        else:
            ranges.append([rank])
    listed = ", ".join("-".join(map(str, one)) for one in ranges)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
