"""The rollout scheduler against other policies, simulated, beside the table of the MiMo-7B report.

    python benchmarks/bench_rollout_scheduler.py               # 16 seeds; 80 seconds
    python benchmarks/bench_rollout_scheduler.py --plot docs/rollout-scheduler.png

docs/rollout-scheduler.md says what is assumed. Besides the table, it gives ours over
margins, and under other guesses.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from provenance import write_rows

from mimo_megatron.rl.scheduler.policies import (
    FIRST_FINISHED,
    IN_ORDER,
    NAIVE,
    OURS,
    POLICIES,
    Figures,
    population_mean_tokens,
    run,
)
from mimo_megatron.rl.scheduler.simulator import Cluster
from mimo_megatron.rl.scheduler.workload import Workload

# Overall and rollout speed-up, normalised idle, idle ratio, waste: arXiv 2505.07608, section 3.4.
REPORT = {
    "no dynamic sampling": (2.45, 2.82, 0.36, 0.708, ""),
    "naive dynamic sampling": (1.00, 1.00, 1.00, 0.693, 0.221),
    "+ continuous rollout": (1.99, 2.20, 0.25, 0.388, 0.139),
    "+ asynchronous reward": (2.09, 2.34, 0.21, 0.340, 0.164),
    "+ early termination": (2.29, 2.61, 0.15, 0.277, 0.129),
}
COLUMNS = ("overall", "rollout", "normalised_idle", "idle_ratio", "waste")
MARGINS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
SIZES = ((512, Cluster(256, 32)), (64, Cluster(32, 8)), (16, Cluster(16, 8)))  # groups a batch, and who generates them
BLUE, ORANGE, GREY = "#2f6db3", "#d9822b", "#6b7280"

WORKLOAD, CLUSTER = Workload(), SIZES[0][1]
GUESSES: dict[str, dict[str, Any]] = {  # arguments of ``run`` that differ
    "lengths and rewards x 0.64": dict(workload=replace(WORKLOAD, median_tokens=1800.0, reward_seconds=10.3)),
    "lengths and rewards x 1.43": dict(workload=replace(WORKLOAD, median_tokens=4000.0, reward_seconds=22.9)),
    "64 judges": dict(cluster=Cluster(256, 64)),
    "24 judges": dict(cluster=Cluster(256, 24)),
    "fewer prompts valid (shape 0.12)": dict(workload=replace(WORKLOAD, passing_shape=0.12)),
    "more prompts valid (shape 0.3)": dict(workload=replace(WORKLOAD, passing_shape=0.3)),
    "history tells little": dict(workload=replace(WORKLOAD, prompt_sigma=0.2, response_sigma=0.568)),
    "history tells of difficulty only": dict(workload=replace(WORKLOAD, prompt_sigma=0.0, response_sigma=0.602)),
    "the first step of all is counted": dict(num_steps_before=0),
}


def row(
    policy: str, batch: int, runs: Sequence[Figures], naive: Sequence[Figures], population: float
) -> dict[str, Any]:
    """Means over seeds, and the standard deviation of one seed."""
    values = {
        "overall": [one.overall_speedup(base) for one, base in zip(runs, naive, strict=True)],
        "rollout": [one.rollout_speedup(base) for one, base in zip(runs, naive, strict=True)],
        "normalised_idle": [one.idle_seconds / base.idle_seconds for one, base in zip(runs, naive, strict=True)],
        "idle_ratio": [one.idle_ratio for one in runs],
        "waste": [one.waste for one in runs],
        "length_bias": [one.mean_tokens / population - 1 for one in runs],
        "valid_share": [one.valid_share for one in runs],
    }
    found: dict[str, Any] = dict(policy=policy, batch=batch, seeds=len(runs))
    for name, column in values.items():
        found[name] = round(statistics.mean(column), 4)
        found[f"{name}_std"] = round(statistics.stdev(column), 4)
    return found | {f"report_{name}": value for name, value in zip(COLUMNS, REPORT.get(policy, [""] * 5), strict=True)}


def guess(name: str, num_seeds: int) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(workload=WORKLOAD, cluster=CLUSTER) | GUESSES[name]
    naive, ours = ([run(policy, seed, **arguments) for seed in range(num_seeds)] for policy in (NAIVE, OURS))
    found = row(name, 512, ours, naive, population_mean_tokens(arguments["workload"]))
    return dict(part="guesses", margin=OURS.margin, order="longest first") | found


def show(rows: Sequence[dict[str, Any]]) -> None:
    print("| policy | overall | rollout | norm. idle | idle ratio | waste | length bias |")
    print("|---|---|---|---|---|---|---|")
    for one in rows:
        theirs = {name: one[f"report_{name}"] for name in COLUMNS}

        def cell(name: str, form: str, one: dict[str, Any] = one, theirs: dict[str, Any] = theirs) -> str:
            beside = f" ({theirs[name]:{form}})" if theirs.get(name, "") != "" else ""
            return f"{one[name]:{form}} ± {one[f'{name}_std']:{form}}{beside}"

        cells = [
            cell("overall", ".2f"),
            cell("rollout", ".2f"),
            cell("normalised_idle", ".2f"),
            cell("idle_ratio", ".1%"),
        ]
        waste = "–" if one["policy"] == "no dynamic sampling" else cell("waste", ".1%")
        bias = "–" if one["policy"] == "no dynamic sampling" else cell("length_bias", "+.1%")
        print("| " + " | ".join([one["policy"], *cells, waste, bias]) + " |")


def plot(table: Sequence[dict[str, Any]], sweep: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(13, 9), layout="constrained")
    grid = figure.subplots(2, 2)
    _bars(grid[0][0], table, "overall", "overall speed-up over naive dynamic sampling", 1)
    _bars(grid[0][1], table, "idle_ratio", "idle ratio of the workers, %", 100)
    _bias(grid[1][0], [one for one in table if one["policy"] != "no dynamic sampling"])
    _margins(grid[1][1], sweep)
    figure.suptitle("Rollout policies, simulated: 256 workers, batch 512, 41 % of the groups valid", fontweight="bold")
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], name: str, title: str, scale: float) -> None:
    beside = f"report_{name}"
    for shift, key, color, label in ((-0.2, name, BLUE, "simulated"), (0.2, beside, GREY, "MiMo-7B report")):
        known = [(place, scale * one[key]) for place, one in enumerate(rows) if one[key] != ""]
        bars = axes.barh([place + shift for place, _ in known], [x for _, x in known], 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.2f" if scale == 1 else "%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [one["policy"] for one in rows])
    axes.invert_yaxis()
    axes.margins(x=0.45 if scale == 1 else 0.14)  # room for the legend
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="upper right" if scale == 1 else "lower right")


def _bias(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    axes.axvspan(-2, 2, color=GREY, alpha=0.15, label="within 2 %")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.barh(
        range(len(rows)),
        [100 * one["length_bias"] for one in rows],
        0.6,
        xerr=[100 * one["length_bias_std"] for one in rows],
        color=[ORANGE if one["policy"] == FIRST_FINISHED.name else BLUE for one in rows],
    )
    axes.set_yticks(range(len(rows)), [one["policy"] for one in rows])
    axes.invert_yaxis()
    axes.set_title("length of trained responses against all valid ones, % (± deviation of one trace)", fontsize=10)
    axes.legend(fontsize=8, loc="upper left")


def _margins(axes: Axes, sweep: Sequence[dict[str, Any]]) -> None:
    for order, color in (("launch", GREY), ("longest first", BLUE)):
        rows = [one for one in sweep if one["order"] == order]
        places = [100 * one["waste"] for one in rows]
        speeds = [one["overall"] for one in rows]
        axes.plot(places, speeds, "o-", color=color, label=f"{order}: margins {MARGINS[0]:g} to {MARGINS[-1]:g}")
        for place, speed, one in zip(places, speeds, rows, strict=True):
            axes.annotate(f"{one['margin']:g}", (place, speed), (0, 6), textcoords="offset points", fontsize=8)
    axes.plot([12.9], [2.29], "*", color=ORANGE, markersize=13, label="MiMo-7B report")
    axes.set_xlabel("sample waste, % of the batch")
    axes.set_ylabel("overall speed-up")
    axes.set_title("ours by the engine's order; the numbers are margins", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()

    workload = WORKLOAD
    population = population_mean_tokens(workload)
    rows = []
    for batch, cluster in SIZES:
        naive = [run(NAIVE, seed, workload, cluster, batch) for seed in range(values.seeds)]
        orders = {"in order of launch": IN_ORDER, "longest expected first": OURS}
        swept = [(f"{order}, margin {m:g}", replace(one, margin=m)) for order, one in orders.items() for m in MARGINS]
        parts = [*((one.name, one) for one in POLICIES if batch == 512), *swept]
        for name, policy in parts:
            runs = [run(policy, seed, workload, cluster, batch) for seed in range(values.seeds)]
            kind = "table" if policy.name == name else "margins"
            margin = policy.margin if policy.is_streamed and not policy.is_first_finished else ""
            order = "longest first" if policy.is_longest_first else "launch"
            rows.append(dict(part=kind, margin=margin, order=order) | row(name, batch, runs, naive, population))
        print(f"batch {batch}, {cluster.num_workers} workers")
        show([one for one in rows if one["batch"] == batch])
    guesses = [guess(name, values.seeds) for name in GUESSES]
    print("ours under other guesses")
    show(guesses)
    rows += guesses
    if values.plot:
        table = [one for one in rows if one["part"] == "table"]
        plot(table, [one for one in rows if one["part"] == "margins" and one["batch"] == 512], values.plot)
    path = write_rows(
        "rollout-scheduler",
        rows,
        measured=("mimo_megatron/rl/scheduler", "benchmarks/bench_rollout_scheduler.py"),
        packages=("numpy",),
        out=values.out,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
