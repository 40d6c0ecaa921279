"""Whose AdamW a run uses changes nothing of it: resumed is uninterrupted, also with another one's; every group alike.

The FusedAdam of Transformer Engine and of apex are stand-ins (``tests/fused_adam.py``); torch's is fused on the CPU.
"""

import contextlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_megatron.config.run import ModuleTraining, OptimizerConfig, ParallelConfig, RunConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import adam, checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.optimizer import live_tensors
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.train.step import Trainer, build_trainer, train_step
from tests.fused_adam import PACKAGES, ApexAdam, TransformerEngineAdam, installed
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2-pp2-sequence-parallel": (4, dict(tp=2, pp=2, sequence_parallel=True)),
}
KINDS = {"transformer-engine": TransformerEngineAdam, "apex": ApexAdam, "torch": torch.optim.AdamW}
Outcome = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Losses, whole parameters, and the optimizer's moments as they lie on the rank."""


def recipe(layout: str, whose: str, precision: str = "fp32") -> RunConfig:
    """Every part has its own rate."""
    implementation: Any = "torch" if whose == "plain" else whose
    rates = {name: ModuleTraining(lr=lr) for name, lr in dict(vision=2e-3, projector=4e-3, text=1e-3).items()}
    optimizer = OptimizerConfig(implementation=implementation, weight_decay=0.1)
    parallel = ParallelConfig(**LAYOUTS[layout][1])
    return run_config(tiny_model(), parallel=parallel, precision=precision, optimizer=optimizer, **rates)


def machine(config: RunConfig, whose: str) -> contextlib.AbstractContextManager[None]:
    """One that has all packages, or for torch's plain AdamW this one."""
    return contextlib.nullcontext() if whose == "plain" else installed(*PACKAGES)


def steps(trainer: Trainer, mesh: Mesh, first: int, last: int) -> list[float]:
    batches = [collate(pack, trainer.config.model, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
    return [train_step(trainer, batches, step, 1.0).loss for step in range(first, last)]


def outcome(trainer: Trainer, losses: list[float]) -> Outcome:
    named = weights.global_parameters(trainer.bare_chunks)
    tp = trainer.mesh.tp
    whole = {name: weights.unshard(name, param.detach(), param, tp).clone() for name, param in named}
    (own,) = trainer.optimizer.chained_optimizers
    states = enumerate(own.optimizer.state.values())
    return losses, whole, {f"{n}.{key}": state[key].clone() for n, state in states for key in ("exp_avg", "exp_avg_sq")}


def trainer_of(config: RunConfig, mesh: Mesh, whose: str) -> Trainer:
    trainer = build_trainer(config, mesh)
    (own,) = trainer.optimizer.chained_optimizers
    assert type(own.optimizer) is KINDS["torch" if whose == "plain" else whose]
    if whose == "torch":
        assert all(group["fused"] for group in own.optimizer.param_groups)
    return trainer


def uninterrupted(address: RankAddress, config: RunConfig, whose: str, folder: Path) -> Outcome:
    """Four steps; a checkpoint after the second."""
    with machine(config, whose), megatron(config.parallel, address) as mesh:
        trainer = trainer_of(config, mesh, whose)
        losses = steps(trainer, mesh, 0, 2)
        checkpoint.save(folder, config.model, trainer.bare_chunks, trainer.optimizer)
        return outcome(trainer, losses + steps(trainer, mesh, 2, 4))


def resumed(address: RankAddress, config: RunConfig, whose: str, folder: Path) -> Outcome:
    with machine(config, whose), megatron(config.parallel, address) as mesh:
        trainer = trainer_of(config, mesh, whose)
        checkpoint.load(folder, config.model, trainer.bare_chunks, trainer.optimizer)
        return outcome(trainer, steps(trainer, mesh, 2, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[Outcome], Path]]:
    """Of a layout, whose AdamW and a precision: what every rank had after four steps, and the checkpoint of two."""

    @cache
    def run(layout: str, whose: str, precision: str = "fp32") -> tuple[list[Outcome], Path]:
        folder = tmp_path_factory.mktemp("run") / "saved"
        config = recipe(layout, whose, precision)
        return run_ranks(uninterrupted, LAYOUTS[layout][0], config, whose, folder), folder

    return run


def resume(layout: str, whose: str, folder: Path, precision: str = "fp32") -> list[Outcome]:
    return run_ranks(resumed, LAYOUTS[layout][0], recipe(layout, whose, precision), whose, folder)


@pytest.mark.parametrize(
    ("layout", "whose", "precision"),
    [
        ("one", "transformer-engine", "fp32"), ("dp2", "transformer-engine", "bf16"),
        ("tp2-pp2-sequence-parallel", "transformer-engine", "fp32"), ("dp2", "apex", "fp32"),
        ("tp2-pp2-sequence-parallel", "apex", "bf16"), ("dp2", "torch", "fp32"),
        ("tp2-pp2-sequence-parallel", "torch", "bf16"),
    ],
)  # fmt: skip
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(layout, whose, precision, saved):
    whole, folder = saved(layout, whose, precision)
    for (losses, params, moments), (losses_again, params_again, moments_again) in zip(
        whole, resume(layout, whose, folder, precision), strict=True
    ):
        assert losses[2:] == losses_again
        assert params.keys() == params_again.keys() and moments.keys() == moments_again.keys()
        assert all(torch.equal(params[name], params_again[name]) for name in params)
        assert all(torch.equal(moments[name], moments_again[name]) for name in moments)


def apart(outcomes: list[Outcome], others: list[Outcome], starts: list[Outcome]) -> float:
    """How far two runs' parameters are from one another, in the length of what the first has moved them."""
    worst = 0.0
    for (_, params, _), (_, other, _), (_, start, _) in zip(outcomes, others, starts, strict=True):
        for name, param in params.items():
            moved = (param - start[name]).double().norm().item()
            worst = max(worst, (param - other[name]).double().norm().item() / max(moved, 1e-30))
    return worst


def at_start(address: RankAddress, config: RunConfig) -> Outcome:
    with megatron(config.parallel, address) as mesh:
        return outcome(build_trainer(config, mesh), [])


SAME = 5e-5
"""Of four steps' updates; measured: 6e-6."""


@pytest.mark.parametrize(
    ("before", "after"),
    [("transformer-engine", "plain"), ("plain", "transformer-engine"), ("apex", "torch"), ("torch", "apex")],
)
def test_a_run_saved_with_one_resumes_with_another(before, after, saved):
    whole, folder = saved("dp2", before)
    again = resume("dp2", after, folder)
    assert again[0][0] == pytest.approx(whole[0][0][2:], rel=1e-6)
    assert apart(whole, again, run_ranks(at_start, 2, recipe("dp2", "plain"))) < SAME


def test_parts_of_other_rates_and_decays_are_updated_alike(saved):
    """Against torch's plain AdamW; a part with the rate of another would be off by half of its way at least."""
    start = run_ranks(at_start, 2, recipe("dp2", "plain"))
    plain = saved("dp2", "plain")[0]
    for whose in ("transformer-engine", "apex", "torch"):
        assert apart(plain, saved("dp2", whose)[0], start) < SAME, whose


def test_a_run_that_forgets_the_count_of_updates_is_found(saved, monkeypatch):
    whole, folder = saved("dp2", "transformer-engine")
    monkeypatch.setattr(adam, "set_step_count", lambda optimizer, count: None)
    again = resume("dp2", "transformer-engine", folder)
    assert apart(whole, again, run_ranks(at_start, 2, recipe("dp2", "plain"))) > 0.1  # measured: 0.38


def empty_groups(address: RankAddress, config: RunConfig, whose: str) -> tuple[int, list[int], int]:
    """(groups without parameters, counts of all groups, the count that is saved) after two steps."""
    with machine(config, whose), megatron(config.parallel, address) as mesh:
        trainer = trainer_of(config, mesh, whose)
        steps(trainer, mesh, 0, 2)
        (own,) = trainer.optimizer.chained_optimizers
        groups = own.optimizer.param_groups
        counts = [group.get("step", 0) for group in groups]
        return sum(not group["params"] for group in groups), counts, adam.step_count(own.optimizer)


@pytest.mark.parametrize(("whose", "of_empty"), [("transformer-engine", 0), ("apex", 2)])
def test_groups_that_are_empty_on_a_rank_do_not_say_the_count(whose, of_empty):
    layout = "tp2-pp2-sequence-parallel"
    found = run_ranks(empty_groups, 4, recipe(layout, whose), whose)
    assert any(num_empty for num_empty, _, _ in found)
    for num_empty, counts, saved_count in found:
        assert saved_count == 2 and sorted(counts) == sorted([2] * (len(counts) - num_empty) + [of_empty] * num_empty)


def test_what_a_step_changes_is_copied_before_training_goes_on():
    assert run_ranks(changed_outside_of_live, 1, recipe("one", "transformer-engine")) == [[]]


def changed_outside_of_live(address: RankAddress, config: RunConfig) -> list[str]:
    """Tensors of the optimizer that a step changed and ``live_tensors`` does not name."""
    with machine(config, "transformer-engine"), megatron(config.parallel, address) as mesh:
        trainer = trainer_of(config, mesh, "transformer-engine")
        live = {tensor.untyped_storage().data_ptr() for tensor in live_tensors(trainer.optimizer)}
        (own,) = trainer.optimizer.chained_optimizers
        state = {f"{n}.{key}": one for n, part in enumerate(own.optimizer.state.values()) for key, one in part.items()}
        before = {name: one.clone() for name, one in state.items()}
        steps(trainer, mesh, 0, 1)
        changed = [name for name, one in state.items() if not torch.equal(one, before[name])]
        assert changed
        return [name for name in changed if state[name].untyped_storage().data_ptr() not in live]
