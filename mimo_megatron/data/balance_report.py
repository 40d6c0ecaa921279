"""How evenly a data set's packs load the ranks of a step: figures, and plots against capacity and window.

Predicted costs are those of ``PackCost``; efficiency is mean over maximum of the ranks of a step. Windows are packed
and their packs shuffled as in training, without regard to sources; packs beyond the last whole step are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, StrMethodFormatter
from numpy.typing import NDArray

from mimo_megatron.config.pack_cost import PackCost
from mimo_megatron.data.balance import deal, efficiency, pack_balanced, sample_costs
from mimo_megatron.data.source import SampleLengths

CAPACITY_FACTORS = (0.25, 0.5, 1, 2, 4)
WINDOW_FRACTIONS = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1)
LEAST_DRAWN = 1e-5
MOST_STEPS = 8
"""Steps dealt for a figure, spread over all: each takes about 0.1 ms a pack."""


@dataclass(frozen=True)
class Step:
    num_ranks: int
    packs_per_rank: int

    @property
    def num_packs(self) -> int:
        return self.num_ranks * self.packs_per_rank

    def __str__(self) -> str:
        return f"{self.num_ranks} ranks x {self.packs_per_rank}"


@dataclass(frozen=True)
class Balance:
    """Means over the steps looked at; None where there is no whole step."""

    num_packs: int
    token_fill: float
    patch_fill: float
    step_efficiency: float | None
    vision_efficiency: float | None
    """Of the vision encoder alone, as if ranks waited for each other after it; 1 where there is no vision."""
    num_over_capacity: int


def balance(
    lengths: SampleLengths, cost: PackCost, token_capacity: int, patch_capacity: int, step: Step, window: int
) -> Balance:
    """Of these samples in random order, packed ``window`` at a time."""
    fits = (lengths.num_tokens_N <= token_capacity) & (lengths.num_patches_N <= patch_capacity)
    samples = lengths.take(np.flatnonzero(fits))
    tokens, patches, total, vision = _pack_totals(samples, cost, token_capacity, patch_capacity, window)
    num_steps = len(total) // step.num_packs
    looked_at = np.unique(np.linspace(0, num_steps - 1, MOST_STEPS).astype(int)).tolist() if num_steps else []
    found = []
    for first in (number * step.num_packs for number in looked_at):
        own = slice(first, first + step.num_packs)
        held = np.array(deal(total[own].tolist(), vision[own].tolist(), step.num_ranks))
        found.append([efficiency(one[own][held].sum(axis=1)) for one in (total, vision)])
    step_efficiency, vision_efficiency = np.mean(found, axis=0).tolist() if found else (None, None)
    return Balance(
        num_packs=len(total),
        token_fill=float(tokens.sum() / (token_capacity * max(1, len(total)))),
        patch_fill=float(patches.sum() / (patch_capacity * max(1, len(total)))),
        step_efficiency=step_efficiency,
        vision_efficiency=vision_efficiency,
        num_over_capacity=int((~fits).sum()),
    )


def _pack_totals(
    lengths: SampleLengths, cost: PackCost, token_capacity: int, patch_capacity: int, window: int
) -> list[NDArray[np.int64]]:
    """Tokens, patches, cost and vision cost of all packs, in training order."""
    random = np.random.default_rng(1)
    order = random.permutation(len(lengths.num_tokens_N))
    columns: list[list[NDArray[np.int64]]] = [[np.zeros(0, np.int64)] for _ in range(4)]
    for taken in np.array_split(order, max(1, -(-len(order) // window))):
        part = lengths.take(taken)
        costs = sample_costs(part, cost, token_capacity, patch_capacity)
        packs = pack_balanced(part, costs, token_capacity, patch_capacity)
        turn = random.permutation(len(packs))
        for column, one in zip(columns, (part.num_tokens_N, part.num_patches_N, *costs), strict=True):
            column.append(packs.totals(one)[turn])
    return [np.concatenate(column) for column in columns]


def plot_what_if(
    lengths: SampleLengths, cost: PackCost, token_capacity: int, patch_capacity: int, step: Step, path: Path
) -> None:
    """Writes a PNG: padding and idle time for other capacities (of both costs alike), and for smaller windows."""
    num_samples = len(lengths.num_tokens_N)
    capacities = [max(1, round(token_capacity * factor)) for factor in CAPACITY_FACTORS]
    by_capacity = [
        balance(lengths, cost, one, max(1, patch_capacity * one // token_capacity), step, num_samples)
        for one in capacities
    ]
    windows = sorted({max(1, round(num_samples * fraction)) for fraction in WINDOW_FRACTIONS})
    by_window = [balance(lengths, cost, token_capacity, patch_capacity, step, one) for one in windows]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, capacities, num_samples, by_capacity, f"tokens of a pack (window: all {num_samples:,} samples)")
    _draw(right, windows, num_samples, by_window, f"samples of a window (packs of {token_capacity:,} tokens)")
    handles, names = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"What if: what a step of {step} loses", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, places: Sequence[int], num_samples: int, found: Sequence[Balance], label: str) -> None:
    lines: dict[str, tuple[str, list[float | None]]] = {
        "padding slots": ("#d9822b", [1 - one.token_fill for one in found]),
        "idle time of ranks in a step": ("#2f6db3", [_rest(one.step_efficiency) for one in found]),
        "the same, of vision alone": ("#3a9d5d", [_rest(one.vision_efficiency) for one in found]),
        "samples over a capacity": ("#6b7280", [one.num_over_capacity / max(1, num_samples) for one in found]),
    }
    for name, (color, values) in lines.items():
        known = [(place, value) for place, value in zip(places, values, strict=True) if value]
        if known:
            axes.plot([place for place, _ in known], [one for _, one in known], marker="o", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xticks(places)
    axes.set_yscale("log")
    axes.set_ylim(LEAST_DRAWN, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("share lost (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share
