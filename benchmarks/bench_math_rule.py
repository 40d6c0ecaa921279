"""The math rule against bare Math-Verify on the same answers, in one process and run.

    python benchmarks/bench_math_rule.py     # 2,000 items, every gold new; two minutes, nearly all the peer's
    python benchmarks/bench_math_rule.py --items 8192 --group 16

Times are CPU seconds of one thread, so that a busy machine changes them little. Items are those of ``math_items``: 19
kinds with known verdicts. A warm-up on other items comes first (grammar tables). Math-Verify runs as it comes, timeouts
included, on the whole response. False verdicts are counted on the items and on tests/math_pairs.tsv.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import math_verify
from math_items import math_items
from provenance import ROOT, write_rows

from mimo_megatron.reward.math_rule import MATH_RULE_VERSION, read_gold, score
from mimo_megatron.reward.wire import Meta

Item = tuple[str, str, bool]
META = Meta()


def ours(response: str, gold: str) -> bool:
    return score(response, read_gold(gold, META), META).reward == 1.0


def bare(response: str, gold: str) -> bool:
    return bool(math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(response)))


JUDGES: dict[str, Callable[[str, str], bool]] = {f"mimo-megatron {MATH_RULE_VERSION}": ours, "Math-Verify 0.9.0": bare}


def table_items() -> list[Item]:
    lines = (ROOT / "tests" / "math_pairs.tsv").read_text(encoding="utf-8").splitlines()[1:]
    items = []
    for gold, answer, verdict, _ in (line.split("\t") for line in lines if not line.startswith("#")):
        is_whole = "\\boxed" in answer or "<think>" in answer
        items.append((answer if is_whole else f"\\boxed{{{answer}}}", gold, verdict == "right"))
    return items


def measure(judge: Callable[[str, str], bool], items: Sequence[Item]) -> dict[str, Any]:
    false_right, false_wrong, times = 0, 0, []
    for response, gold, expected in items:
        start = time.process_time()
        verdict = judge(response, gold)
        times.append(time.process_time() - start)
        false_right += verdict and not expected
        false_wrong += expected and not verdict
    cuts = statistics.quantiles(times, n=100)
    return dict(
        items=len(items), cpu_seconds=f"{sum(times):.3f}", per_cpu_second=f"{len(items) / sum(times):.0f}",
        p50_ms=f"{cuts[49] * 1e3:.2f}", p99_ms=f"{cuts[98] * 1e3:.2f}", max_ms=f"{max(times) * 1e3:.1f}",
        false_right=false_right, false_wrong=false_wrong,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--group", type=int, default=1, help="answers to each question, side by side before shuffling")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    inputs = {
        f"19 kinds, groups of {values.group}": math_items(values.items, values.seed, values.group),
        "the table of tricky pairs": table_items(),
    }
    rows = []
    for name, judge in JUDGES.items():
        measure(judge, math_items(190, values.seed + 1))
        for what, items in inputs.items():
            rows.append(dict(judge=name, input=what, **measure(judge, items)))
            print(rows[-1])
    path = write_rows(
        "math-rule",
        rows,
        measured=("mimo_megatron/reward", "tests/math_pairs.tsv", "benchmarks/math_items.py"),
        packages=("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime"),
        out=values.out,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
