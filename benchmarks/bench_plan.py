"""Global packs of balanced cost: speed, fill, and how evenly a step's ranks are loaded; and packs from a stream.

    python benchmarks/bench_plan.py                  # 1,000,000 samples, the curve to 10,000,000, streams: minutes
    python benchmarks/bench_plan.py --samples 100000 --no-curve

Costs of packs and ranks are FLOPs of the preset ``mimo-vl-7b`` by the published formula, image by image with its grid;
the packers see only lengths and the four coefficients derived from them. Efficiency is mean over maximum of 256 ranks
with four packs each, over up to 24 whole steps spread over the plan; a last, partial step goes on with the next epoch's
packs, so no token is lost (`lost` counts what the packers leave out). Seconds are CPU seconds of one thread, best of 3.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from provenance import write_rows

from mimo_megatron.config.pack_cost import cost_by_flops
from mimo_megatron.config.presets import preset
from mimo_megatron.config.vision_flops import layer_weights, projector_weights
from mimo_megatron.data.balance import deal, efficiency, pack_balanced, sample_costs
from mimo_megatron.data.packing import Packs, pack, pack_two_costs
from mimo_megatron.data.source import SampleLengths
from mimo_megatron.data.streaming import StreamPacker, Waiting

MODEL = preset("mimo-vl-7b")
CAPACITY = 32_768
PATCH_CAPACITIES = (65_536, 98_304)
"""Of the bimodal mix the first is 87 % full where tokens bind: both bounds shape the packs."""
RANKS, PACKS_PER_RANK = 256, 4
CURVE = (10_000, 100_000, 1_000_000, 10_000_000)
MOST_STEPS = 24
BUFFERS = (64, 128, 256)
STREAMED = 100_000

Counts = NDArray[np.int64]


# ---- samples ---------------------------------------------------------------------------------------------------------


def lognormal(num_samples: int) -> tuple[Counts, Counts]:
    """Tokens (median 900, sigma 1.1, clipped to the capacity) and patches: every second sample is one image and text.

    The image takes a uniform share of 20 to 95 % of the tokens, at most 4,096 (3.2 megapixels).
    """
    random = np.random.default_rng(1)
    tokens = np.clip(random.lognormal(np.log(900), 1.1, num_samples), 1, CAPACITY).astype(np.int64)
    share = np.where(random.random(num_samples) < 0.5, random.uniform(0.2, 0.95, num_samples), 0)
    return tokens, np.minimum(tokens * share, 4096).astype(np.int64) * 4


def bimodal(num_samples: int) -> tuple[Counts, Counts]:
    """Image-heavy: 60 % native-size images with a caption, 25 % short text, 15 % long text; mean near 2,550 tokens."""
    random = np.random.default_rng(2)
    kind = random.random(num_samples)

    def draw(median: float, sigma: float) -> Counts:
        return random.lognormal(np.log(median), sigma, num_samples).astype(np.int64)

    merged = np.where(kind < 0.6, np.clip(draw(1500, 0.7), 4, 4096), 0)  # 4 patches make one token; 4096 are 3.2 Mpx
    text = np.select([kind < 0.6, kind < 0.85], [draw(150, 0.7), draw(300, 0.8)], draw(6500, 0.6))
    return np.clip(merged + text, 1, CAPACITY), merged * 4


MIXES = {"log-normal": lognormal, "bimodal": bimodal}


def flops(tokens: Counts, patches: Counts) -> tuple[Counts, Counts]:
    """Forward FLOPs in millions, all and vision's, each image a grid of an aspect ratio between 1 : 2 and 2 : 1."""
    vision, cost = MODEL.vision, cost_by_flops(MODEL)
    assert vision is not None
    units = patches // vision.merge_factor
    aspect = 2 ** np.random.default_rng(3).uniform(-1, 1, len(units))
    height = np.maximum(np.sqrt(units * aspect), 1).astype(np.int64)
    width = np.where(units > 0, units // height, 0)
    window, num_full = vision.window_size // vision.pixel_multiple, len(set(vision.full_attention_layers))

    def squares(length: Counts) -> Counts:
        whole, rest = np.divmod(length, window)
        return whole * window * window + rest * rest

    area = height * width * vision.merge_factor
    pairs = num_full * area**2 + (vision.depth - num_full) * vision.merge_factor**2 * squares(height) * squares(width)
    linear = 2 * (vision.patch_bytes * vision.width + vision.depth * layer_weights(vision))
    linear += 2 * projector_weights(vision, MODEL.text.width) // vision.merge_factor
    own = (linear * area + 4 * vision.width * pairs) // 10**6
    text = (cost.per_token * tokens + cost.per_token_pair * tokens.astype(float) ** 2) // 1e6
    return text.astype(np.int64) + own, own


# ---- packers ---------------------------------------------------------------------------------------------------------


def balanced(lengths: SampleLengths, patch_capacity: int) -> Packs:
    costs = sample_costs(lengths, cost_by_flops(MODEL), CAPACITY, patch_capacity)
    return pack_balanced(lengths, costs, CAPACITY, patch_capacity)


def two_costs(lengths: SampleLengths, patch_capacity: int) -> Packs:
    return pack_two_costs(lengths.num_tokens_N, lengths.num_patches_N, CAPACITY, patch_capacity)


def one_cost(lengths: SampleLengths, patch_capacity: int) -> Packs:
    return pack(lengths.num_tokens_N, CAPACITY)


PACKERS: dict[str, tuple[Callable[[SampleLengths, int], Packs], bool]] = {
    "balanced packs, dealt": (balanced, True),
    "balanced packs, random order": (balanced, False),
    "two-cost best fit, dealt": (two_costs, True),
    "two-cost best fit, random order": (two_costs, False),
    "one-cost best fit, random order (patches unbound)": (one_cost, False),
}


def seconds(work: Callable[[], Any], runs: int = 3) -> float:
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def ranks_of(predicted: tuple[Counts, Counts], is_dealt: bool) -> Counts:
    """Which packs of a step each rank has, [ranks, packs]."""
    if not is_dealt:
        return np.arange(RANKS * PACKS_PER_RANK).reshape(PACKS_PER_RANK, RANKS).T
    return np.array(deal(predicted[0].tolist(), predicted[1].tolist(), RANKS))


def step_rows(mix: str, num_samples: int, patch_capacity: int) -> Iterator[dict[str, Any]]:
    tokens, patches = MIXES[mix](num_samples)
    lengths, true = SampleLengths(tokens, patches), flops(tokens, patches)
    guessed = sample_costs(lengths, cost_by_flops(MODEL), CAPACITY, patch_capacity)
    for name, (packer, is_dealt) in PACKERS.items():
        packs = packer(lengths, patch_capacity)
        turn = np.random.default_rng(4).permutation(len(packs))
        cost, vision = (packs.totals(one)[turn] for one in true)
        predicted = tuple(packs.totals(one)[turn] for one in guessed)
        found, deal_seconds = [], []
        in_step = RANKS * PACKS_PER_RANK
        for step in np.unique(np.linspace(0, len(packs) // in_step - 1, MOST_STEPS).astype(int)):
            own = slice(step * in_step, (step + 1) * in_step)
            start = time.process_time()
            held = ranks_of((predicted[0][own], predicted[1][own]), is_dealt)
            deal_seconds.append(time.process_time() - start)
            found.append([efficiency(one[own][held].sum(axis=1)) for one in (cost, vision)])
        most_tokens, most_patches = packs.totals(tokens).max(), packs.totals(patches).max()
        assert most_tokens <= CAPACITY and (most_patches <= patch_capacity or packer is one_cost)
        yield dict(
            what=name, mix=mix, samples=num_samples, patch_capacity=patch_capacity,
            cpu_seconds=round(seconds(lambda p=packer: p(lengths, patch_capacity)), 4),
            packs=len(packs), lower_bound=max(-(-tokens.sum() // CAPACITY), -(-patches.sum() // patch_capacity)),
            fill=round(tokens.sum() / (len(packs) * CAPACITY), 5), step_efficiency=round(np.mean(found, 0)[0], 4),
            worst_step=round(np.min(found, 0)[0], 4), vision_efficiency=round(np.mean(found, 0)[1], 4),
            lost=round(1 - len(packs.items) / num_samples, 4), deal_ms=round(1000 * float(np.mean(deal_seconds)), 1),
            longest_wait="",
        )  # fmt: skip


def curve_rows(mix: str) -> Iterator[dict[str, Any]]:
    for num_samples in CURVE:
        tokens, patches = MIXES[mix](num_samples)
        lengths = SampleLengths(tokens, patches)
        packs = balanced(lengths, PATCH_CAPACITIES[1])
        runs = 3 if num_samples < 10**7 else 1
        best = seconds(lambda one=lengths: balanced(one, PATCH_CAPACITIES[1]), runs)
        yield empty_row() | dict(
            what="balanced packs: time", mix=mix, samples=num_samples, patch_capacity=PATCH_CAPACITIES[1],
            packs=len(packs), cpu_seconds=round(best, 4), fill=round(tokens.sum() / (len(packs) * CAPACITY), 5),
        )  # fmt: skip


# ---- streams ---------------------------------------------------------------------------------------------------------


def greedy(lengths: list[int], buffer: int) -> list[int]:
    """The pattern of packing each buffer on its own, nothing carried over: tokens of every pack."""
    packs = []
    for first in range(0, len(lengths), buffer):
        found = pack(np.array(lengths[first : first + buffer]), CAPACITY)
        packs += found.totals(np.array(lengths[first : first + buffer])).tolist()
    return packs


def streamed(lengths: list[int], buffer: int) -> tuple[list[int], int]:
    """Tokens of every pack, and the most packs that any sample waited for."""
    packer, packs, arrived, longest = StreamPacker(CAPACITY, PATCH_CAPACITIES[0], buffer), [], {}, 0
    for name, length in enumerate(lengths):
        if found := packer.push(Waiting(name, length)):
            packs.append(sum(one.num_tokens for one in found))
            longest = max(longest, *(len(packs) - arrived.pop(one.name) for one in found))
        arrived[name] = len(packs)
    return packs, longest


def stream_rows(mix: str) -> Iterator[dict[str, Any]]:
    lengths = MIXES[mix](STREAMED)[0].tolist()
    for buffer in BUFFERS:
        start = time.process_time()
        packs, longest = streamed(lengths, buffer)
        row = empty_row() | dict(mix=mix, samples=STREAMED)
        yield row | dict(
            what=f"stream, buffer {buffer}", cpu_seconds=round(time.process_time() - start, 3), packs=len(packs),
            fill=round(float(np.mean(packs)) / CAPACITY, 5), longest_wait=longest,
        )  # fmt: skip
        packs = greedy(lengths, buffer)
        yield row | dict(
            what=f"best fit within each buffer of {buffer}",
            packs=len(packs),
            fill=round(float(np.mean(packs)) / CAPACITY, 5),
        )


def empty_row() -> dict[str, Any]:
    first = "what mix samples patch_capacity cpu_seconds packs lower_bound fill"
    last = "step_efficiency worst_step vision_efficiency lost deal_ms longest_wait"
    return dict.fromkeys([*first.split(), *last.split()], "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--no-curve", action="store_true")
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for mix in MIXES:
        sources = [*(step_rows(mix, values.samples, one) for one in PATCH_CAPACITIES), stream_rows(mix)]
        for row in (row for source in sources + ([] if values.no_curve else [curve_rows(mix)]) for row in source):
            print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
            rows.append(row)
    print(write_rows("plan", rows, ["csrc", "mimo_megatron/data", "mimo_megatron/config"], ["numpy"], values.out))


if __name__ == "__main__":
    main()
