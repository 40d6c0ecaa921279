"""What is planned of a source: its samples, a long text in several parts where the recipe says so.

The capacity that decides is the recipe's, so parts are made of the lengths in the index, which stays as it is; what is
encoded is cut where the plan cut it. Invariants: the parts of a sample, one after another, are its tokens; none has
more than a pack holds; their lengths differ by at most one; a sample with media, or a preference pair, is one part.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import SourceConfig
from mimo_megatron.data.source import SampleLengths
from mimo_megatron.types import EncodedSample


@dataclass(frozen=True)
class Parts:
    """The parts of a source's samples in the order of the samples. Dims: N parts."""

    lengths: SampleLengths
    sample_N: NDArray[np.int64]
    """The number of the stored sample in its source."""
    place_N: NDArray[np.int64]
    """Of the part in its sample, from 0."""
    count_N: NDArray[np.int64]
    """Parts that its sample has."""

    def __len__(self) -> int:
        return len(self.sample_N)

    @property
    def num_cut(self) -> tuple[int, int]:
        """Samples that were cut, and their parts."""
        of_cut = self.count_N > 1
        return int((of_cut & (self.place_N == 0)).sum()), int(of_cut.sum())

    def name(self, number: int, sample_id: str) -> str:
        """What this part of the sample is called."""
        place, count = int(self.place_N[number]), int(self.count_N[number])
        return sample_id if count == 1 else f"{sample_id}/part-{place + 1}-of-{count}"

    def cut(self, number: int, sample: EncodedSample) -> EncodedSample:
        """This part of the encoded sample: a segment like any other, whose first token nothing predicts."""
        place, count = int(self.place_N[number]), int(self.count_N[number])
        if count == 1:
            return sample
        own = slice(*(sample.num_tokens * one // count for one in (place, place + 1)))
        return replace(
            sample,
            id=self.name(number, sample.id),
            token_ids_T=sample.token_ids_T[own],
            loss_mask_T=sample.loss_mask_T[own],
            columns={name: column_T[own] for name, column_T in sample.columns.items()},
        )


def splits_texts(source: SourceConfig, model: ModelConfig) -> bool:
    """Whether long texts of this source are cut. A reward model compares whole answers: pairs never are."""
    return source.long_samples == "split" and model.text.head != "reward"


def parts_of(lengths: SampleLengths, token_capacity: int, *, splits: bool) -> Parts:
    """Every text with more tokens than a pack in as few parts as fit one, if ``splits``; all else whole."""
    is_cut = (lengths.num_patches_N == 0) & (lengths.num_tokens_N > token_capacity) & splits
    if not is_cut.any():
        zero_N, one_N = (np.broadcast_to(np.int64(value), len(is_cut)) for value in (0, 1))  # no memory
        return Parts(lengths, np.arange(len(is_cut)), zero_N, one_N)
    counts = np.where(is_cut, -(-lengths.num_tokens_N // token_capacity), 1)
    sample_N = np.repeat(np.arange(len(counts)), counts)
    place_N = np.arange(len(sample_N)) - np.repeat(np.cumsum(counts) - counts, counts)
    count_N, of_sample = counts[sample_N], lengths.take(sample_N)
    start_N, end_N = (of_sample.num_tokens_N * place // count_N for place in (place_N, place_N + 1))
    tokens_N = end_N - start_N
    squares_N = np.where(count_N > 1, tokens_N**2, of_sample.segment_squares_N)
    parts = of_sample._replace(num_tokens_N=tokens_N, segment_squares=squares_N)
    return Parts(parts, sample_N, place_N, count_N)
