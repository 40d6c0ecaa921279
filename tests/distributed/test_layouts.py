"""Every layout gives the loss and every parameter's gradient of one process, in fp64, and the same training in fp32.

A large error on one tensor names the broken part: on ``vision.*`` alone, how its gradient is summed; on ``linear_qkv``
alone, how tensor parallelism cuts it; on everything, the token count.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_megatron.config.run import ModuleTraining, ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import optimizer, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.train.step import build_trainer, cross_entropy, train_step
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96
# Measured over these cases: at most 6e-15 in fp64 (two orders of summation); a dropped or doubled term is above 1e-3.
FP64_TOLERANCE = 1e-12

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, dict(tp=2)),
    "tp2-sequence-parallel": (2, dict(tp=2, sequence_parallel=True)),
    "pp2": (2, dict(pp=2)),
    "cp2": (2, dict(cp=2)),
    "dp2": (2, {}),
    "tp2-pp2-sequence-parallel": (4, dict(tp=2, pp=2, sequence_parallel=True)),
    "tp2-cp2": (4, dict(tp=2, cp=2)),
    "cp2-dp2": (4, dict(cp=2)),
    "pp2-vpp2": (2, dict(pp=2, vpp=2)),
    "pp2-uneven": (2, dict(pp=2, stage_layers=(1, 3))),
    "pp2-vision-alone": (2, dict(pp=2, stage_layers=(0, 4))),
    "pp2-vpp2-uneven-tp2": (4, dict(pp=2, vpp=2, tp=2, sequence_parallel=True, stage_layers=(0, 1, 2, 1))),
}

Gradients = dict[str, Tensor]


def loss_and_gradients(
    address: RankAddress,
    layout: dict[str, Any],
    text: dict[str, Any] = MappingProxyType({}),
    fault: str = "",
    **numerics: Any,
) -> tuple[float, int, Gradients]:
    """Of the four mixed packs, on this rank's stage, whole tensors by global name."""
    model_config = tiny_model(**text)
    parallel = ParallelConfig(**layout)
    with megatron(parallel, address) as mesh:
        chunks = build_chunks(model_config, parallel, Numerics(torch.float64, **numerics), mesh)
        weights.draw_weights(chunks, 1, mesh.tp)
        wrapped = optimizer.wrap(chunks, dtype_is_bf16=False)
        batches = [collate(pack, model_config, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
        packs = [local_pack(batch, mesh.cp, model_config.text.num_mtp_layers) for batch in batches]
        loss = cross_entropy(mesh, model_config.text.mtp_loss_weight)
        if fault == "mean of microbatch means":
            loss = _mean_of(loss)
        sums = run_microbatches(wrapped, packs, packs[0].num_stream_slots, loss, whole_gradients=True)
        named = {
            name: weights.unshard(name, param.main_grad, param, mesh.tp).clone()
            for name, param in weights.global_parameters(chunks)
        }
    return sums.objective, sums.count, named


def _mean_of(loss):
    def mean(logits, pack):
        sums = loss(logits, pack)
        return replace(sums, objective=sums.objective / sums.count.clamp(min=1), count=torch.ones_like(sums.count))

    return mean


def gather(results: list[tuple[float, int, Gradients]]) -> tuple[float, int, Gradients]:
    """One set of gradients from all stages; what several ranks hold must agree among them."""
    merged: Gradients = {}
    for loss_sum, count, named in results:
        assert (loss_sum, count) == results[0][:2]
        for name, grad in named.items():
            first = merged.setdefault(name, grad)
            assert torch.equal(first, grad) or relative_error(grad, first) < FP64_TOLERANCE, f"ranks disagree on {name}"
    return results[0][0], results[0][1], merged


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def one_process() -> tuple[float, int, Gradients]:
    return gather(run_ranks(loss_and_gradients, 1, {}))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_loss_and_every_gradient_of_one_process(name, one_process):
    world_size, layout = LAYOUTS[name]
    loss_sum, count, got = gather(run_ranks(loss_and_gradients, world_size, layout))
    want_loss, want_count, want = one_process
    assert count == want_count
    assert loss_sum == pytest.approx(want_loss, rel=FP64_TOLERANCE)
    assert got.keys() == want.keys()
    worst = max((relative_error(got[key], want[key]), key) for key in want)
    assert worst[0] < FP64_TOLERANCE, worst


def test_tied_embeddings_over_two_stages_equal_one_process():
    want = gather(run_ranks(loss_and_gradients, 1, {}, {"tie_embeddings": True}))
    got = gather(run_ranks(loss_and_gradients, 2, {"pp": 2}, {"tie_embeddings": True}))
    assert got[0] == pytest.approx(want[0], rel=FP64_TOLERANCE)
    assert got[2].keys() == want[2].keys()
    assert max(relative_error(got[2][key], want[2][key]) for key in want[2]) < FP64_TOLERANCE


def test_a_mean_of_microbatch_means_is_caught(one_process):
    _, _, got = gather(run_ranks(loss_and_gradients, 1, {}, {}, "mean of microbatch means"))
    _, _, want = one_process
    assert min(relative_error(got[key], want[key]) for key in want) > 1e-3


def losses_of_a_run(address: RankAddress, layout: dict[str, Any], fields: dict[str, Any]) -> list[float]:
    config = run_config(tiny_model(), parallel=ParallelConfig(**layout), **fields)
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
        return [train_step(trainer, batches, step, 1.0).loss for step in range(3)]


ONLY_PROJECTOR = dict(vision=ModuleTraining(), text=ModuleTraining())


@pytest.mark.parametrize("fields", [{}, ONLY_PROJECTOR], ids=["everything", "projector-only"])
@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2", "cp2", "tp2-pp2-sequence-parallel"])
def test_layout_trains_like_one_process(name, fields):
    """Three AdamW steps, also where a whole stage or all but the projector is frozen. Measured: 3e-7."""
    world_size, layout = LAYOUTS[name]
    want = run_ranks(losses_of_a_run, 1, {}, fields)[0]
    for got in run_ranks(losses_of_a_run, world_size, layout, fields):
        assert got == pytest.approx(want, rel=3e-6)
    assert want[2] < want[0]
