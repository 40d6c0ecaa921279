"""Packs from a stream of which no index exists: a bounded buffer, and the fullest pack that holds its oldest sample.

With 128 waiting samples some subset nearly always fills a pack to the last token; it is found exactly, by dynamic
programming over sums as the bits of one number. Invariants: every sample in exactly one pack, no pack over a capacity;
at most ``buffer_samples`` wait; each pack takes the oldest, so a sample leaves with one of the ``buffer_samples`` packs
after its arrival; ``state`` is plain JSON, and a packer that loads it gives the same packs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mimo_megatron.errors import DataError


@dataclass(frozen=True)
class Waiting:
    """A sample by its name in the stream, a number or a text, and what it takes in a pack."""

    name: int | str
    num_tokens: int
    num_patches: int = 0


class StreamPacker:
    """Give it samples one by one; once the buffer is full, each further one makes it give packs.

    The order of packs, unlike that of a ``Plan``, depends on how the stream is divided over readers.
    """

    def __init__(self, token_capacity: int, patch_capacity: int, buffer_samples: int = 128) -> None:
        if min(token_capacity, patch_capacity, buffer_samples) < 1:
            raise DataError(
                f"capacities of {token_capacity} tokens and {patch_capacity} patches and a buffer of {buffer_samples} "
                "samples must all be at least 1"
            )
        self._token_capacity, self._patch_capacity = token_capacity, patch_capacity
        self._buffer_samples = buffer_samples
        self._waiting: list[Waiting] = []

    def push(self, sample: Waiting) -> list[Waiting] | None:
        """A pack, oldest first, if the buffer was full; room is made before the sample is taken in.

        ``DataError`` if the sample alone exceeds a capacity.
        """
        if not 0 <= sample.num_tokens <= self._token_capacity or not 0 <= sample.num_patches <= self._patch_capacity:
            raise DataError(
                f"sample {sample.name!r} has {sample.num_tokens} tokens and {sample.num_patches} patches but a pack "
                f"holds {self._token_capacity} and {self._patch_capacity}; raise the capacity or drop the sample"
            )
        pack = self._take() if len(self._waiting) == self._buffer_samples else None
        self._waiting.append(sample)
        return pack

    def drain(self) -> Iterator[list[Waiting]]:
        """The packs of all that wait; the last of them are not full."""
        while self._waiting:
            yield self._take()

    def state(self) -> dict[str, Any]:
        """What waits, as plain JSON."""
        return {"waiting": [asdict(one) for one in self._waiting]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._waiting = [Waiting(**one) for one in state["waiting"]]

    def _take(self) -> list[Waiting]:
        candidates = list(self._waiting)
        chosen = self._fullest(candidates)
        # Fullest in tokens; while that is too much in patches, the sample with the most of them may not come along.
        while sum(one.num_patches for one in chosen) > self._patch_capacity:
            candidates.remove(max(chosen[1:], key=lambda one: one.num_patches))
            chosen = self._fullest(candidates)
        taken = set(map(id, chosen))
        self._waiting = [one for one in self._waiting if id(one) not in taken]
        return chosen

    def _fullest(self, candidates: list[Waiting]) -> list[Waiting]:
        """The first candidate and those others that fill the rest of the pack best, older ones preferred."""
        room = self._token_capacity - candidates[0].num_tokens
        mask = (1 << room + 1) - 1
        sums = [1]  # bit s of sums[i]: the i newest candidates have a subset of s tokens
        for one in reversed(candidates[1:]):
            sums.append(sums[-1] | sums[-1] << one.num_tokens & mask)
        total = sums[-1].bit_length() - 1
        chosen = candidates[:1]
        for place, one in enumerate(candidates[1:]):
            without = sums[len(candidates) - 2 - place]
            if total >= one.num_tokens and without >> total - one.num_tokens & 1:
                chosen.append(one)
                total -= one.num_tokens
        return chosen
