"""Megatron's pipeline schedules as plain lists, and how long a step takes when every stage has its own times.

1F1B where ``vpp`` is 1, else interleaved 1F1B over groups of ``pp`` microbatches. The order on a rank does not depend
on times; a simulation only has to wait for what each operation needs: the stage before (forward) or behind (backward).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Operation(NamedTuple):
    kind: Literal["forward", "backward"]
    microbatch: int
    chunk: int
    """Of this pipeline rank: stage ``chunk * pp + rank``."""


def order(pp: int, vpp: int, rank: int, num_microbatches: int) -> list[Operation]:
    """What pipeline rank ``rank`` does, in order (megatron.core.pipeline_parallel.schedules)."""
    assert vpp == 1 or num_microbatches % pp == 0, "an interleaved schedule runs whole groups of pp microbatches"
    forward, backward = [], []
    if vpp == 1:
        places = [(microbatch, 0) for microbatch in range(num_microbatches)]
        num_warmup = pp - rank - 1
    else:
        places = [
            (first + one, chunk)
            for first in range(0, num_microbatches, pp)
            for chunk in range(vpp)
            for one in range(pp)
        ]
        num_warmup = 2 * (pp - rank - 1) + (vpp - 1) * pp
    for microbatch, chunk in places:
        forward.append(Operation("forward", microbatch, chunk))
        backward.append(Operation("backward", microbatch, vpp - 1 - chunk))
    num_warmup = min(num_warmup, len(places))
    steady = len(places) - num_warmup
    pairs = [one for pair in zip(forward[num_warmup:], backward[:steady], strict=True) for one in pair]
    return forward[:num_warmup] + pairs + backward[steady:]


@dataclass(frozen=True)
class Timeline:
    total: float
    busy: tuple[float, ...]
    """Seconds of work on each pipeline rank."""

    @property
    def bubble(self) -> float:
        """Share of all ranks' time that is spent waiting, for lighter stages too."""
        return 1 - sum(self.busy) / (len(self.busy) * self.total)

    @property
    def overhead(self) -> float:
        """How much longer than the busiest rank's work: (pp - 1) / (microbatches * vpp) for equal stages."""
        return self.total / max(self.busy) - 1


def simulate(
    forward: Sequence[float], backward: Sequence[float], pp: int, num_microbatches: int, *, transfer: float = 0.0
) -> Timeline:
    """The step of ``num_microbatches``, with seconds for every stage in order and for a hop between two ranks."""
    num_stages = len(forward)
    vpp = num_stages // pp
    orders = [order(pp, vpp, rank, num_microbatches) for rank in range(pp)]
    done: dict[tuple[str, int, int], float] = {}
    clock, place, busy = [0.0] * pp, [0] * pp, [0.0] * pp
    hop = transfer if pp > 1 else 0.0
    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for rank in range(pp):
            while place[rank] < len(orders[rank]):
                kind, microbatch, chunk = orders[rank][place[rank]]
                stage = chunk * pp + rank
                if kind == "forward":
                    needs, seconds = ("forward", microbatch, stage - 1) if stage else None, forward[stage]
                else:
                    is_last = stage == num_stages - 1
                    needs, seconds = None if is_last else ("backward", microbatch, stage + 1), backward[stage]
                if needs is not None and needs not in done:
                    break
                start = clock[rank] if needs is None else max(clock[rank], done[needs] + hop)
                clock[rank] = done[kind, microbatch, stage] = start + seconds
                busy[rank] += seconds
                place[rank] += 1
                remaining -= 1
        assert remaining < before, "the schedule waits for itself"
    return Timeline(max(clock), tuple(busy))


def step_timeline(
    forward: Sequence[float], backward: Sequence[float], pp: int, num_microbatches: int, *, transfer: float = 0.0
) -> Timeline:
    """``simulate`` for any number of microbatches: the steady part repeats, so a long step is a short one and more.

    Exact where the longest stage sets the pace by then; a test compares.
    """
    if pp == 1:
        busy = num_microbatches * (sum(forward) + sum(backward))
        return Timeline(busy, (busy,))
    few = 6 * pp
    if num_microbatches <= few:
        return simulate(forward, backward, pp, num_microbatches, transfer=transfer)
    few += num_microbatches % pp
    short = simulate(forward, backward, pp, few, transfer=transfer)
    shorter = simulate(forward, backward, pp, few - pp, transfer=transfer)
    groups = (num_microbatches - few) // pp
    return Timeline(
        short.total + groups * (short.total - shorter.total),
        tuple(one + groups * (one - less) for one, less in zip(short.busy, shorter.busy, strict=True)),
    )
