"""The order of all samples and their packs: a function of (seed, epoch, window) alone.

An epoch takes an exact number of samples from each source, shuffles them all together, and cuts the order into
windows of equal size; each window is packed on its own, into packs of nearly equal predicted cost, which are shuffled.
Nothing but ``deal`` knows how many processes train. Invariants (N samples in all, numbered through the sources):

* A source gives ``round(share * N)`` samples an epoch, and over epochs uses each of its samples equally often (+- 1).
* Every sample drawn for a window is in exactly one of its packs, and no pack exceeds a capacity.
* Samples over a capacity are never drawn; they are listed in ``over_capacity``.
* A step has the same packs for any number of ranks; only who takes which of them depends on it.
* The packs after a position depend on the plan and the position, not on how the position was reached.
"""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.pack_cost import PackCost
from mimo_megatron.data.balance import deal, pack_balanced, sample_costs
from mimo_megatron.data.source import SampleLengths, joined
from mimo_megatron.errors import ConfigError

TOKENS_ALONE = PackCost(per_token=1)

# First word of the entropy of each random stream, so that no two uses share a stream.
_SOURCE, _EPOCH, _WINDOW = range(3)


@dataclass(frozen=True)
class Position:
    """A place in the endless stream of packs: how many packs of this epoch were taken."""

    epoch: int
    consumed: int


class Plan:
    """The packs of a run, as arrays of sample numbers. ``fingerprint`` identifies the stream."""

    def __init__(
        self,
        lengths: Sequence[SampleLengths],
        weights: Sequence[float],
        *,
        token_capacity: int,
        patch_capacity: int,
        window_samples: int,
        seed: int,
        cost: PackCost = TOKENS_ALONE,
    ) -> None:
        self._seed = seed
        self._cost = cost
        self._capacities = (token_capacity, patch_capacity)
        self._lengths = joined(lengths)
        self._costs = sample_costs(self._lengths, cost, token_capacity, patch_capacity)
        fits = (self._lengths.num_tokens_N <= token_capacity) & (self._lengths.num_patches_N <= patch_capacity)
        self.over_capacity: NDArray[np.int64] = np.flatnonzero(~fits)
        starts = np.cumsum([0, *(len(one.num_tokens_N) for one in lengths)])
        self._members = [start + np.flatnonzero(fits[start:end]) for start, end in itertools.pairwise(starts)]
        empty = [place for place, members in enumerate(self._members) if not len(members)]
        if empty:
            raise ConfigError(
                f"data.sources {empty} (counted from 0) have no sample that fits a pack of {token_capacity} tokens and "
                f"{patch_capacity} patches; raise data.pack_tokens or data.pack_patches, or remove the source"
            )
        self.draws = _draws_per_epoch([len(members) for members in self._members], weights)
        self.samples_per_epoch = sum(self.draws)
        self.num_windows = -(-self.samples_per_epoch // window_samples)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))
        self._window: tuple[int, int, list[NDArray[np.int64]]] = (-1, -1, [])
        self._packs_before: tuple[int, list[int]] = (-1, [0])
        self.fingerprint = self._fingerprint(weights, window_samples)

    def window_packs(
        self, epoch: int, window: int, is_cancelled: Callable[[], bool] | None = None
    ) -> list[NDArray[np.int64]]:
        """The packs of one window in training order, each an array of sample numbers.

        ``RuntimeError`` where ``is_cancelled``, which is asked now and then, says so.
        """
        if self._window[:2] != (epoch, window):
            order = self._epoch_order(epoch)
            start, end = (len(order) * place // self.num_windows for place in (window, window + 1))
            drawn = order[start:end]
            lengths, costs = self._lengths.take(drawn), self._costs.take(drawn)
            packs = pack_balanced(lengths, costs, *self._capacities, is_cancelled)
            turn = self._random(_WINDOW, epoch, window).permutation(len(packs))
            self._window = (epoch, window, [drawn[packs[pack]] for pack in turn])
        return self._window[2]

    def take(
        self, position: Position, num_packs: int, is_cancelled: Callable[[], bool] | None = None
    ) -> tuple[list[NDArray[np.int64]], Position]:
        """The next ``num_packs`` packs and the position after them; windows and epochs follow one another.

        ``is_cancelled`` as for ``window_packs``.
        """
        taken: list[NDArray[np.int64]] = []
        epoch, consumed = position.epoch, position.consumed
        while len(taken) < num_packs:
            window, first = self._find(epoch, consumed, is_cancelled)
            if window == self.num_windows:
                epoch, consumed = epoch + 1, 0
                continue
            found = self.window_packs(epoch, window, is_cancelled)[consumed - first :][: num_packs - len(taken)]
            taken += found
            consumed += len(found)
        return taken, Position(epoch, consumed)

    def deal(self, packs: Sequence[NDArray[np.int64]], num_ranks: int) -> list[list[int]]:
        """The places of each rank's packs in a step's ``packs``: equally many, of nearly equal predicted cost."""
        costs, vision = ([int(cost[pack].sum()) for pack in packs] for cost in self._costs)
        return deal(costs, vision, num_ranks)

    def _find(self, epoch: int, consumed: int, is_cancelled: Callable[[], bool] | None) -> tuple[int, int]:
        """The window that holds this pack of the epoch, and the packs before it.

        One past the last window if the epoch has no such pack. Earlier windows are packed once to count them.
        """
        if self._packs_before[0] != epoch:
            self._packs_before = (epoch, [0])
        before = self._packs_before[1]
        while before[-1] <= consumed and len(before) <= self.num_windows:
            before.append(before[-1] + len(self.window_packs(epoch, len(before) - 1, is_cancelled)))
        if before[-1] <= consumed:
            return self.num_windows, before[-1]
        window = bisect.bisect_right(before, consumed) - 1
        return window, before[window]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            drawn = np.concatenate([self._drawn(source, epoch) for source in range(len(self._members))])
            self._order = (epoch, self._random(_EPOCH, epoch).permutation(drawn))
        return self._order[1]

    def _drawn(self, source: int, epoch: int) -> NDArray[np.int64]:
        """This epoch's slice of the source's endless row of permutations."""
        members = self._members[source]
        start, end = epoch * self.draws[source], (epoch + 1) * self.draws[source]
        rounds = range(start // len(members), -(-end // len(members)))
        row = [self._random(_SOURCE, source, number).permutation(members) for number in rounds]
        first = start - rounds.start * len(members)
        return np.concatenate(row)[first : first + end - start]

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, *stream])))

    def _fingerprint(self, weights: Sequence[float], window_samples: int) -> str:
        sizes = [len(members) for members in self._members]
        digest = hashlib.sha256(repr((list(weights), window_samples, self._capacities, self._cost, sizes)).encode())
        for array in (*self._members, self._lengths.num_tokens_N, self._lengths.num_patches_N, *self._costs):
            digest.update(array.tobytes())
        # Another numpy may permute in another way, another packer may pack in another way: the first packs tell.
        for pack in self.window_packs(0, 0):
            digest.update(pack.tobytes() + b"|")
        return digest.hexdigest()[:16]


def _draws_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    total, weight = sum(sizes), sum(weights)
    draws = [round(one / weight * total) for one in weights]
    starved = [place for place, one in enumerate(draws) if one == 0]
    if starved:
        raise ConfigError(
            f"data.sources {starved} (counted from 0) have weights so small that round(weight / {weight:g} * {total}) "
            "is 0 samples an epoch; raise the weights or remove the sources"
        )
    return draws
