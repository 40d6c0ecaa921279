"""How the memory model must move when a layout changes, and that it forms attention's pieces as the code does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_megatron.attention.packed import _group_pieces, _group_runs
from mimo_megatron.attention.pieces import causal_pieces
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import ModuleTraining, ParallelConfig, RunConfig
from mimo_megatron.data.collate import MAX_PADDING_SEGMENT
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.offload import IN_FLIGHT
from mimo_megatron.parallel import zigzag
from mimo_megatron.planner import offload as planner_offload
from mimo_megatron.planner import packs
from mimo_megatron.planner.memory import RankMemory, rank_memory
from mimo_megatron.planner.packs import PackShape, assumed_packs
from mimo_megatron.planner.setting import Setting
from tests.samples import run_config

FROZEN = ModuleTraining()
CPU = torch.device("cpu")


def recipe(parallel: ParallelConfig, **train) -> RunConfig:
    config = run_config(preset("mimo-vl-7b"), parallel=parallel, **(dict(precision="bf16") | train))
    data = config.data.model_copy(update=dict(pack_tokens=8192, pack_patches=24576))
    return config.model_copy(update={"data": data})


def need(parallel: ParallelConfig, dp: int = 8, rank: int = 0, num_packs: int = 8, **train) -> RankMemory:
    config = recipe(parallel, **train)
    pack = assumed_packs(config.model, config.data).typical
    return rank_memory(config, Setting.of(config), dp, [pack] * num_packs, rank)


LAYOUTS = st.builds(
    lambda tp, pp, cp: ParallelConfig(tp=tp, pp=pp, cp=cp, sequence_parallel=tp > 1),
    st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2)),
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(LAYOUTS, st.integers(1, 6))
def test_more_data_parallel_ranks_never_raise_the_optimizers_memory(layout, power):
    more, fewer = (need(layout, dp=2**one).optimizer for one in (power, power - 1))
    assert more <= fewer


@settings(max_examples=10, deadline=None)
@given(LAYOUTS)
def test_recomputing_more_never_keeps_more(layout):
    kept = [need(layout, recompute=recompute).activations for recompute in ("full", "selective", "none")]
    assert kept == sorted(kept)


@settings(max_examples=10, deadline=None)
@given(LAYOUTS, st.sampled_from(("none", "selective", "full")))
def test_offload_takes_from_the_device_and_gives_to_the_host(layout, recompute):
    none, vision, text, both = (
        need(layout, recompute=recompute, offload_activations=whose) for whose in ("none", "vision", "text", "all")
    )
    assert none.host == 0 and both.host == vision.host + text.host > vision.host > 0
    assert both.total <= min(vision.total, text.total) and max(vision.total, text.total) <= none.total
    assert none.total - both.total <= both.host


def test_planner_and_offload_agree_on_what_is_in_flight():
    assert planner_offload.IN_FLIGHT == IN_FLIGHT


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(((4, 1), (6, 1), (4, 3), (6, 2))))
def test_earlier_ranks_of_equal_stages_hold_more(grid):
    layout = ParallelConfig(pp=grid[0], vpp=grid[1])
    frozen = dict(vision=FROZEN, projector=FROZEN)
    held = [need(layout, rank=rank, num_packs=24, **frozen).activations for rank in range(grid[0] - 1)]
    assert len(set(held)) == len(held) and held == sorted(held, reverse=True)


def test_tensor_parallelism_divides_the_decoder_and_not_vision():
    text_only = dict(vision=FROZEN, projector=FROZEN)
    one, two = (need(ParallelConfig(tp=tp, sequence_parallel=tp > 1), **text_only).activations for tp in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.02)
    one, two = (need(ParallelConfig(tp=tp, sequence_parallel=tp > 1), text=FROZEN).activations for tp in (1, 2))
    assert two > 0.7 * one


def test_frozen_parts_have_weights_and_nothing_else():
    frozen = need(ParallelConfig(), vision=FROZEN, text=FROZEN)
    trained = need(ParallelConfig())
    assert frozen.weights == pytest.approx(trained.weights, rel=1e-4)
    projector = 47.2e6
    assert frozen.gradients == pytest.approx(4 * projector, rel=0.01)
    assert frozen.optimizer == pytest.approx(12 * projector / 8, rel=0.01)


def test_fp32_training_has_no_copy_of_the_weights():
    bf16, fp32 = (need(ParallelConfig(), precision=one).optimizer for one in ("bf16", "fp32"))
    assert bf16 == pytest.approx(1.5 * fp32, rel=1e-3)


def test_assumed_packs_are_within_the_recipes_limits():
    config = recipe(ParallelConfig())
    images, text = assumed_packs(config.model, config.data).worst
    for pack in (images, text):
        assert sum(pack.runs) == config.data.pack_tokens and pack.num_patches <= config.data.pack_patches
        assert pack.num_rows + pack.num_patches // 4 == pack.num_slots
    assert images.num_patches > 0.95 * config.data.pack_patches and text.num_patches == 0


def test_padding_pieces_are_as_long_as_collates():
    assert packs.PADDING_SEGMENT == MAX_PADDING_SEGMENT


RUNS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(RUNS, st.sampled_from((1, 2, 4)))
def test_pieces_and_their_grouping_are_attentions_own(lengths, cp):
    lengths = [*lengths, 2 * cp - sum(lengths) % (2 * cp)]
    slots, bounds = sum(lengths), [sum(lengths[:place]) for place in range(len(lengths) + 1)]
    for rank in range(cp):
        pieces = causal_pieces(bounds, zigzag.local_ranges(slots, rank, cp))
        ours = list(packs.text_pieces(lengths, cp, rank))
        assert ours == [(one.q_start, one.q_end, one.k_start, one.k_end) for one in pieces]
        assert_same(packs.attention_shape(ours, slots), _group_pieces(pieces, slots, CPU))


GRIDS = st.lists(
    st.builds(lambda t, h, w: (t, 2 * h, 2 * w), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(GRIDS)
def test_windows_and_frames_are_grouped_as_the_encoder_groups_them(grids):
    vision = preset("mimo-vl-7b").vision
    layout = vision_layout(grids, vision)
    for is_full, bounds in ((True, layout.frame_bounds), (False, layout.window_bounds)):
        assert_same(packs.vision_attention(vision, tuple(grids), is_full), _group_runs(bounds, CPU))


def assert_same(shape, groups):
    assert shape.num_groups == len(groups.shapes)
    assert shape.queries_copied == (groups.queries.index is not None)
    assert shape.keys_copied == (groups.keys.index is not None)
    if shape.keys_copied:
        assert shape.num_keys == len(groups.keys.index)
    assert shape.mask_cells == sum(q * k for _, q, k in groups.shapes if q != k)


@given(st.integers(4, 40_000))
def test_one_image_of_so_many_patches_is_whole_merge_units_and_no_larger(patches):
    frames, height, width = packs.image_grid(patches, 2)
    assert frames == 1 and height % 2 == width % 2 == 0
    assert patches / 2 < height * width + 4 and height * width <= max(patches, 4)


def test_padding_is_cut_as_collate_cuts_it():
    assert PackShape("one", 4096, (1000,), (), 1000).runs == (1000, 1024, 1024, 1024, 24)
