"""The opened sources of a recipe, checked against it, as one list of samples numbered through all sources.

Where a recipe has long texts split, each part of one is a sample of this list.

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
from mimo_megatron.data.parts import parts_of, splits_texts
from mimo_megatron.data.plan import Plan
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.source import DataSource
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import ConfigError
from mimo_megatron.types import EncodedSample, RawSample


class Corpus:
    """Samples by number: their ids, stored form and encoding. ``part`` of a pack's media is decoded, by ``make_pack``
    where it is not all."""

    def __init__(self, data: DataConfig, model: ModelConfig, part: MediaPart = ALL_MEDIA) -> None:
        if not data.sources:
            raise ConfigError("data.sources is empty; a recipe with the section rl is run by `mimo-megatron rl`")
        self.data = data
        self.model = model
        self.part = part
        self.tokenizer = load_tokenizer(data.tokenizer, model.tokens, model.text.vocab_size)
        opened = [open_source(source, data.split, data.read) for source in data.sources]
        for source in opened:
            source.check_settings(length_settings(self.tokenizer, model, data))
        self.sources: tuple[DataSource, ...] = tuple(opened)
        self.parts = tuple(
            parts_of(source.lengths, data.pack_tokens, splits=splits_texts(recipe, model))
            for source, recipe in zip(self.sources, data.sources, strict=True)
        )
        self._starts = [0, *itertools.accumulate(map(len, self.parts))]

    def plan(self, seed: int) -> Plan:
        """The order and packs of these samples under this seed."""
        return Plan(
            [parts.lengths for parts in self.parts],
            [source.weight for source in self.data.sources],
            token_capacity=self.data.pack_tokens,
            patch_capacity=self.data.pack_patches,
            window_samples=self.data.window_samples,
            seed=seed,
            cost=self.data.cost or cost_by_flops(self.model),
        )

    def sample_id(self, number: int) -> str:
        place, index = self._locate(number)
        parts = self.parts[place]
        return parts.name(index, self.sources[place].sample_id(int(parts.sample_N[index])))

    def planned_lengths(self, number: int) -> tuple[int, int]:
        """(tokens, patches) according to the index."""
        place, index = self._locate(number)
        lengths = self.parts[place].lengths
        return int(lengths.num_tokens_N[index]), int(lengths.num_patches_N[index])

    def count_by_source(self, numbers: NDArray[np.int64]) -> tuple[int, ...]:
        """How many of these samples each source has."""
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        return tuple(np.bincount(places, minlength=len(self.sources)).tolist())

    def read(self, number: int) -> RawSample:
        """The stored sample, whole where this is a part of it."""
        place, index = self._locate(number)
        return self.sources[place].read(int(self.parts[place].sample_N[index]))

    def encode(self, number: int) -> tuple[EncodedSample, ...]:
        """What the sample puts into a pack: one segment, or the two of a pair.

        ``SampleError`` if it is damaged or no longer what the index measured.
        """
        raw = self.read(number)
        samples = encode_stored(raw, self.tokenizer, self.model, self.data, decodes=self.part == ALL_MEDIA)
        found = sum(one.num_tokens for one in samples), sum(one.num_patches for one in samples)
        place, index = self._locate(number)
        lengths, stored = self.sources[place].lengths, self.parts[place].sample_N[index]
        planned = int(lengths.num_tokens_N[stored]), int(lengths.num_patches_N[stored])
        if found != planned:
            raise SampleError(
                raw.id, "lengths_changed", f"has (tokens, patches) {found}, but the index says {planned}; index again"
            )
        return tuple(self.parts[place].cut(index, one) for one in samples)

    def _locate(self, number: int) -> tuple[int, int]:
        """The place of the source, and the number among its parts."""
        place = bisect.bisect_right(self._starts, number) - 1
        return place, number - self._starts[place]
