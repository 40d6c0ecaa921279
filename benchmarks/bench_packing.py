"""Packing speed and fill against other packers, all in one process on the same lengths.

    python benchmarks/bench_packing.py            # 1,000,000 samples; a few minutes, nearly all of it the peers
    python benchmarks/bench_packing.py --samples 100000

Times are CPU seconds of one thread: the median of five runs, or one run where it takes over two seconds. Each packer
gets its own kind of input ready-made and returns its own kind of output: ours arrays, so a second row gives ours from
and to Python lists. Peers that are not installed are listed as such: ``pip install lightbinpack datasets`` and
``pip install --no-deps trl``. Two peers are no packages of their own: their published algorithms are written anew here.
"""

import argparse
import bisect
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from provenance import installed, write_rows

from mimo_megatron.data.packing import pack, pack_two_costs
from mimo_megatron.data.packing_reference import check_packs

CAPACITY = 32_768
PATCH_CAPACITIES = (32_768, 65_536, 131_072)
OURS = "mimo-megatron pack"
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


def trl_bfd(data_utils: ModuleType, lengths: pa.LargeListArray, capacity: int) -> int:
    """TRL's own function, stopped before it copies token data, which at this size would dwarf the packing.

    Dropping empty samples, which copies too, is skipped: there are none.
    """

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
    """Median CPU seconds without garbage collection, as ``timeit`` measures, and the number of packs."""
    times: list[float] = []
    gc.collect()
    gc.disable()
    while len(times) < (5 if not times or times[0] < ONE_RUN_SECONDS else 1):
        start = time.process_time()
        num_packs = run()
        times.append(time.process_time() - start)
    gc.enable()
    return statistics.median(times), num_packs


def one_cost_packers(lengths: Lengths) -> dict[str, Callable[[], int] | None]:
    """By name; None for a peer that is not installed."""
    as_list = lengths.tolist()
    packers: dict[str, Callable[[], int] | None] = {
        OURS: lambda: len(pack(lengths, CAPACITY)),
        f"{OURS}, lists in and out": lambda: len([one.tolist() for one in pack(as_list, CAPACITY)]),
        "LightBinPack obfd": None,
        "LightBinPack ffd": None,
        "greedy knapsack (as LLaMA-Factory)": lambda: greedy_knapsack(as_list, CAPACITY),
        "first fit, segment tree (as Megatron-Bridge)": lambda: first_fit_decreasing(as_list, CAPACITY),
        "TRL bfd": None,
    }
    if installed("lightbinpack"):
        import lightbinpack

        packers["LightBinPack obfd"] = lambda: len(lightbinpack.pack(as_list, CAPACITY, strategy="obfd"))
        packers["LightBinPack ffd"] = lambda: len(lightbinpack.pack(as_list, CAPACITY, strategy="ffd"))
    if installed("trl") and installed("datasets"):
        from trl import data_utils

        column = lists_of_null_tokens(lengths)
        packers["TRL bfd"] = lambda: trl_bfd(data_utils, column, CAPACITY)
    return packers


def one_cost_rows(name: str, lengths: Lengths) -> Iterator[dict[str, Any]]:
    check_packs(pack(lengths, CAPACITY), (lengths, CAPACITY))
    bound = -(-int(lengths.sum()) // CAPACITY)
    ours = 0.0
    for algorithm, run in one_cost_packers(lengths).items():
        if run is None:
            yield row(algorithm, name, len(lengths), "not installed", "", bound, "")
            continue
        seconds, num_packs = measure(run)
        ours = ours or seconds
        yield row(algorithm, name, len(lengths), f"{seconds:.5f}", num_packs, bound, f"{seconds / ours:.1f}")


def two_cost_rows(name: str, tokens: Lengths, patches: Lengths) -> Iterator[dict[str, Any]]:
    for capacity in PATCH_CAPACITIES:
        check_packs(pack_two_costs(tokens, patches, CAPACITY, capacity), (tokens, CAPACITY), (patches, capacity))
        seconds, num_packs = measure(lambda limit=capacity: len(pack_two_costs(tokens, patches, CAPACITY, limit)))
        bound = max(-(-int(tokens.sum()) // CAPACITY), -(-int(patches.sum()) // capacity))
        which = f"{name}, {capacity} patches"
        yield row(f"{OURS}_two_costs", which, len(tokens), f"{seconds:.5f}", num_packs, bound, "")


def row(
    algorithm: str, name: str, samples: int, seconds: str, packs: int | str, bound: int, times_ours: str
) -> dict[str, Any]:
    print(f"{algorithm:46} {name:24} {samples:9,} {seconds:>13} s {packs:>7} packs (bound {bound}) {times_ours:>8}")
    return dict(
        algorithm=algorithm, distribution=name, samples=samples, cpu_seconds=seconds, packs=packs,
        lower_bound=bound, times_ours=times_ours,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()

    tokens, patches = bimodal(values.samples)
    rows = [
        *one_cost_rows("lognormal", lognormal(values.samples)),
        *one_cost_rows("bimodal", tokens),
        *two_cost_rows("bimodal", tokens, patches),
    ]
    path = write_rows(
        "packing",
        rows,
        measured=("csrc", "mimo_megatron/data/packing.py"),
        packages=("numpy", "pyarrow", "lightbinpack", "trl"),
        out=values.out,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
