"""Checkpoints: a resumed run is the uninterrupted run bit for bit, in its own layout; any layout loads any other's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.run import ModuleTraining, ParallelConfig, RunConfig
from mimo_megatron.convert.checkpoint_io import CheckpointReader
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import CheckpointError
from mimo_megatron.mcore import checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.train.step import Trainer, build_trainer, train_step
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, dict(tp=2)),
    "pp2": (2, dict(pp=2)),
    "dp2": (2, {}),
    "tp2-pp2-sequence-parallel": (4, dict(tp=2, pp=2, sequence_parallel=True)),
}


def recipe(layout: dict[str, Any], **fields: Any) -> RunConfig:
    return run_config(tiny_model(), parallel=ParallelConfig(**layout), **fields)


def steps(trainer: Trainer, mesh: Mesh, first: int, last: int) -> list[float]:
    batches = [collate(pack, trainer.config.model, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
    return [train_step(trainer, batches, step, 1.0).loss for step in range(first, last)]


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = weights.global_parameters(trainer.bare_chunks)
    return {name: weights.unshard(name, param.detach(), param, trainer.mesh.tp).clone() for name, param in named}


def uninterrupted(address: RankAddress, config: RunConfig, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Four steps; a checkpoint after the second."""
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        losses = steps(trainer, mesh, 0, 2)
        checkpoint.save(folder, config.model, trainer.bare_chunks, trainer.optimizer, {"step": 2})
        return losses + steps(trainer, mesh, 2, 4), parameters(trainer)


@dataclass(frozen=True)
class Saved:
    """What ``uninterrupted`` gave on every rank, and the checkpoint that it left alone in a folder; to be read only."""

    ranks: list[tuple[list[float], dict[str, torch.Tensor]]]
    folder: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Of a layout and a precision; each is run once."""

    @cache
    def run(name: str, precision: str = "fp32") -> Saved:
        world_size, layout = LAYOUTS[name]
        folder = tmp_path_factory.mktemp("run") / "saved"
        return Saved(run_ranks(uninterrupted, world_size, recipe(layout, precision=precision), folder), folder)

    return run


def resumed(address: RankAddress, config: RunConfig, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        state = checkpoint.load(folder, config.model, trainer.bare_chunks, trainer.optimizer)
        assert state == {"step": 2}
        return steps(trainer, mesh, 2, 4), parameters(trainer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["one", "dp2", "tp2-pp2-sequence-parallel"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, precision, saved):
    world_size, layout = LAYOUTS[name]
    whole = saved(name, precision)
    parts = run_ranks(resumed, world_size, recipe(layout, precision=precision), whole.folder)
    for (whole_losses, whole_weights), (part_losses, part_weights) in zip(whole.ranks, parts, strict=True):
        assert whole_losses[2:] == part_losses
        assert whole_weights.keys() == part_weights.keys()
        assert all(torch.equal(whole_weights[key], part_weights[key]) for key in whole_weights)


@pytest.mark.parametrize("before, after", [("tp2-pp2-sequence-parallel", "one"), ("one", "tp2"), ("dp2", "pp2")])
def test_a_checkpoint_resumes_on_another_layout(before, after, saved):
    """Weights and optimizer state both: the next two steps lose as much as the uninterrupted run's. Measured: 2e-7."""
    whole = saved(before)
    whole_losses, _ = whole.ranks[0]
    size, layout = LAYOUTS[after]
    for part_losses, _ in run_ranks(resumed, size, recipe(layout), whole.folder):
        assert part_losses == pytest.approx(whole_losses[2:], rel=3e-6)


def load_into(address: RankAddress, config: RunConfig, folder: Path) -> str:
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(folder, config.model, trainer.bare_chunks, trainer.optimizer)
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_refused_by_the_fields_that_differ(saved):
    other = run_config(tiny_model(ffn_width=256))
    message = run_ranks(load_into, 1, other, saved("one").folder)[0]
    assert "model.text.ffn_width: found 384, wanted 256" in message


def saved_alone(address: RankAddress, config: RunConfig, folder: Path) -> None:
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        checkpoint.save(folder, config.model, trainer.bare_chunks, trainer.optimizer, {"step": 2})


@pytest.mark.parametrize("name", ["one", "pp2", "dp2"])
def test_a_part_that_the_saved_run_did_not_train_is_refused_on_all_ranks_by_its_name(name, tmp_path):
    world_size, layout = LAYOUTS[name]
    frozen = recipe({}, vision=ModuleTraining(), projector=ModuleTraining())
    run_ranks(saved_alone, 1, frozen, tmp_path / "saved")
    first, *others = run_ranks(load_into, world_size, recipe(layout), tmp_path / "saved")
    assert "its run did not train projector, vision, which this recipe trains" in first
    assert "Set train.projector.lr=null train.vision.lr=null to go on" in first and f"start_from={tmp_path}" in first
    assert all(other == first for other in others)


def test_a_part_that_is_no_longer_trained_keeps_its_weights(saved):
    """The other way round nothing is missing."""
    folder = saved("one").folder
    _, found = run_ranks(resumed, 1, recipe({}, vision=ModuleTraining()), folder)[0]
    reader = CheckpointReader(folder)
    is_kept = {name: torch.equal(tensor, reader.read(name)) for name, tensor in found.items()}
    assert all(is_kept[name] for name in found if name.startswith("vision."))
    assert not any(is_kept[name] for name in found if name.startswith(("projector.", "text.")))


def test_an_fp8_history_of_another_length_is_refused_by_its_key(tmp_path):
    def of_length(history: int) -> RunConfig:
        return recipe({}, fp8=Fp8Config(scaling="delayed", first_layers=0, history=history))

    run_ranks(saved_alone, 1, of_length(4), tmp_path / "saved")
    message = run_ranks(load_into, 1, of_length(2), tmp_path / "saved")[0]
    assert "was saved with train.fp8.history=4, and the recipe says 2" in message


def test_a_truncated_checkpoint_is_refused(saved, tmp_path):
    shutil.copytree(saved("one").folder, tmp_path / "saved")
    shard = max((tmp_path / "saved").glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    message = run_ranks(load_into, 2, recipe({}), tmp_path / "saved")[1]
    assert f"{shard.name} has" in message and "is damaged" in message


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a checkpoint" in run_ranks(load_into, 1, recipe({}), tmp_path / "empty")[0]


def test_a_checkpoint_is_published_whole(saved):
    folder = saved("one").folder
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    assert json.loads((folder / "state.json").read_text()) == {"step": 2}
