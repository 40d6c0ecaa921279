"""How well a data set packs: figures, a plot, and the ``mimo-megatron pack`` command.

The fill is real tokens over the slots of all packs; the lower bound is what no packing can beat, the larger of
tokens / capacity and patches / patch capacity, rounded up. Samples over a capacity are left out and counted, as the
loader does.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.pack_cost import cost_by_flops
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.balance_report import Step, balance, plot_what_if
from mimo_megatron.data.packing import pack, pack_two_costs
from mimo_megatron.data.source import INDEX_FILE, LENGTH_COLUMNS, SampleLengths
from mimo_megatron.errors import DataError

_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9822b", "#6b7280"
_COUNT = StrMethodFormatter("{x:,.0f}")


@dataclass(frozen=True)
class Resource:
    """One of the costs that packs are filled with."""

    unit: str
    capacity: int
    lengths: NDArray[np.int64]
    """Of every packed sample."""
    totals: NDArray[np.int64]
    """Of every pack."""

    @property
    def lower_bound(self) -> int:
        return -(-int(self.lengths.sum()) // self.capacity)

    @property
    def slots(self) -> int:
        return self.capacity * len(self.totals)

    @property
    def fill_fraction(self) -> float:
        return float(self.totals.sum() / self.slots) if len(self.totals) else 1.0


@dataclass(frozen=True)
class PackingReport:
    tokens: Resource
    patches: Resource | None
    """None where only tokens were packed."""
    num_over_capacity: int
    seconds: float
    """Wall time of the packing itself."""

    @property
    def num_packs(self) -> int:
        return len(self.tokens.totals)

    @property
    def lower_bound(self) -> int:
        return max(self.tokens.lower_bound, self.patches.lower_bound if self.patches else 0)

    @property
    def waste_tokens(self) -> int:
        return self.tokens.slots - int(self.tokens.totals.sum())

    @property
    def mean_segments(self) -> float:
        """Samples per pack."""
        return len(self.tokens.lengths) / max(1, self.num_packs)


def report(
    lengths: NDArray[np.int64],
    capacity: int,
    patches: NDArray[np.int64] | None = None,
    patch_capacity: int | None = None,
) -> PackingReport:
    """The figures of packing these samples; both costs bind if there is a ``patch_capacity``."""
    if patch_capacity is None:
        fits = lengths <= capacity
        tokens = lengths[fits]
        start = time.perf_counter()
        packs = pack(tokens, capacity)
        seconds = time.perf_counter() - start
        vision = None
    elif patches is None:
        raise DataError(f"a patch capacity ({patch_capacity}) needs the patches of every sample; give both or neither")
    else:
        fits = (lengths <= capacity) & (patches <= patch_capacity)
        tokens, patches = lengths[fits], patches[fits]
        start = time.perf_counter()
        packs = pack_two_costs(tokens, patches, capacity, patch_capacity)
        seconds = time.perf_counter() - start
        vision = Resource("patches", patch_capacity, patches, packs.totals(patches))
    num_over_capacity = len(lengths) - len(tokens)
    return PackingReport(Resource("tokens", capacity, tokens, packs.totals(tokens)), vision, num_over_capacity, seconds)


def plot(figures: PackingReport, path: Path) -> None:
    """Writes a PNG: for each resource a histogram of the samples and one of the packs."""
    resources = [one for one in (figures.tokens, figures.patches) if one is not None]
    figure = Figure(figsize=(10, 0.6 + 3.2 * len(resources)), layout="constrained")
    axes = figure.subplots(len(resources), 2, squeeze=False)
    for row, resource in zip(axes, resources, strict=True):
        _plot_lengths(row[0], resource)
        _plot_fill(row[1], resource)
    num_samples = len(figures.tokens.lengths)
    figure.suptitle(
        f"{num_samples:,} samples in {figures.num_packs:,} packs (lower bound {figures.lower_bound:,}), "
        f"{figures.tokens.fill_fraction:.2%} of the slots filled",
        fontsize=12,
        fontweight="bold",
    )
    figure.savefig(path, dpi=150)


def pack_command(
    path: Path,
    capacity: int | None,
    patch_capacity: int | None,
    model: ModelConfig,
    step: Step,
    plot_path: Path | None = None,
    what_if_path: Path | None = None,
    recipe: DataConfig | None = None,
) -> None:
    """Prints how the samples of ``path`` pack, see ``read_lengths``, and how evenly their packs load a step's ranks.

    Capacities that are not given are the ``recipe``'s, that of patches where the lengths count them. Without a cost of
    the recipe's own a pack costs the FLOPs of ``model``.

    Draws the packs, and what other capacities and windows would give, into the files that are named.
    """
    columns = _read_columns(path)
    lengths, patches = columns["num_tokens"], columns.get("num_patches")
    if recipe is not None:
        capacity = capacity or recipe.pack_tokens
        patch_capacity = patch_capacity or (None if patches is None else recipe.pack_patches)
    assert capacity, "neither a capacity nor a recipe"
    figures = report(lengths, capacity, patches, patch_capacity)
    table = Table(box=SIMPLE, show_header=False, title=f"packing of {path}", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    tokens = figures.tokens
    table.add_row("samples", f"{len(tokens.lengths):,}")
    table.add_row("left out, over a capacity", f"{figures.num_over_capacity:,}")
    table.add_row("packs, best fit", f"{figures.num_packs:,}")
    table.add_row("lower bound", f"{figures.lower_bound:,}")
    table.add_row(f"fill of {capacity:,} tokens", f"{tokens.fill_fraction:.3%}")
    if figures.patches:
        table.add_row(f"fill of {figures.patches.capacity:,} patches", f"{figures.patches.fill_fraction:.3%}")
    table.add_row("padding tokens", f"{figures.waste_tokens:,}")
    table.add_row("mean samples per pack", f"{figures.mean_segments:.2f}")
    table.add_row("seconds", f"{figures.seconds:.4f}")
    samples = SampleLengths(
        lengths,
        np.zeros_like(lengths) if patches is None else patches,
        columns.get("segment_squares"),
        columns.get("frame_squares"),
    )
    # Without a limit: as many patches as tokens can stand for.
    most_patches = patch_capacity or capacity * (model.vision.merge_factor if model.vision else 1)
    own_cost = recipe.cost if recipe else None
    of_what = "data.cost" if own_cost else f"the FLOPs of {model.name}"
    cost = own_cost or cost_by_flops(model)
    found = balance(samples, cost, capacity, most_patches, step, len(lengths))
    table.add_section()
    table.add_row(f"packs, balanced by {of_what}", f"{found.num_packs:,}")
    table.add_row("their fill in tokens", f"{found.token_fill:.3%}")
    table.add_row(f"predicted efficiency of a step, {step}", _percent(found.step_efficiency))
    table.add_row("of its vision alone", _percent(found.vision_efficiency))
    console = Console()
    console.print(table)
    if plot_path:
        plot(figures, plot_path)
        console.print(f"plot: {plot_path}")
    if what_if_path:
        plot_what_if(samples, cost, capacity, most_patches, step, what_if_path)
        console.print(f"what if: {what_if_path}")


def _percent(share: float | None) -> str:
    return "no whole step" if share is None else f"{share:.2%}"


def read_lengths(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Tokens of every sample, and patches where the file has them.

    Reads an index folder or a Parquet file (columns ``num_tokens`` and perhaps ``num_patches``), a ``.npy`` array of
    lengths, or a text file with one length a line.
    """
    columns = _read_columns(path)
    return columns["num_tokens"], columns.get("num_patches")


def _read_columns(path: Path) -> dict[str, NDArray[np.int64]]:
    if path.is_dir():
        path = path / INDEX_FILE
    if not path.is_file():
        raise DataError(f"{path} is not a file; give lengths (.npy, .parquet, text) or a folder with an {INDEX_FILE}")
    try:  # pyarrow's errors are ValueErrors too
        if path.suffix == ".parquet":
            names = [name for name in LENGTH_COLUMNS if name in pq.read_schema(path).names]
            if "num_tokens" not in names:
                raise ValueError("it has no column num_tokens")
            table = pq.read_table(path, columns=names)
            return {name: _lengths(table[name].to_numpy()) for name in names}
        if path.suffix == ".npy":
            return {"num_tokens": _lengths(np.load(path, allow_pickle=False))}
        words = path.read_text(encoding="utf-8").split()
        return {"num_tokens": _lengths(np.array([int(word) for word in words], np.int64))}
    except ValueError as error:
        raise DataError(f"{path} does not hold the lengths of samples: {error}") from error


def _lengths(values: NDArray[Any]) -> NDArray[np.int64]:
    if values.ndim != 1 or values.dtype.kind not in "iu" or (values < 0).any():
        raise ValueError(f"a {values.ndim}-D array of {values.dtype}, where whole numbers from 0 are needed")
    return values.astype(np.int64)


def _plot_lengths(axes: Axes, resource: Resource) -> None:
    positive = resource.lengths[resource.lengths > 0]
    shortest = positive.min(initial=resource.capacity)
    edges = np.geomspace(min(shortest, resource.capacity / 2), resource.capacity, 61).tolist()
    axes.hist(positive, bins=edges, color=_BLUE)
    axes.set_xscale("log")
    axes.axvline(resource.capacity, color=_GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"capacity {resource.capacity:,}", (resource.capacity, 1), (-4, -2), xycoords=("data", "axes fraction"),
        textcoords="offset points", rotation=90, ha="right", va="top", color=_GREY, fontsize=8,
    )  # fmt: skip
    num_zero = len(resource.lengths) - len(positive)
    axes.set_xlabel(f"{resource.unit} of a sample" + (f" ({num_zero:,} samples have none)" if num_zero else ""))
    axes.set_ylabel("samples")
    axes.xaxis.set_major_formatter(_COUNT)
    _tidy(axes)


def _plot_fill(axes: Axes, resource: Resource) -> None:
    axes.hist(resource.totals / resource.capacity * 100, bins=[2 * edge for edge in range(51)], color=_ORANGE)
    if len(resource.totals):
        axes.set_yscale("log")
    axes.set_xlim(0, 101)
    axes.set_ylim(bottom=0.5)  # one pack is still a bar
    axes.set_xlabel(f"fill of a pack, % of {resource.capacity:,} {resource.unit} (mean {resource.fill_fraction:.2%})")
    axes.set_ylabel("packs (log scale)")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(_COUNT)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
