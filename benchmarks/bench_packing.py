"""Packing speed and fill against other packers, all in one process on the same lengths.

    python benchmarks/bench_packing.py            # 1,000,000 samples; a few minutes, nearly all of it the peers
    python benchmarks/bench_packing.py --samples 100000

Times are CPU seconds of one thread: the median of five runs, or of fewer where a run takes seconds. Each packer gets its
own kind of input ready-made and returns its own kind of output (ours arrays; a row gives ours from and to Python lists
too). Peers from PyPI that are not installed are listed as such: ``pip install lightbinpack datasets`` and
``pip install --no-deps trl``. Two peers are not packages of their own; their published algorithms are written anew here.
"""

import argparse
import bisect
import csv
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mimo_megatron.data.packing import pack, pack_two_costs
from mimo_megatron.data.packing_reference import check_packs

CAPACITY = 32_768
PATCH_CAPACITIES = (32_768, 65_536, 131_072)
OURS = "mimo-megatron pack"
COLUMNS = "algorithm,distribution,samples,cpu_seconds,packs,lower_bound,times_ours,commit,machine,versions,command".split(",")
ONE_RUN_SECONDS = 2.0

Lengths = NDArray[np.int64]


# ---- lengths ---------------------------------------------------------------------------------------------------------


def lognormal(num_samples: int) -> Lengths:
    """Text: median 900, sigma 1.1, clipped to the capacity."""
    random = np.random.default_rng(1)
    return np.clip(random.lognormal(np.log(900), 1.1, num_samples), 1, CAPACITY).astype(np.int64)


def bimodal(num_samples: int) -> tuple[Lengths, Lengths]:
    """Tokens and patches: 60 % native-size images with a caption, 25 % short text, 15 % long text; mean near 2,550."""
    random = np.random.default_rng(2)
    kind = random.random(num_samples)

    def draw(median: float, sigma: float) -> Lengths:
        return random.lognormal(np.log(median), sigma, num_samples).astype(np.int64)

    merged = np.where(kind < 0.6, np.clip(draw(1500, 0.7), 4, 4096), 0)  # 4 patches make one token; 4096 are 3.2 Mpx
    text = np.select([kind < 0.6, kind < 0.85], [draw(150, 0.7), draw(300, 0.8)], draw(6500, 0.6))
    return np.clip(merged + text, 1, CAPACITY), merged * 4


# ---- other packers: each returns the number of packs -----------------------------------------------------------------


def greedy_knapsack(lengths: list[int], capacity: int) -> int:
    """The algorithm of LLaMA-Factory: fill pack after pack with the longest sample left that fits. Our own words."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for item, length in enumerate(lengths):
        by_length[length].append(item)
    left = sorted(lengths)
    packs: list[list[int]] = []
    while left:
        space = capacity
        packs.append([])
        while place := bisect.bisect_right(left, space):
            length = left.pop(place - 1)
            packs[-1].append(by_length[length].pop())
            space -= length
    return len(packs)


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The algorithm of Megatron-Bridge: the first pack with room, found in a segment tree of maxima. Our own words."""
    num_leaves = 1 << max(1, (len(lengths) - 1).bit_length())
    space = [capacity] * (2 * num_leaves)
    packs: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        node = 1
        while node < num_leaves:
            node *= 2
            if space[node] < lengths[item]:
                node += 1
        if node - num_leaves == len(packs):
            packs.append([])
        packs[node - num_leaves].append(item)
        space[node] -= lengths[item]
        while node := node // 2:
            space[node] = max(space[2 * node], space[2 * node + 1])
    return len(packs)


class _Packed(Exception):
    """Raised where TRL has its bins and begins to gather tokens."""


def trl_bfd(lengths: pa.LargeListArray, capacity: int) -> int:
    """TRL's own function, stopped before it copies token data, which at this size would dwarf the packing.

    Dropping empty samples, which copies too, is skipped: there are none.
    """
    from trl import data_utils

    def stop(*_: object) -> None:
        raise _Packed

    compute = data_utils.pc
    data_utils.pc = SimpleNamespace(**{**vars(compute), "filter": lambda column, _: column, "take": stop})
    try:
        data_utils._pack_bfd(pa.table({"input_ids": lengths}), capacity)
    except _Packed as packed:
        frame = packed.__traceback__
        while frame is not None and "bins" not in frame.tb_frame.f_locals:
            frame = frame.tb_next
        assert frame is not None, "this version of TRL keeps its bins under another name"
        return len(frame.tb_frame.f_locals["bins"])
    finally:
        data_utils.pc = compute
    raise AssertionError("this version of TRL gathers tokens by other means")


def lists_of_null_tokens(lengths: Lengths) -> pa.LargeListArray:
    """A column of samples as TRL takes them; null tokens need no memory."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(bounds), pa.nulls(int(bounds[-1])))


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(run: Callable[[], int]) -> tuple[float, int]:
    """Median CPU seconds, and the number of packs."""
    times = []
    while len(times) < (5 if not times or times[0] < ONE_RUN_SECONDS else 1):
        start = time.process_time()
        num_packs = run()
        times.append(time.process_time() - start)
    return statistics.median(times), num_packs


def one_cost_rows(name: str, lengths: Lengths, skip: Sequence[str]) -> Iterator[dict[str, Any]]:
    as_list = lengths.tolist()
    packs = pack(lengths, CAPACITY)
    check_packs(packs, (lengths, CAPACITY))
    packers: dict[str, Callable[[], int]] = {
        OURS: lambda: len(pack(lengths, CAPACITY)),
        f"{OURS}, lists in and out": lambda: len([one.tolist() for one in pack(as_list, CAPACITY)]),
    }
    if installed("lightbinpack"):
        import lightbinpack

        packers["LightBinPack obfd"] = lambda: len(lightbinpack.pack(as_list, CAPACITY, strategy="obfd"))
        packers["LightBinPack ffd"] = lambda: len(lightbinpack.pack(as_list, CAPACITY, strategy="ffd"))
    packers["greedy knapsack (as LLaMA-Factory)"] = lambda: greedy_knapsack(as_list, CAPACITY)
    packers["first fit, segment tree (as Megatron-Bridge)"] = lambda: first_fit_decreasing(as_list, CAPACITY)
    if installed("trl") and installed("datasets"):
        column = lists_of_null_tokens(lengths)
        packers["TRL bfd"] = lambda: trl_bfd(column, CAPACITY)

    ours = 0.0
    for algorithm, run in packers.items():
        if any(word.lower() in algorithm.lower() for word in skip):
            continue
        seconds, num_packs = measure(run)
        ours = ours or seconds
        yield row(algorithm, name, len(lengths), seconds, num_packs, -(-int(lengths.sum()) // CAPACITY), seconds / ours)


def two_cost_rows(name: str, tokens: Lengths, patches: Lengths) -> Iterator[dict[str, Any]]:
    for capacity in PATCH_CAPACITIES:
        check_packs(pack_two_costs(tokens, patches, CAPACITY, capacity), (tokens, CAPACITY), (patches, capacity))
        seconds, num_packs = measure(lambda limit=capacity: len(pack_two_costs(tokens, patches, CAPACITY, limit)))
        bound = max(-(-int(tokens.sum()) // CAPACITY), -(-int(patches.sum()) // capacity))
        yield row(f"{OURS}_two_costs", f"{name}, {capacity} patches", len(tokens), seconds, num_packs, bound, None)


def row(
    algorithm: str, name: str, samples: int, seconds: float, packs: int, bound: int, ratio: float | None
) -> dict[str, Any]:
    times_ours = f"{ratio:.3g}" if ratio is not None else ""
    print(f"{algorithm:46} {name:24} {samples:9,} {seconds:10.4f} s {packs:7,} packs (bound {bound:,}) {times_ours:>7}")
    return dict(
        algorithm=algorithm, distribution=name, samples=samples, cpu_seconds=f"{seconds:.5f}", packs=packs,
        lower_bound=bound, times_ours=times_ours,
    )  # fmt: skip


# ---- where and with what ---------------------------------------------------------------------------------------------


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def versions() -> str:
    packages = ("numpy", "pyarrow", "lightbinpack", "trl")
    found = [f"{name} {metadata.version(name) if installed(name) else 'not installed'}" for name in packages]
    return f"python {platform.python_version()}; " + "; ".join(found)


def machine() -> str:
    """The processor's name and number of cores; never the host's."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = re.sub(r"\((R|TM|r|tm)\)", "", match.group(1) if match else platform.machine())
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower())) + f"-{os.cpu_count()}cpu"


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "csrc", "mimo_megatron/data/packing.py")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--skip", nargs="*", default=[], help="words in the names of packers to leave out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{machine()}-packing.csv")
    values = parser.parse_args()

    tokens, patches = bimodal(values.samples)
    rows = [
        *one_cost_rows("lognormal", lognormal(values.samples), values.skip),
        *one_cost_rows("bimodal", tokens, values.skip),
        *two_cost_rows("bimodal", tokens, patches),
    ]
    command = shlex.join(["python", "benchmarks/bench_packing.py", *sys.argv[1:]])
    common = dict(commit=commit(), machine=machine(), versions=versions(), command=command)
    values.out.parent.mkdir(parents=True, exist_ok=True)
    with values.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**one, **common} for one in rows)
    print(f"wrote {values.out} ({common['versions']})")


if __name__ == "__main__":
    main()
