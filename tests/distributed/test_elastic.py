"""A run that changes its layout at every restart: weights and optimizer moments survive bit for bit, losses go on.

What a rank holds is read from its memory, by ranges of megatron's flat buffers, and not by way of another checkpoint: a
load that undoes a wrong save would pass otherwise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.config.run import ParallelConfig, RunConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.train.step import Trainer, build_trainer, train_step
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96
STEPS = 2  # on every layout
CHAIN: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (2, dict(tp=2, sequence_parallel=True)),
    (2, dict(pp=2, vpp=2)),
    (4, dict(cp=2)),
    (4, dict(tp=2, pp=2, vpp=2, sequence_parallel=True, stage_layers=(0, 1, 2, 1))),
    (2, dict(pp=2, stage_layers=(1, 3))),
    (2, {}),
    (1, {}),
)
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied-with-a-prediction-layer": {"tie_embeddings": True, "num_mtp_layers": 1},
}
# Measured over all links of the chain: at most 5e-7.
FP32_TOLERANCE = 3e-6
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Visit:
    """What one rank saw on one layout."""

    before: Named
    """Whole weights and moments of its stages, as loaded."""
    losses: list[float]
    after: Named


def held(trainer: Trainer) -> Named:
    """Whole weights and AdamW moments of this rank's stages, from its memory."""
    tp = trainer.mesh.tp
    own = trainer.optimizer.chained_optimizers[0]
    wanted = {param: name for name, param in weights.global_parameters(trainer.bare_chunks)}
    found = {name: weights.unshard(name, param.detach(), param, tp).clone() for param, name in wanted.items()}
    for model_param, name in wanted.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            flat = torch.zeros(model_param.numel())
            if model_param in own.model_param_gbuf_map:
                place = own._get_model_param_range_map(model_param)["param"]
                flat[place.start : place.end] = own._get_main_param_and_optimizer_states(model_param)[moment].flatten()
            dist.all_reduce(flat, group=own.data_parallel_group)
            found[f"{moment} of {name}"] = weights.unshard(name, flat.view(model_param.shape), model_param, tp).clone()
    return found


def visit(address: RankAddress, config: RunConfig, load: Path | None, save: Path, first_step: int) -> Visit:
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        if load is not None:
            state = checkpoint.load(load, config.model, trainer.bare_chunks, trainer.optimizer)
            assert state == {"step": first_step}
        before = held(trainer)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
        losses = [train_step(trainer, batches, first_step + number, 1.0).loss for number in range(STEPS)]
        state = {"step": first_step + STEPS}
        checkpoint.save(save, config.model, trainer.bare_chunks, trainer.optimizer, state)
        return Visit(before, losses, held(trainer))


def straight(address: RankAddress, config: RunConfig) -> list[float]:
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
        return [train_step(trainer, batches, step, 1.0).loss for step in range(STEPS * len(CHAIN))]


def merged(ranks: list[Named]) -> Named:
    """All stages' tensors; ranks that hold the same one agree on its bits."""
    whole: Named = {}
    for named in ranks:
        for name, tensor in named.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"ranks disagree on {name}"
    return whole


def differing(left: Named, right: Named) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_run_goes_on_over_a_chain_of_layouts(model, tmp_path):
    """Every link loads the exact tensors that the link before held; the losses are those of one process."""
    text = tiny_model(**MODELS[model])
    want = run_ranks(straight, 1, run_config(text))[0]
    last: Named | None = None
    losses: list[float] = []
    for number, (world_size, layout) in enumerate(CHAIN):
        config = run_config(text, parallel=ParallelConfig(**layout))
        load = tmp_path / f"link{number - 1}" if number else None
        visits = run_ranks(visit, world_size, config, load, tmp_path / f"link{number}", STEPS * number)
        loaded = merged([one.before for one in visits])
        assert last is None or not differing(loaded, last), layout
        assert any("exp_avg_sq of text." in name for name in loaded)
        last = merged([one.after for one in visits])
        assert differing(loaded, last), "training changed nothing"
        assert all(one.losses == visits[0].losses for one in visits)
        losses += visits[0].losses
    assert losses == pytest.approx(want, rel=FP32_TOLERANCE)
    assert losses[:STEPS] == want[:STEPS]
