"""Numbers of balanced packing that depend on no machine: fill, and how evenly the ranks of a step are loaded."""

import itertools

import numpy as np
import pytest

from mimo_megatron.config.pack_cost import PackCost, cost_by_flops
from mimo_megatron.config.presets import PRESETS, preset
from mimo_megatron.data.balance import deal, efficiency, pack_balanced, sample_costs
from mimo_megatron.data.balance_report import Step, balance
from mimo_megatron.data.source import SampleLengths
from mimo_megatron.train.flops import step_flops

CAPACITY, PATCH_CAPACITY = 32_768, 98_304
STEP = Step(64, 4)


def image_heavy(num_samples):
    """The bimodal mix of benchmarks/bench_plan.py."""
    random = np.random.default_rng(2)
    kind = random.random(num_samples)

    def draw(median, sigma):
        return random.lognormal(np.log(median), sigma, num_samples).astype(np.int64)

    merged = np.where(kind < 0.6, np.clip(draw(1500, 0.7), 4, 4096), 0)
    text = np.select([kind < 0.6, kind < 0.85], [draw(150, 0.7), draw(300, 0.8)], draw(6500, 0.6))
    return SampleLengths(np.clip(merged + text, 1, CAPACITY), merged * 4)


def test_packs_are_full_and_ranks_are_loaded_evenly_in_cost_and_in_vision_alone():
    found = balance(image_heavy(40_000), cost_by_flops(preset("mimo-vl-7b")), CAPACITY, PATCH_CAPACITY, STEP, 40_000)
    assert found.token_fill > 0.999
    assert found.step_efficiency > 0.99 and found.vision_efficiency > 0.95


def test_a_rank_with_a_long_document_gets_short_samples_with_their_images():
    random = np.random.default_rng(1)  # the log-normal mix of benchmarks/bench_plan.py
    tokens = np.clip(random.lognormal(np.log(900), 1.1, 100_000), 1, CAPACITY).astype(np.int64)
    share = np.where(random.random(100_000) < 0.5, random.uniform(0.2, 0.95, 100_000), 0)
    lengths = SampleLengths(tokens, np.minimum(tokens * share, 4096).astype(np.int64) * 4)
    cost = cost_by_flops(preset("mimo-vl-7b"))
    found = balance(lengths, cost, CAPACITY, PATCH_CAPACITY, Step(128, 4), 100_000)
    # With the most costly samples first and text as filler: 0.9892 and 0.9493.
    assert found.step_efficiency > 0.99 and found.vision_efficiency > 0.95


def test_random_order_of_the_same_packs_leaves_ranks_idle():
    lengths, cost = image_heavy(40_000), cost_by_flops(preset("mimo-vl-7b"))
    costs = sample_costs(lengths, cost, CAPACITY, PATCH_CAPACITY)
    packs = pack_balanced(lengths, costs, CAPACITY, PATCH_CAPACITY)
    order = np.random.default_rng(0).permutation(len(packs))[: STEP.num_packs].reshape(STEP.num_ranks, -1)
    total, vision = (efficiency(packs.totals(one)[order].sum(axis=1)) for one in costs)
    assert total < 0.94 and vision < 0.9


def test_where_both_costs_bind_the_packs_are_as_few_as_best_fits():
    lengths, cost = image_heavy(20_000), cost_by_flops(preset("mimo-vl-7b"))
    tight = 57_344  # the patches fill it as far as the tokens fill theirs
    costs = sample_costs(lengths, cost, CAPACITY, tight)
    packs = pack_balanced(lengths, costs, CAPACITY, tight)
    lower_bound = max(lengths.num_tokens_N.sum() / CAPACITY, lengths.num_patches_N.sum() / tight)
    assert len(packs) < 1.05 * lower_bound


@pytest.mark.parametrize("name", PRESETS)
def test_costs_are_the_flop_formulas(name):
    model = preset(name)
    cost, grids = cost_by_flops(model), [(1, 32, 48), (3, 16, 16)] if model.vision else []
    frames = [patches for count, height, width in grids for patches in [height * width] * count]
    segments = [700, 300]
    predicted = cost.per_token * 1000 + cost.per_token_pair * (700**2 + 300**2)
    predicted += cost.per_patch * sum(frames) + cost.per_patch_pair * sum(patches**2 for patches in frames)
    exact = step_flops(model, segments, grids, ()).total
    assert predicted == pytest.approx(exact, rel=1e-9)  # windows of whole 8 x 8 patches: these grids are


def test_costs_scale_with_nothing_but_their_ratios():
    lengths = image_heavy(100)
    one, other = (
        sample_costs(lengths, PackCost(per_token=3 * k, per_patch=2 * k, per_patch_pair=k / 1000), CAPACITY, 98_304)
        for k in (1.0, 1024.0)
    )
    assert np.array_equal(one.total_N, other.total_N) and np.array_equal(one.vision_N, other.vision_N)


def pipeline_seconds(costs, num_stages):
    """A step of one forward, one backward: stage s runs min(warm-up) forwards ahead; backward takes twice as long."""
    count = len(costs)
    done: dict[tuple[str, int, int], float] = {}
    orders = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage - 1, count)
        order = [("F", place) for place in range(ahead)]
        for place in range(count):
            order += [("F", place + ahead)] if place + ahead < count else []
            order.append(("B", place))
        orders.append(order)
    now, places = [0.0] * num_stages, [0] * num_stages
    while any(place < 2 * count for place in places):
        for stage in range(num_stages):
            while places[stage] < 2 * count:
                kind, number = orders[stage][places[stage]]
                before = stage - 1 if kind == "F" else stage + 1
                needs = (kind, number, before) if 0 <= before < num_stages else ("F", number, stage)
                if (kind, before) != ("F", -1) and needs not in done:
                    break
                start = max(now[stage], done.get(needs, 0.0) if (kind, before) != ("F", -1) else 0.0)
                now[stage] = done[kind, number, stage] = start + costs[number] * (1 if kind == "F" else 2)
                places[stage] += 1
    return max(now)


def test_a_ranks_order_of_packs_shortens_the_pipeline():
    costs = [12, 9, 10, 8, 11, 14]
    (held,) = deal(costs, [0] * len(costs), 1)
    every = [pipeline_seconds(order, 4) for order in itertools.permutations(costs)]
    own = pipeline_seconds([costs[pack] for pack in held], 4)
    assert own < np.mean(every) and own <= np.quantile(every, 0.1)
