"""``data stats``: what a recipe's data are, in numbers and on one page.

Lengths come from the indexes, of every sample. What no index holds - sides of images, languages, trained tokens - is
read from a number of samples of each source, evenly spread over it; the page says of how many. What packs look like
comes from the plan of the recipe itself.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.bars import Limit, histogram
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.encode import encode_text, measure_all_media
from mimo_megatron.data.page import write_html
from mimo_megatron.data.plan import Position
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.source import DataSource
from mimo_megatron.data.text_checks import language_of
from mimo_megatron.types import RawSample

TEMPLATE = "stats.html.j2"


@dataclass
class Looked:
    """What was found in the samples of one source that were read."""

    num_samples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    aspect_ratios: list[float] = field(default_factory=list)
    """Width by height of each image as stored."""
    megapixels: list[float] = field(default_factory=list)
    trained_fractions: list[float] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    """Samples that cannot be used, by reason."""


@dataclass(frozen=True)
class SourceStats:
    name: str
    folder: str
    draw_fraction: float
    """Of the samples of an epoch, by the recipe's weights."""
    tokens_N: NDArray[np.int64]
    patches_N: NDArray[np.int64]
    num_cut: tuple[int, int]
    """Samples that are trained in parts, and their parts."""
    looked: Looked


@dataclass(frozen=True)
class PackStats:
    """The first packs of a run; fractions of their capacities, [K] each."""

    token_fill_K: NDArray[np.float64]
    patch_fill_K: NDArray[np.float64]
    num_samples_K: NDArray[np.int64]
    num_over_capacity: int
    samples_per_epoch: int

    @property
    def packs_per_epoch(self) -> float:
        """About how many, since packs are made window by window."""
        return self.samples_per_epoch / float(self.num_samples_K.mean())


@dataclass(frozen=True)
class DataStats:
    sources: tuple[SourceStats, ...]
    packs: PackStats

    @property
    def trained_fraction(self) -> float:
        """Of the tokens of an epoch, each source weighed by the tokens it gives to one."""
        parts = [(one, one.draw_fraction * float(one.tokens_N.mean())) for one in self.sources if one.looked.num_tokens]
        total = sum(weight for _, weight in parts)
        trained = sum(weight * one.looked.num_trained / one.looked.num_tokens for one, weight in parts)
        return trained / total if total else 0.0

    def counted(self, name: str) -> Counter[str]:
        """A counter of ``Looked`` over all sources."""
        return sum((getattr(one.looked, name) for one in self.sources), Counter())


def collect(data: DataConfig, model: ModelConfig, *, seed: int, num_samples: int, num_packs: int) -> DataStats:
    """The statistics of a recipe's data: ``num_samples`` of each source are read, ``num_packs`` planned."""
    corpus = Corpus(data, model)
    weights = np.array([one.weight for one in data.sources])
    sources = tuple(
        SourceStats(
            source.describe()["name"],
            str(source.describe()["folder"]),
            float(weight),
            source.lengths.num_tokens_N,
            source.lengths.num_patches_N,
            parts.num_cut,
            _look(corpus, source, num_samples),
        )
        for source, parts, weight in zip(corpus.sources, corpus.parts, weights / weights.sum(), strict=True)
    )
    return DataStats(sources, _packs(corpus, seed, num_packs))


def _look(corpus: Corpus, source: DataSource, num_samples: int) -> Looked:
    looked = Looked()
    total = len(source.lengths.num_tokens_N)
    for index in np.unique(np.linspace(0, total - 1, min(num_samples, total)).round().astype(int)).tolist():
        try:
            _look_at(corpus, source.read(index), looked)
        except SampleError as error:
            looked.unreadable[error.reason] += 1
        looked.num_samples += 1
    return looked


def _look_at(corpus: Corpus, raw: RawSample, looked: Looked) -> None:
    shapes = measure_all_media(raw, [read_media(ref, corpus.data.read) for ref in raw.media], corpus.model, corpus.data)
    looked.languages[language_of(" ".join(_texts(raw)))] += 1
    kinds = Counter(ref.kind for ref in raw.media)
    looked.media[_media_name(kinds["image"], kinds["video"])] += 1
    for frame in (shape.frame for shape in shapes if shape.frame):
        looked.aspect_ratios.append(frame.stored_width / frame.stored_height)
        looked.megapixels.append(frame.stored_width * frame.stored_height / 1e6)
    if corpus.model.text.head != "reward":  # of a pair the reward is read, and no token trained
        _, loss_mask_T = encode_text(raw, shapes, corpus.tokenizer, corpus.model, corpus.data)
        looked.num_tokens += len(loss_mask_T)
        looked.num_trained += int(loss_mask_T.sum())
        looked.trained_fractions.append(float(loss_mask_T.mean()))


def _texts(raw: RawSample) -> Iterator[str]:
    for message in raw.messages:
        content = message["content"]
        yield from [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _media_name(num_images: int, num_videos: int) -> str:
    if num_videos:
        return "video and images" if num_images else "video"
    return ("text alone", "1 image", "2 images")[num_images] if num_images < 3 else "3 images and more"


def _packs(corpus: Corpus, seed: int, num_packs: int) -> PackStats:
    plan = corpus.plan(seed)
    packs, _ = plan.take(Position(0, 0), num_packs)
    lengths_K2 = np.array([np.sum([corpus.planned_lengths(one) for one in pack.tolist()], axis=0) for pack in packs])
    return PackStats(
        lengths_K2[:, 0] / corpus.data.pack_tokens,
        lengths_K2[:, 1] / corpus.data.pack_patches,
        np.array([len(pack) for pack in packs]),
        len(plan.over_capacity),
        plan.samples_per_epoch,
    )


def write_page(stats: DataStats, data: DataConfig, model: ModelConfig, out: Path) -> Path:
    """``out``, now one page of these statistics that needs no other file."""
    return write_html(
        TEMPLATE,
        out,
        model=model.name,
        data=data,
        stats=stats,
        charts=_charts(stats, data),
        tables=_tables(stats),
        quantile=np.quantile,
    )


def _charts(stats: DataStats, data: DataConfig) -> dict[str, Any]:
    def by_source(values: Any) -> dict[str, NDArray[np.float64]]:
        return {one.name: np.array([value for value in values(one) if value > 0], np.float64) for one in stats.sources}

    pixels = [Limit(data.min_pixels / 1e6, "min_pixels"), Limit(data.max_pixels / 1e6, "max_pixels")]
    packs = stats.packs
    return {
        "tokens": histogram(
            by_source(lambda one: one.tokens_N),
            label="tokens of a sample",
            is_log=True,
            limits=[Limit(data.pack_tokens, "pack_tokens")],
        ),
        "patches": histogram(
            by_source(lambda one: one.patches_N),
            label="vision patches of a sample that has some",
            is_log=True,
            limits=[Limit(data.pack_patches, "pack_patches")],
        ),
        "aspect": histogram(
            by_source(lambda one: one.looked.aspect_ratios), label="width by height of an image", is_log=True
        ),
        "megapixels": histogram(
            by_source(lambda one: one.looked.megapixels), label="megapixels of an image", is_log=True, limits=pixels
        ),
        "trained": histogram(
            by_source(lambda one: one.looked.trained_fractions), label="trained share of a sample", bounds=(0.0, 1.0)
        ),
        "token_fill": histogram({"packs": packs.token_fill_K}, label="token slots filled", bounds=(0.0, 1.0)),
        "patch_fill": histogram({"packs": packs.patch_fill_K}, label="patch capacity filled", bounds=(0.0, 1.0)),
        "pack_samples": histogram({"packs": packs.num_samples_K.astype(np.float64)}, label="samples of a pack"),
    }


def _tables(stats: DataStats) -> dict[str, list[tuple[str, int, float]]]:
    """(name, count, share) of the samples that were read, the largest first."""
    tables = {}
    for name in ("languages", "media"):
        counts = stats.counted(name)
        total = max(1, counts.total())
        tables[name] = [(key, count, count / total) for key, count in counts.most_common()]
    return tables


def summary(stats: DataStats, data: DataConfig, packs_per_step: int) -> str:
    """The plain numbers, for the terminal."""
    lines = []
    for one in stats.sources:
        quantiles = ", ".join(f"{q:,.0f}" for q in np.quantile(one.tokens_N, (0.05, 0.5, 0.95, 1.0)))
        lines.append(
            f"{one.name}: {len(one.tokens_N):,} samples, {one.tokens_N.sum():,} tokens, {one.patches_N.sum():,} "
            f"patches, {one.draw_fraction:.1%} of an epoch's samples; tokens at 5, 50, 95, 100 %: {quantiles}"
        )
    lines += [
        f"{one.name}: texts longer than a pack: {one.num_cut[0]:,}, cut into {one.num_cut[1]:,} parts"
        for one in stats.sources
        if one.num_cut[0]
    ]
    looked = sum(one.looked.num_samples for one in stats.sources)
    for title, table in _tables(stats).items():
        lines.append(f"{title}: " + ", ".join(f"{name} {share:.1%}" for name, _, share in table))
    if unreadable := stats.counted("unreadable"):
        lines.append("unreadable: " + ", ".join(f"{count:,} {reason}" for reason, count in unreadable.most_common()))
    packs = stats.packs
    lines.append(
        f"trained tokens: {stats.trained_fraction:.1%} (this, languages and media: of {looked:,} samples read)"
    )
    lines.append(
        f"{len(packs.token_fill_K):,} packs: {packs.token_fill_K.mean():.1%} of {data.pack_tokens:,} token slots and "
        f"{packs.patch_fill_K.mean():.1%} of {data.pack_patches:,} patches filled, {packs.num_samples_K.mean():.1f} "
        f"samples each; larger than a pack: {packs.num_over_capacity:,}"
    )
    num_packs, num_steps = packs.packs_per_epoch, packs.packs_per_epoch / packs_per_step
    lines.append(
        f"an epoch: {packs.samples_per_epoch:,} samples, about {num_packs:,.0f} packs and {num_steps:,.1f} steps of "
        f"{packs_per_step:,}"
    )
    return "\n".join(lines)
