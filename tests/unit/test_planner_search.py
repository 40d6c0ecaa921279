"""Times, ranking and the page of `mimo-megatron plan`, on the shipped recipes and without data, torch or megatron."""

import json
import subprocess
import sys
import time
from dataclasses import astuple

import pytest

from mimo_megatron.cli import main
from mimo_megatron.config.check import check
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.errors import ConfigError
from mimo_megatron.planner.cost import flop_counts, hop_seconds, stage_seconds, step_cost, update_seconds
from mimo_megatron.planner.hardware import Efficiency, efficiency_of, gpu_named, group_bandwidth
from mimo_megatron.planner.packs import assumed_packs
from mimo_megatron.planner.report import run_text
from mimo_megatron.planner.search import evaluate, layouts, require_some, search, with_layout
from mimo_megatron.planner.setting import Setting
from tests.repository import ROOT

STAGE3 = "examples/recipes/mimo_vl_7b/stage3.yaml"
H100 = gpu_named("h100")
EFFICIENCY = Efficiency()


PLAIN = ("parallel.cp=1", "parallel.vision_placement=replicated")
"""A layout of stage 3 that does not fit 80 GB."""


def stage3(*overrides: str):
    config = load_recipe(ROOT / STAGE3, [*PLAIN, *overrides])
    return config, assumed_packs(config.model, config.data)


def test_compute_of_all_stages_is_the_packs_flops():
    config, packs = stage3("parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=4")
    setting = Setting.of(config)
    stages = stage_seconds(setting, packs.typical, H100, Efficiency(0.5, 0.5))
    forward, both = flop_counts(setting, packs.typical)
    assert sum(one.forward for one in stages) == pytest.approx(sum(astuple(forward)) / (H100.flops * 0.5))
    work = sum(one.forward + one.backward for one in stages)
    assert work == pytest.approx(sum(astuple(both)) / (H100.flops * 0.5))
    assert [one.vision > 0 for one in stages] == [True, False, False, False]


def test_full_recomputation_runs_the_layers_forward_once_more():
    config, packs = stage3("parallel.tp=1", "parallel.sequence_parallel=false")
    (plain,) = stage_seconds(Setting.of(config), packs.typical, H100, EFFICIENCY)
    again = with_layout(config, config.parallel, "full")
    (full,) = stage_seconds(Setting.of(again), packs.typical, H100, EFFICIENCY)
    assert full.forward == plain.forward
    assert 0.85 * plain.forward < full.backward - plain.backward < plain.forward  # all but head and projector


def test_a_group_inside_a_node_uses_its_links_and_one_across_nodes_every_port():
    assert group_bandwidth(H100, 1, 8) == pytest.approx(450e9 * 0.8)
    assert group_bandwidth(H100, 8, 2) == pytest.approx(50e9 * 0.8)
    assert group_bandwidth(H100, 2, 32) == pytest.approx(4 * 50e9 * 0.8)


def test_hops_and_updates_by_hand():
    config, packs = stage3("parallel.pp=2")
    setting = Setting.of(config)
    stream = 8192 / 2 * 4096 * 2  # sequence parallel over 2
    assert hop_seconds(setting, packs.typical, H100, dp=16) == pytest.approx(stream / (50e9 * 0.8))
    config, _ = stage3("parallel.tp=1", "parallel.sequence_parallel=false")
    moved = 8306.2e6 * 6 * 63 / 64 / (8 * 50e9 * 0.8)
    touched = 8306.2e6 * (28 / 64 + 4) / 3.35e12
    assert update_seconds(config, Setting.of(config), H100, 64) == pytest.approx(moved + touched, rel=1e-3)


def test_every_layout_shown_keeps_the_rules_fits_and_is_in_order():
    config, packs = stage3()
    found = search(config, 16, packs, H100, EFFICIENCY, most=5)
    assert len(found.best) == 5
    for one in found.best:
        check(one.config, 16)
        assert one.fits and one.config.parallel.model_ranks * one.dp == 16
    seconds = [one.cost.seconds for one in found.best]
    assert seconds == sorted(seconds)


def test_the_search_misses_no_faster_layout():
    """Against every layout in turn, without bound or early end."""
    config, packs = stage3("train.packs_per_step=32")
    every = []
    for one in layouts(config, 8, packs, H100, EFFICIENCY):
        try:
            every.append(evaluate(one, 8, packs, H100, EFFICIENCY))
        except ConfigError:
            continue
    fastest = min((one for one in every if one.fits), key=lambda one: one.cost.seconds)
    best = search(config, 8, packs, H100, EFFICIENCY, most=3).best[0]
    assert best.cost.seconds == fastest.cost.seconds


def test_a_stage_with_vision_gets_fewer_layers():
    config, packs = stage3("parallel.tp=1", "parallel.sequence_parallel=false")
    pp4 = [
        one.parallel.stage_layers
        for one in layouts(config, 4, packs, H100, EFFICIENCY)
        if one.parallel.pp == 4 and one.parallel.vpp == 1 and one.parallel.stage_layers
    ]
    assert pp4 and all(layers[0] < min(layers[1:]) and sum(layers) == 36 for layers in pp4)


def test_balanced_stages_are_not_slower_than_equal_ones():
    config, packs = stage3("parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=4", "train.recompute=full")
    equal = step_cost(config, Setting.of(config), 16, packs.typical, H100, EFFICIENCY)
    uneven = config.parallel.model_copy(update={"stage_layers": (0, 12, 12, 12)})
    config = with_layout(config, ParallelConfig(**uneven.model_dump()), "full")
    assert step_cost(config, Setting.of(config), 16, packs.typical, H100, EFFICIENCY).seconds < equal.seconds


def test_where_nothing_fits_the_error_names_the_gpus_that_would():
    config, packs = stage3("train.packs_per_step=2560")
    found = search(config, 1, packs, H100, EFFICIENCY)
    assert not found.best
    with pytest.raises(ConfigError, match=r"fits 1 x h100: take (2|4|8) "):
        require_some(found, config, 1, packs, H100, EFFICIENCY)


def test_an_unknown_gpu_or_share_is_refused():
    with pytest.raises(ConfigError, match="h100, h200, a100, b200"):
        gpu_named("h1000")
    with pytest.raises(ConfigError, match="at most 1"):
        efficiency_of(1.5, None)


def test_the_command_prints_a_page_of_120_columns_and_writes_the_numbers(tmp_path, capsys):
    out = tmp_path / "plan.json"
    plan = ["plan", str(ROOT / STAGE3), "--gpus", "64", "--gpu"]
    code = main([*plan, "h100", "--top", "5", "--json", str(out), *PLAIN])
    page, answer = capsys.readouterr().out, json.loads(out.read_text())
    assert code == 1 and "does NOT fit" in page and "activations" in page and "predict" in page
    assert max(map(len, page.splitlines())) <= 120 and "…" not in page
    assert not answer["own"]["fits"] and len(answer["best"]) == 5 and all(one["fits"] for one in answer["best"])
    assert main([*plan, "h200", "--top", "1", *PLAIN]) == 0


@pytest.mark.parametrize(
    ("seconds", "said"), [(30.0, "30.0 s"), (1930.0, "32.2 minutes"), (7200.0, "2.0 hours"), (864e3, "10.0 days")]
)
def test_a_runs_time_is_said_in_a_unit_of_its_size(seconds, said):
    assert run_text(seconds) == said


def test_a_layout_that_the_rules_refuse_is_said_and_others_are_shown(capsys):
    assert main(["plan", str(ROOT / STAGE3), "--gpus", "8", "--top", "1", "parallel.tp=3"]) == 1
    page = capsys.readouterr().out
    assert "refused" in page and "num_heads (32) % parallel.tp (3)" in page and "Best layouts" in page


def test_a_plan_takes_under_five_seconds_of_processor_and_loads_neither_torch_nor_megatron():
    command = f"""
import sys, time
from mimo_megatron.cli import main
main(["plan", {str(ROOT / STAGE3)!r}, "--gpus", "64"])
assert not {{"torch", "megatron", "numpy"}} & set(sys.modules), "a heavy package was loaded"
print("SECONDS", time.process_time())
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("SECONDS")[1]) < 5, time.monotonic() - start
