"""The recipe's ``data.cost`` from a run's own steps: coefficients of least squares, none of them negative.

    seconds = per_token x slots + per_token_pair x segments^2 + per_patch x patches + ...

Slots, not real tokens: padding is computed too, and what a step costs whatever is in it falls to them. A coefficient is
fitted only if its quantity varies between the steps; what does not vary cannot be told from the constant.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.pack_cost import PackCost
from mimo_megatron.errors import DataError

COLUMNS = {
    "per_token": "num_slots",
    "per_token_pair": "segment_squares",
    "per_patch": "num_patches",
    "per_patch_pair": "frame_squares",
}
MIN_STEPS = 20
MIN_VARIATION = 0.02  # standard deviation over mean: below it, step times of a per cent of noise give noise
MAX_CORRELATION = 0.98  # above it the two columns' shares of the time are a matter of chance


@dataclass(frozen=True)
class Calibration:
    cost: PackCost
    """In seconds."""
    num_steps: int
    residual_fraction: float
    """Root mean square of what is left, over the mean step."""
    worst_fraction: float
    shares: Mapping[str, float]
    """The part of the predicted seconds of all steps that each term has."""


def calibrate(rows: Sequence[Mapping[str, Any]], skip: int = 3) -> Calibration:
    """The fit to rows of ``metrics.jsonl``, without the first ``skip`` steps, which compile and warm up.

    ``DataError`` names the quantities that the steps hold too equal for a fit.
    """
    rows = rows[skip:]
    if len(rows) < MIN_STEPS:
        raise DataError(f"{len(rows)} steps after the first {skip}; a calibration needs at least {MIN_STEPS}")
    missing = sorted({column for column in COLUMNS.values() if any(column not in row for row in rows)})
    if missing:
        raise DataError(f"the metrics have no {', '.join(missing)}; they are of an older version, run some steps anew")
    if not any(row["segment_squares"] for row in rows):
        raise DataError("the steps count no segments; give a run of `train`: reinforcement learning waits for rollouts")
    table = {name: np.array([row[column] for row in rows], np.float64) for name, column in COLUMNS.items()}
    names = ["per_token"] + [name for name in list(table)[1:] if table[name].any()]
    _require_variation({name: table[name] for name in names[1:]})
    seconds = np.array([row["seconds"] for row in rows], np.float64)
    scales = np.array([table[name].mean() for name in names])
    matrix = np.stack([table[name] for name in names], axis=1) / scales
    weights = non_negative_least_squares(matrix, seconds)
    left = seconds - matrix @ weights
    shares = matrix.mean(axis=0) * weights
    return Calibration(
        PackCost(**{"per_token": 0.0, **dict(zip(names, (weights / scales).tolist(), strict=True))}),
        len(rows),
        float(np.sqrt((left**2).mean()) / seconds.mean()),
        float(np.abs(left).max() / seconds.mean()),
        dict(zip(names, (shares / shares.sum()).tolist(), strict=True)),
    )


def non_negative_least_squares(matrix: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights >= 0 with the least squared error: the best of the plain solutions of all subsets of columns.

    Exact, and for the four columns here at most 15 solutions.
    """
    num_columns = matrix.shape[1]
    best, least = np.zeros(num_columns), float((values**2).sum())
    for count in range(1, num_columns + 1):
        for chosen in itertools.combinations(range(num_columns), count):
            weights = np.zeros(num_columns)
            weights[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], values, rcond=None)[0]
            error = float(((values - matrix @ weights) ** 2).sum())
            if (weights >= 0).all() and error < least:
                best, least = weights, error
    return best


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is not there; give the folder of a run, the recipe's `dir`")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(found: Calibration) -> str:
    """What to read, and what to paste into a recipe."""
    lines = [
        f"{found.num_steps} steps; residual {found.residual_fraction:.2%} of a step (root mean square), "
        f"{found.worst_fraction:.2%} at worst",
        *(f"  {name:<16}{share:>8.1%} of the predicted time" for name, share in found.shares.items()),
        "",
        "data:",
        "  cost:",
        *(f"    {name}: {value:.6g}" for name, value in found.cost.model_dump().items()),
    ]
    return "\n".join(lines)


def _require_variation(columns: Mapping[str, NDArray[np.float64]]) -> None:
    level = {name: float(values.std() / values.mean()) for name, values in columns.items()}
    flat = [f"{COLUMNS[name]} by {one:.1%}" for name, one in level.items() if one < MIN_VARIATION]
    if flat:
        raise DataError(
            f"the steps do not vary enough to be fitted: {', '.join(flat)} of the mean, needed {MIN_VARIATION:.0%}; "
            "take a run with fewer packs a step, or another mix of data"
        )
    for one, two in itertools.combinations(columns, 2):
        correlation = float(np.corrcoef(columns[one], columns[two])[0, 1])
        if abs(correlation) > MAX_CORRELATION:
            raise DataError(
                f"the steps do not tell {COLUMNS[one]} from {COLUMNS[two]}: their correlation is {correlation:.3f}, at "
                f"most {MAX_CORRELATION} is needed; take a run with fewer packs a step, or images of more sizes"
            )
