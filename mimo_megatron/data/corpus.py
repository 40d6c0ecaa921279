"""The opened sources of a recipe, checked against it, as one list of samples numbered through all sources.

Invariants: every index was built with this tokenizer, these pixel limits and this system prompt; a sample whose
encoding has other lengths than the plan counted on is refused, so a pack never overflows.
"""

import bisect
import itertools

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.pack_cost import cost_by_flops
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.encode import length_settings
from mimo_megatron.data.energon import open_source
from mimo_megatron.data.media_part import ALL_MEDIA, MediaPart
from mimo_megatron.data.pairs import encode_stored
from mimo_megatron.data.plan import Plan
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.source import DataSource
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.types import EncodedSample, RawSample


class Corpus:
    """Samples by number: their ids, stored form and encoding. ``part`` of a pack's media is decoded, by ``make_pack``
    where it is not all."""

    def __init__(self, data: DataConfig, model: ModelConfig, part: MediaPart = ALL_MEDIA) -> None:
        self.data = data
        self.model = model
        self.part = part
        self.tokenizer = load_tokenizer(data.tokenizer, model.tokens, model.text.vocab_size)
        opened = [open_source(source, data.split, data.read) for source in data.sources]
        for source in opened:
            source.check_settings(length_settings(self.tokenizer, model, data))
        self.sources: tuple[DataSource, ...] = tuple(opened)
        sizes = [len(source.lengths.num_tokens_N) for source in self.sources]
        self._starts = [0, *itertools.accumulate(sizes)]

    def plan(self, seed: int) -> Plan:
        """The order and packs of these samples under this seed."""
        return Plan(
            [source.lengths for source in self.sources],
            [source.weight for source in self.data.sources],
            token_capacity=self.data.pack_tokens,
            patch_capacity=self.data.pack_patches,
            window_samples=self.data.window_samples,
            seed=seed,
            cost=self.data.cost or cost_by_flops(self.model),
        )

    def sample_id(self, number: int) -> str:
        source, index = self._locate(number)
        return source.sample_id(index)

    def planned_lengths(self, number: int) -> tuple[int, int]:
        """(tokens, patches) according to the index."""
        source, index = self._locate(number)
        return int(source.lengths.num_tokens_N[index]), int(source.lengths.num_patches_N[index])

    def count_by_source(self, numbers: NDArray[np.int64]) -> tuple[int, ...]:
        """How many of these samples each source has."""
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        return tuple(np.bincount(places, minlength=len(self.sources)).tolist())

    def read(self, number: int) -> RawSample:
        source, index = self._locate(number)
        return source.read(index)

    def encode(self, number: int) -> tuple[EncodedSample, ...]:
        """What the stored sample puts into a pack: one segment, or the two of a pair.

        ``SampleError`` if it is damaged or no longer what the index measured.
        """
        raw = self.read(number)
        samples = encode_stored(raw, self.tokenizer, self.model, self.data, decodes=self.part == ALL_MEDIA)
        found = sum(one.num_tokens for one in samples), sum(one.num_patches for one in samples)
        planned = self.planned_lengths(number)
        if found != planned:
            raise SampleError(
                raw.id, "lengths_changed", f"has (tokens, patches) {found}, but the index says {planned}; index again"
            )
        return samples

    def _locate(self, number: int) -> tuple[DataSource, int]:
        place = bisect.bisect_right(self._starts, number) - 1
        return self.sources[place], number - self._starts[place]
