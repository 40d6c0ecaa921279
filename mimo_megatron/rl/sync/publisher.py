"""The trainer's side of an update: shards of any layout to whole tensors under Hugging Face names, bucket by bucket.

The converter's own rules name and cut the tensors. For each bucket, on the pipeline ranks that own something of it: one
all-gather over tp of all shards, end to end; then over pp one broadcast for each run of tensors of one owner. cp and dp
ranks hold the same weights and do the same. Invariants:

* Order and cutting are a function of the model and the bucket size alone, the same on every rank of every layout.
* What every rank receives is, bit for bit, what the converter would write of the same weights.
* Parameters are read when a bucket is made: no copy of an earlier step can be sent.
* Beyond the model's own shards a rank holds one bucket, one of gathered shards, one rank's shards of a bucket, and the
  largest tensor.

Multi-token-prediction layers are not sent, for engines sample without them; nor is the second name of a tied head.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from xxhash import xxh3_64

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_io import DTYPE_NAMES, DTYPES
from mimo_megatron.convert.rules import Rule
from mimo_megatron.convert.storage import Scratch
from mimo_megatron.errors import ConfigError, SyncError
from mimo_megatron.mcore import weights
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.rl.sync.buckets import (
    Bucket,
    Manifest,
    PackedTensor,
    TensorEntry,
    checksum,
    copy_hashed,
    offsets_of,
    round_up,
    view,
)

DEFAULT_BUCKET_BYTES = 256 << 20
Readers = Literal["all", "first"]
Room = Callable[[int], Tensor]
"""Memory for a bucket of so many bytes, uint8 on the CPU, its start aligned to 64 bytes: a slot of shared memory."""
_UNSENT = "text.mtp."
_DTYPE_NAMES = tuple(DTYPES)


@dataclass(frozen=True)
class _Unit:
    """The Hugging Face tensors of one rule; they stay in one bucket."""

    rule: Rule
    owner: int
    """The pipeline rank that holds ours."""
    entries: tuple[TensorEntry, ...]
    offsets: tuple[int, ...]
    """In the bucket."""

    @property
    def end(self) -> int:
        return self.offsets[-1] + self.entries[-1].num_bytes

    def views(self, data: Tensor) -> list[Tensor]:
        """The tensors where they lie in the bucket's bytes."""
        return [view(data, entry, offset) for entry, offset in zip(self.entries, self.offsets, strict=True)]


class Publisher:
    """``manifest(version)``, then ``buckets(version)``: collectives, which every rank of the job calls alike.

    ``readers`` says who needs the buckets: "all" ranks, or the "first" alone, which spares the others the work: their
    ``buckets`` only take part, and yield nothing.
    """

    def __init__(
        self,
        chunks: Iterable[Module],
        model: ModelConfig,
        mesh: Mesh,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        readers: Readers = "all",
    ):
        if model.text.head == "reward":
            raise ConfigError("a reward model samples nothing, so its weights are not published; text.head: vocabulary")
        if bucket_bytes < 1:
            raise ConfigError(f"a bucket of {bucket_bytes} bytes holds nothing; the default is {DEFAULT_BUCKET_BYTES}")
        self._mesh, self._readers = mesh, readers
        self._parameters = dict(weights.global_parameters(chunks))
        text = model.text.model_copy(update={"num_mtp_layers": 0})
        rules = rules_for(model.model_copy(update={"text": text}))
        self._device = next(iter(self._parameters.values())).device
        self._buckets = _cut(self._placed(rules), bucket_bytes)
        self._host, self._staging = Scratch(), Scratch(self._device)
        self._shards, self._gathered, self._joined = (Scratch(self._device) for _ in range(3))

    def manifest(self, version: int) -> Manifest:
        """What ``buckets(version)`` will hold."""
        entries = (entry for bucket in self._buckets for unit in bucket for entry in unit.entries)
        return Manifest(version, tuple(entries))

    @property
    def largest_bucket_bytes(self) -> int:
        """What a ``room`` is asked for at most: the bucket size, or the tensors of the largest rule."""
        return max(bucket[-1].end for bucket in self._buckets)

    @torch.no_grad()
    def buckets(self, version: int, room: Room | None = None) -> Iterator[Bucket]:
        """The parameters' values as they are now. A bucket lies where ``room`` says; where there is none, in memory
        that the next bucket overwrites."""
        cp, dp, tp = self._mesh.cp, self._mesh.dp, self._mesh.tp
        is_first = self._readers == "first"
        if is_first and (cp.rank or dp.rank):
            return
        writes, yields = not is_first or tp.rank == 0, not is_first or tp.rank == self._mesh.pp.rank == 0
        for number, units in enumerate(self._buckets):
            num_bytes = units[-1].end
            data = (room if yields and room else self._take_host)(num_bytes)
            checksums = self._fill(data, units, writes)
            if yields:
                yield Bucket(version, number, _packed(units, checksums), data)

    def _take_host(self, num_bytes: int) -> Tensor:
        # Of the largest at once: to grow it would take both while the reader still holds the last bucket.
        return self._host.take(self.largest_bucket_bytes, torch.uint8)[:num_bytes]

    def _fill(self, data: Tensor, units: Sequence[_Unit], writes: bool) -> list[int]:
        """Checksums of the units' tensors, which are now in ``data``; nothing where this rank does not write."""
        pp, is_on_host = self._mesh.pp, self._device.type == "cpu"
        filled = data if is_on_host else self._staging.take(data.numel(), torch.uint8)
        own = [unit for unit in units if unit.owner == pp.rank]
        checksums = {}
        for unit, ours in zip(own, self._whole([unit.rule for unit in own]), strict=True):
            if writes:
                checksums[unit.rule.ours.name] = _write(unit, ours, filled)
        if not writes:
            return []
        if pp.size > 1:
            for owner, start, end in _runs(units):
                dist.broadcast(filled[start:end], group=pp.group, group_src=owner)
        if not is_on_host:
            data.copy_(filled)
            checksums = {unit.rule.ours.name: [checksum(one) for one in unit.views(data)] for unit in own}
        found = [one for unit in units for one in checksums.get(unit.rule.ours.name, [0] * len(unit.entries))]
        return self._summed(found) if pp.size > 1 else found

    def _summed(self, checksums: Sequence[int]) -> list[int]:
        """Those of all pipeline ranks; each tensor has one owner, and the others give 0."""
        signed = np.array(checksums, dtype=np.uint64).view(np.int64)
        total = torch.from_numpy(signed).to(self._device)
        dist.all_reduce(total, group=self._mesh.pp.group)
        return total.cpu().numpy().view(np.uint64).tolist()

    def _whole(self, rules: Sequence[Rule]) -> Iterator[Tensor]:
        """Ours, whole, one after another; one all-gather for all that are cut over tp."""
        tp = self._mesh.tp
        params = [self._parameters[rule.ours.name].detach() for rule in rules]
        is_cut = [weights.is_cut(self._parameters[rule.ours.name], tp) for rule in rules]
        starts, end = [], 0
        for param, cut in zip(params, is_cut, strict=True):
            starts.append(end)
            end += round_up(param.nbytes) if cut else 0
        parts_RB = self._gather([p for p, cut in zip(params, is_cut, strict=True) if cut], end) if end else None
        for rule, param, cut, start in zip(rules, params, is_cut, starts, strict=True):
            if cut:
                assert parts_RB is not None
                shards = parts_RB[:, start : start + param.nbytes].view(param.dtype).view(tp.size, *param.shape)
                whole = self._joined.take(rule.ours.numel, param.dtype).view(rule.ours.shape)
                yield weights.join(rule.ours.name, shards.unbind(), self._parameters[rule.ours.name], whole)
            else:
                yield param

    def _gather(self, shards: Sequence[Tensor], num_bytes: int) -> Tensor:
        """uint8 [tp, num_bytes]: every tp rank's shards, each at a multiple of 64 bytes."""
        tp = self._mesh.tp
        local_B = self._shards.take(num_bytes, torch.uint8)
        start = 0
        for shard in shards:
            local_B[start : start + shard.nbytes].view(shard.dtype).view(shard.shape).copy_(shard)
            start += round_up(shard.nbytes)
        parts_RB = self._gathered.take(tp.size * num_bytes, torch.uint8).view(tp.size, num_bytes)
        dist.all_gather_into_tensor(parts_RB, local_B.unsqueeze(0), group=tp.group)
        return parts_RB

    def _placed(self, rules: Sequence[Rule]) -> list[_Unit]:
        """The rules with their owners and dtypes, not yet cut to buckets; offsets begin at 0 in each.

        One all-reduce over pp, in which the first pipeline rank that holds a tensor wins (a tied head is there twice).
        It also tells every rank of a parameter that one of them cannot publish.
        """
        pp = self._mesh.pp
        own_faults = self._faults(rules)
        facts = torch.zeros(len(rules) + 1, 2, dtype=torch.int64)
        facts[-1, 0] = len(own_faults)
        for row, rule in zip(facts[:-1], rules, strict=True):
            if (param := self._parameters.get(rule.ours.name)) is not None:
                row[0], row[1] = pp.size - pp.rank, _DTYPE_NAMES.index(DTYPE_NAMES[param.dtype])
        if pp.size > 1:
            facts = facts.to(self._device)
            dist.all_reduce(facts, dist.ReduceOp.MAX, group=pp.group)
        *placed, (num_faults, _) = facts.tolist()
        if num_faults:
            which = "; ".join(own_faults) or "named by another pipeline rank"
            raise SyncError(f"some parameters cannot be published: {which}; add their rules to convert/")
        units = []
        for rule, (rank_from_last, dtype) in zip(rules, placed, strict=True):
            if not rank_from_last:
                raise SyncError(f"no pipeline rank holds {rule.ours.name}: the model is not the one that is configured")
            entries = tuple(TensorEntry(spec.name, _DTYPE_NAMES[dtype], spec.shape) for spec in rule.hf)
            units.append(_Unit(rule, pp.size - rank_from_last, entries, tuple(offsets_of(entries)[0])))
        return units

    def _faults(self, rules: Sequence[Rule]) -> list[str]:
        """The parameters that have no rule, or another shape than its."""
        shapes = {rule.ours.name: rule.ours.shape for rule in rules}
        found = ((name, weights.whole_shape(param, self._mesh.tp)) for name, param in self._parameters.items())
        return [
            f"{name} {list(shape)} (the converter has {shapes.get(name, 'no such tensor')})"
            for name, shape in found
            if shapes.get(name) != shape and not name.startswith(_UNSENT)
        ]


def _write(unit: _Unit, ours: Tensor, filled: Tensor) -> list[int]:
    """Checksums of the unit's tensors, now in the bucket's bytes; none of what is not on the host."""
    views = unit.views(filled)
    digests = [xxh3_64() for _ in views]
    for source, there, here in unit.rule.moves_to_hf(ours, views):
        if here.device.type == "cpu":
            copy_hashed(there, here, digests[source])
        else:
            there.copy_(here)
    return [digest.intdigest() for digest in digests]


def _cut(units: Sequence[_Unit], bucket_bytes: int) -> list[list[_Unit]]:
    """The units in their order, in buckets of at most ``bucket_bytes``; one that is larger has a bucket of its own."""
    buckets: list[list[_Unit]] = []
    for unit in units:
        start = round_up(buckets[-1][-1].end) if buckets else 0
        if not buckets or start + unit.end > bucket_bytes:
            buckets.append([])
            start = 0
        buckets[-1].append(replace(unit, offsets=tuple(start + offset for offset in unit.offsets)))
    return buckets


def _runs(units: Sequence[_Unit]) -> Iterator[tuple[int, int, int]]:
    """(owner, start, end) of the bucket's bytes, wherever the owner changes."""
    for owner, group in itertools.groupby(units, key=lambda unit: unit.owner):
        run = list(group)
        yield owner, run[0].offsets[0], run[-1].end


def _packed(units: Sequence[_Unit], checksums: Sequence[int]) -> tuple[PackedTensor, ...]:
    placed = [pair for unit in units for pair in zip(unit.entries, unit.offsets, strict=True)]
    return tuple(PackedTensor(*pair, one) for pair, one in zip(placed, checksums, strict=True))
