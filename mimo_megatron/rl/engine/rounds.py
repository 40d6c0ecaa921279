"""The engines of all ranks as one: rank 0 decides, every rank samples, in rounds of a fraction of a second.

A round is a broadcast of what to do and a gather of what has finished, so a rank that is lost is found by the same
means as in training, and there is no second network. A prompt travels as its question's id; every rank reads it from
the disk itself. Ranks without an engine (of vLLM only rank 0 has one) take part and do nothing.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist

from mimo_megatron.rl.engine.protocol import GenerationRequest, ReadPrompt, SamplingEngine
from mimo_megatron.types import EncodedSample, Rollout

_NO_PROMPT = EncodedSample("", np.zeros(0, np.int64), np.zeros(0, np.bool_))
_SLICE_SECONDS = 0.1


@dataclass(frozen=True)
class _Orders:
    """Of one round, to all ranks."""

    requests: tuple[tuple[int, str, GenerationRequest], ...] = ()
    """(rank, id of the question, the request without its prompt)"""
    aborted: tuple[str, ...] = ()
    seconds: float = 0.0
    is_last: bool = False


class Rounds:
    """Every rank's end. Objects travel over a gloo group of their own, which CUDA's queues do not hold up."""

    def __init__(self, local: SamplingEngine | None, read: ReadPrompt, at_round: Callable[[], None]) -> None:
        self._local, self._read, self._at_round = local, read, at_round
        self._group = dist.new_group(backend="gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        has: list[bool] = [False] * self.size
        dist.all_gather_object(has, local is not None, group=self._group)
        self.is_over = False
        """Whether the last round said that the batch is complete."""
        self.ranks_with_engine = [rank for rank in range(self.size) if has[rank]]

    def play(self, orders: _Orders) -> list[Rollout]:
        """One round; what finished on all ranks, on rank 0. Rank 0 gives the orders, the others' are not looked at."""
        self._at_round()
        box = [orders]
        dist.broadcast_object_list(box, src=0, group=self._group)
        found = self._obey(box[0])
        gathered: list[list[Rollout]] | None = [[] for _ in range(self.size)] if self.rank == 0 else None
        dist.gather_object(found, gathered, dst=0, group=self._group)
        self.is_over = box[0].is_last
        return [one for some in gathered or () for one in some]

    def follow(self) -> None:
        """The other ranks' part of a batch."""
        assert self.rank > 0
        self.is_over = False
        while not self.is_over:
            self.play(_Orders())

    def _obey(self, orders: _Orders) -> list[Rollout]:
        if self._local is None:
            return []
        self._local.abort(orders.aborted)
        for rank, question_id, request in orders.requests:
            if rank == self.rank:
                self._local.submit(replace(request, prompt=self._read(question_id)))
        return self._local.poll(orders.seconds)


class RoundsEngine:
    """Rank 0's side: a ``SamplingEngine`` that places each group on the rank with the fewest responses running."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._load = dict.fromkeys(rounds.ranks_with_engine, 0)
        self._placed: dict[str, tuple[int, int]] = {}
        self._requests: list[tuple[int, str, GenerationRequest]] = []
        self._aborted: list[str] = []

    @property
    def num_running(self) -> int:
        return sum(self._load.values())

    def submit(self, request: GenerationRequest) -> None:
        rank = min(self._load, key=lambda one: (self._load[one], one))
        self._load[rank] += request.num_responses
        self._placed[request.id] = rank, request.num_responses
        self._requests.append((rank, request.prompt.id, replace(request, prompt=_NO_PROMPT)))

    def abort(self, request_ids: Collection[str]) -> None:
        names = set(request_ids)
        for name in names & set(self._placed):
            rank, num_left = self._placed.pop(name)
            self._load[rank] -= num_left
        self._requests = [one for one in self._requests if one[2].id not in names]
        self._aborted += sorted(names)

    def poll(self, seconds: float) -> list[Rollout]:
        orders = _Orders(tuple(self._requests), tuple(self._aborted), min(seconds, _SLICE_SECONDS))
        self._requests, self._aborted = [], []
        found = [one for one in self._rounds.play(orders) if one.request_id in self._placed]
        for one in found:
            rank, num_left = self._placed[one.request_id]
            self._load[rank] -= 1
            self._placed[one.request_id] = rank, num_left - 1
        return found

    def finish(self) -> None:
        """Let the other ranks go on. Nothing runs any more."""
        assert not self.num_running, f"{self.num_running} responses still run"
        self._rounds.play(_Orders(aborted=tuple(self._aborted), is_last=True))
        self._aborted = []
        self._placed.clear()
