"""Schedules and their simulation against what can be worked out by hand, and against megatron's own tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from mimo_megatron.planner.schedule import order, simulate, step_timeline


def letters(pp: int, vpp: int, rank: int, num_microbatches: int) -> str:
    return " ".join(
        f"{one.kind[0].upper()}{one.microbatch}" + (f".{one.chunk}" if vpp > 1 else "")
        for one in order(pp, vpp, rank, num_microbatches)
    )


def test_one_forward_one_backward_by_hand():
    assert letters(2, 1, 0, 3) == "F0 F1 B0 F2 B1 B2"
    assert letters(2, 1, 1, 3) == "F0 B0 F1 B1 F2 B2"
    assert letters(4, 1, 0, 2) == "F0 F1 B0 B1"


def test_interleaving_by_hand():
    first = "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0"
    assert letters(2, 2, 0, 4) == first
    assert letters(2, 2, 1, 2) == "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0"


@pytest.mark.parametrize("pp, vpp, num_microbatches", [(2, 2, 4), (4, 2, 8), (4, 3, 12)])
def test_the_order_of_forwards_is_megatrons_table(pp, vpp, num_microbatches):
    got = [(one.microbatch, one.chunk) for one in order(pp, vpp, 0, num_microbatches) if one.kind == "forward"]
    assert got == get_schedule_table(num_microbatches, vpp, pp)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4))
def test_every_rank_runs_every_microbatch_of_every_chunk_once_each_way(pp, vpp, groups):
    vpp = vpp if pp > 1 else 1
    for rank in range(pp):
        steps = order(pp, vpp, rank, groups * pp)
        assert len(set(steps)) == len(steps) == 2 * vpp * groups * pp
        place = {step: number for number, step in enumerate(steps)}
        assert all(place[step] < place[step._replace(kind="backward")] for step in steps if step.kind == "forward")


@pytest.mark.parametrize("vpp", [1, 2, 4])
@pytest.mark.parametrize("pp, num_microbatches", [(2, 4), (4, 8), (8, 32)])
def test_equal_stages_wait_pp_minus_1_of_the_microbatches_and_interleaving_divides_it(pp, num_microbatches, vpp):
    stages = pp * vpp
    got = simulate([1.0 / vpp] * stages, [2.0 / vpp] * stages, pp, num_microbatches)
    assert got.overhead == pytest.approx((pp - 1) / num_microbatches / vpp)
    assert got.bubble == pytest.approx(1 - 1 / (1 + got.overhead))


def test_the_heaviest_stage_sets_the_pace():
    """Two stages, 3 + 6 and 1 + 2 seconds: after the first forward of 3 the second waits for each; 10 microbatches."""
    got = simulate([3.0, 1.0], [6.0, 2.0], 2, 10)
    assert got.busy == (90.0, 30.0)
    assert got.total == pytest.approx(10 * 9 + 1 + 2 - 3)  # the first hand-over hides behind the second forward


def test_a_hop_between_ranks_delays_and_a_single_rank_has_none():
    assert simulate([1.0], [2.0], 1, 4, transfer=5.0).total == 12.0
    assert simulate([1.0, 1.0], [2.0, 2.0], 2, 1, transfer=0.5).total == 7.0


@given(
    st.integers(2, 4),
    st.integers(1, 2),
    st.integers(5, 12),
    st.lists(st.floats(0.5, 3.0), min_size=8, max_size=8),
)
def test_a_long_step_is_a_short_one_and_more_of_it(pp, vpp, groups, seconds):
    forward = seconds[: pp * vpp]
    backward = [2 * one for one in forward]
    whole = simulate(forward, backward, pp, groups * pp, transfer=0.01)
    short = step_timeline(forward, backward, pp, groups * pp, transfer=0.01)
    assert short.total == pytest.approx(whole.total, rel=0.02)
    assert short.busy == pytest.approx(whole.busy)
