"""The planner's memory peak is within 10 % of the counted one, of all tensors and of activations alone, in every case.

Weights, gradient buffers and optimizer state must agree to the padding of megatron's buffers.
"""

from importlib.util import find_spec

import pytest
import torch

from mimo_megatron.planner import fp8_memory, memory
from mimo_megatron.planner.offload import Row
from tests.harness import run_ranks
from tests.memory_cases import CASES, Case, compare, measure
from tests.tensor_meter import TensorMeter

TOLERANCE = 0.10
QUICK = ("one process, bf16", "pp2, vpp2", "FP8, current, selective, pp2, text")


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def assert_close(case: Case) -> None:
    rows = compare(case, run_ranks(measure, case.world_size, case, timeout_seconds=240.0))
    assert len(rows) == (1 if case.config.parallel.vision_placement == "balanced" else case.world_size)
    for row in rows:
        assert row.state == pytest.approx(row.measured_state, rel=0.002), row
        assert row.peak == pytest.approx(row.measured_peak, rel=TOLERANCE), row
        assert row.moving == pytest.approx(row.measured_moving, rel=TOLERANCE), row
        assert row.host == pytest.approx(row.measured_host, rel=TOLERANCE), row


TRITON = ("triton in the decoder", "triton in the decoder, cp2", "triton in the encoder")
"""In Triton's interpreter; of attention alone tests/unit/test_planner_attention.py counts what is kept."""


@pytest.mark.parametrize("name", QUICK)
def test_the_predicted_peak_is_the_counted_one(name):
    assert_close(by_name(name))


SLOW = (
    "one process", "frozen vision", "full recompute", "tp2, sequence parallel, bf16", "cp2", "text only",
    "tp2, pp2, sequence parallel, selective", "tp2, balanced vision",
    "head in chunks, bf16, large vocabulary", "FP8, current", "FP8, delayed, all layers, text, bf16",
    "FP8, blockwise, full recompute, text", "FP8, scaled_mm, tp2, sequence parallel, text",
    "offload, full recompute, bf16", "offload, pp2", "offload of the decoder, pp2, vpp2",
)  # fmt: skip
"""With the quick ones, of every kind; all of ``CASES`` are run by ``benchmarks/bench_memory_model.py``."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_predicted_peak_is_the_counted_one_with_every_kind_of_layout(name):
    assert_close(by_name(name))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need triton: pip install triton")
@pytest.mark.parametrize("name", TRITON)
def test_the_predicted_peak_is_the_counted_one_with_tritons_kernels(name):
    assert_close(by_name(name))


def test_a_linear_layer_in_fp8_that_is_said_to_keep_its_input_as_it_came_is_caught(monkeypatch):
    monkeypatch.setattr(fp8_memory, "kept", lambda setting, product: product.of_input * setting.value_bytes)
    with pytest.raises(AssertionError):
        assert_close(by_name("FP8, current, selective, pp2, text"))


def test_a_microbatch_in_flight_that_is_forgotten_is_caught(monkeypatch):
    def one_after_another(pp, vpp, rank, num_microbatches):
        whole = plain(1, 1, 0, num_microbatches)
        return [one._replace(chunk=chunk) for one in whole for chunk in range(vpp)]

    plain = memory.schedule.order
    monkeypatch.setattr(memory.schedule, "order", one_after_another)
    with pytest.raises(AssertionError):
        assert_close(by_name("pp2, vpp2"))


@pytest.mark.slow
def test_a_plan_that_forgets_what_offload_frees_is_caught(monkeypatch):
    monkeypatch.setattr(memory, "Row", lambda parts, _offload: Row(parts, "none"))
    with pytest.raises(AssertionError):
        assert_close(by_name("offload, pp2"))


def test_the_meter_counts_storages_once_and_forgets_them():
    with TensorMeter() as meter:
        whole = torch.zeros(1000)
        view = whole.view(10, 100)
        assert (meter.live, meter.peak) == (4000, 4000)
        del whole
        assert meter.live == 4000
        doubled = view * 2
        del view, doubled
        assert (meter.live, meter.peak) == (0, 8000)
