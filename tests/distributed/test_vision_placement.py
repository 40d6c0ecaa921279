"""Images shared out over tp x cp: which rank encodes what changes nothing, also over three steps and a resume.

Loss and every gradient against one process, in all layouts and with planted faults, are ``test_prove.py``'s.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_megatron.config.run import ModuleTraining, ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model import vision_share
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.prove.cases import FEATURES, ONE, Case
from mimo_megatron.prove.cases import LAYOUTS as PROVEN
from mimo_megatron.prove.measure import Errors, errors, outcome
from mimo_megatron.train.step import build_trainer, train_step
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sequence-parallel": (2, dict(tp=2, sequence_parallel=True)),
    "tp2-cp2": (4, dict(tp=2, cp=2)),
    "cp2-dp2": (4, dict(cp=2)),
}
BALANCED = dict(vision_placement="balanced")


def spread_at_random(address: RankAddress, case: Case, reference: Path, seed: str) -> Errors:
    """The errors where pieces are thrown over the ranks, by a draw that is the same on all of them."""
    vision_share.spread = lambda costs, size: random.Random(f"{seed} {costs}").choices(range(size), k=len(costs))
    return errors(address, case, reference)


@pytest.mark.parametrize("name", ["mixed", "video"])
def test_which_rank_encodes_what_changes_nothing(name, tmp_path):
    layout = next(one for one in PROVEN if one.name == "tp2 sp cp2 balanced")
    feature = next(one for one in FEATURES if one.name == name)
    reference = tmp_path / "reference.pt"
    torch.save(run_ranks(outcome, 1, Case(ONE, feature))[0], reference)
    for seed in "123":
        ranks = run_ranks(spread_at_random, layout.ranks, Case(layout, feature), reference, seed)
        assert max(one.worst_gradient for one in ranks)[0] < 1e-12


def refusal_of_a_whole_pack(address: RankAddress) -> str:
    parallel = ParallelConfig(tp=2, **BALANCED)
    with megatron(parallel, address) as mesh:
        (model,) = build_chunks(tiny_model(), parallel, Numerics(), mesh)
        with pytest.raises(AssertionError) as refused:
            model(local_pack(collate(mixed_packs()[0], tiny_model(), SLOTS), mesh.cp))
        return str(refused.value)


def test_a_balanced_model_does_not_train_on_a_pack_that_was_not_shared_out():
    assert run_ranks(refusal_of_a_whole_pack, 2) == ["local_pack wants the model's sharing"] * 2


# ---- training --------------------------------------------------------------------------------------------------------

ONLY_PROJECTOR = dict(vision=ModuleTraining(), text=ModuleTraining())
RECIPES: dict[str, dict[str, Any]] = {"everything": {}, "projector only": ONLY_PROJECTOR}


def runs_of(address: RankAddress, layout: dict[str, Any]) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses and gradient norms of three AdamW steps, and the vision weights then, by recipe."""
    runs = {}
    parallel = ParallelConfig(**layout)
    with megatron(parallel, address) as mesh:
        for name, fields in RECIPES.items():
            trainer = build_trainer(run_config(tiny_model(), parallel=parallel, **fields), mesh)
            packs = mixed_packs()[mesh.dp.rank :: mesh.dp.size]
            batches = [collate(pack, trainer.config.model, SLOTS) for pack in packs]
            results = [train_step(trainer, batches, step, 1.0) for step in range(3)]
            named = weights.global_parameters(trainer.bare_chunks)
            vision = {key: param.detach().clone() for key, param in named if key.startswith(("vision.", "projector."))}
            runs[name] = [x for one in results for x in (one.loss, one.grad_norm)], vision
    return runs


@pytest.fixture(scope="module")
def one_process_runs() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    return run_ranks(runs_of, 1, {})[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_balanced_placement_trains_like_one_process(name, one_process_runs):
    """Losses and gradient norms, to 7e-7 measured; and all ranks hold the same encoder after it, bit for bit."""
    world_size, layout = LAYOUTS[name]
    ranks = run_ranks(runs_of, world_size, layout | BALANCED)
    for recipe, (want, _) in one_process_runs.items():
        assert want[4] < want[0]
        for runs in ranks:
            got, vision = runs[recipe]
            assert got == pytest.approx(want, rel=3e-6), recipe
            assert all(torch.equal(value, ranks[0][recipe][1][key]) for key, value in vision.items()), recipe


def saved_or_resumed(address: RankAddress, layout: dict[str, Any], folder: Any, is_saving: bool) -> list[float]:
    parallel = ParallelConfig(**layout)
    config = run_config(tiny_model(), parallel=parallel)
    with megatron(parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
        if is_saving:
            train_step(trainer, batches, 0, 1.0)
            checkpoint.save(folder, config.model, trainer.bare_chunks, trainer.optimizer, {"step": 1})
        else:
            checkpoint.load(folder, config.model, trainer.bare_chunks, trainer.optimizer)
        return [train_step(trainer, batches, step, 1.0).loss for step in (1, 2)]


@pytest.mark.parametrize("before, after", [(BALANCED, {}), ({}, BALANCED)], ids=["to-replicated", "to-balanced"])
def test_a_checkpoint_of_one_placement_resumes_in_the_other(before, after, tmp_path):
    layout = dict(tp=2)
    whole = run_ranks(saved_or_resumed, 2, layout | before, tmp_path / "saved", True)[0]
    for part in run_ranks(saved_or_resumed, 2, layout | after, tmp_path / "saved", False):
        assert part == pytest.approx(whole, rel=3e-6)
