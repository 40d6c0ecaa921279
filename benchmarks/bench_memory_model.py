"""The planner's memory peaks beside counted ones: a training step of tiny models on forked CPU ranks, in tensor bytes.

    python benchmarks/bench_memory_model.py                 # 43 cases, those of triton in its interpreter

Columns in megabytes: ``state`` is weights, gradient buffers and optimizer state; ``moving`` what the step needs above
all that stays; ``peak`` everything. The same cases are asserted in tests/distributed/test_memory_model.py.
"""

import argparse
import dataclasses
import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported, by whatever module does it first

from provenance import write_rows

from tests.harness import run_ranks
from tests.memory_cases import CASES, compare, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file (default: results/<machine>-memory_model.csv)")
    out = parser.parse_args().out
    rows = []
    print(f"{'case':40} rank {'state':>15} {'moving':>17} {'error':>7} {'peak':>17} {'error':>7}")
    for case in CASES:
        for row in compare(case, run_ranks(measure, case.world_size, case, timeout_seconds=300.0)):
            moving, peak = (row.moving / row.measured_moving - 1, row.peak / row.measured_peak - 1)
            print(
                f"{row.case:40} {row.rank:4} {row.state / 1e6:7.2f}/{row.measured_state / 1e6:7.2f} "
                f"{row.moving / 1e6:8.2f}/{row.measured_moving / 1e6:8.2f} {moving:+7.1%} "
                f"{row.peak / 1e6:8.2f}/{row.measured_peak / 1e6:8.2f} {peak:+7.1%}",
                flush=True,
            )
            errors = dict(moving_error=f"{moving:.4f}", peak_error=f"{peak:.4f}")
            rows.append({**dataclasses.asdict(row), **errors})
    path = write_rows("memory_model", rows, ["mimo_megatron", "tests"], ["torch", "megatron-core"], out)
    worst = max((abs(float(row[name])), row["case"]) for row in rows for name in ("moving_error", "peak_error"))
    print(f"worst: {worst[0]:.1%} in {worst[1]!r}; {len(rows)} ranks of {len(CASES)} cases -> {path}")


if __name__ == "__main__":
    main()
