"""A step that is not finite stops all ranks before the optimizer, names its cause, and can be taken again elsewhere."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimo_megatron.cli import main
from mimo_megatron.config.run import ParallelConfig, RunConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.data.media_part import ALL_MEDIA
from mimo_megatron.errors import DataError, NonFiniteError
from mimo_megatron.mcore import weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.model.vision_share import share_out
from mimo_megatron.train.faults import keep_fault, read_packs, write_packs
from mimo_megatron.train.run_folder import RunFolder
from mimo_megatron.train.step import Trainer, build_trainer, media_part, train_step
from mimo_megatron.types import PackedBatch
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS, STEP = 96, 7


def config_of(folder: Path, parallel: ParallelConfig) -> RunConfig:
    config = run_config(tiny_model(), parallel=parallel)
    data = config.data.model_copy(update={"pack_tokens": SLOTS, "max_pixels": 40_000})
    data = data.model_copy(update={"video": data.video.model_copy(update={"max_total_tokens": 64})})
    return config.model_copy(update={"dir": folder, "data": data})


def with_nan_weight(batch: PackedBatch) -> PackedBatch:
    loss_weights_S = batch.loss_weights_S.clone()
    loss_weights_S[int(loss_weights_S.nonzero()[0])] = math.nan
    return replace(batch, loss_weights_S=loss_weights_S)


def as_loaded(batch: PackedBatch, trainer: Trainer) -> PackedBatch:
    """With the pixels that this rank's loader decodes."""
    part, sharing = media_part(trainer.config.parallel, trainer.mesh), trainer.bare_chunks[0].sharing
    if part == ALL_MEDIA:
        return batch
    pixels_Y = batch.pixels_Y[:0]
    if sharing is not None and batch.vision is not None:
        pixels_Y, _, _ = share_out(batch.pixels_Y, batch.vision, sharing)
    pieces = part.pieces(batch.vision.grids_I3 if batch.vision else (), trainer.config.model)
    return replace(batch, pixels_Y=pixels_Y, pieces_held=pieces)


def poisoned_step(address: RankAddress, folder: Path, parallel: ParallelConfig, poison: str) -> tuple[str, bool]:
    """What the error says, and whether the parameters stayed as they were. Poison: a weight, or pack 3's loss."""
    config = config_of(folder, parallel)
    with megatron(parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        packs = [collate(pack, config.model, SLOTS) for pack in mixed_packs()]
        if poison == "pack":
            packs[3] = with_nan_weight(packs[3])
        else:
            for name, param in weights.global_parameters(trainer.bare_chunks):
                if name == poison:
                    param.data[3] = math.inf
        before = {name: param.clone() for name, param in weights.global_parameters(trainer.bare_chunks)}
        batches = [as_loaded(pack, trainer) for pack in packs[mesh.dp.rank :: mesh.dp.size]]
        with pytest.raises(NonFiniteError) as caught:
            train_step(trainer, batches, STEP, 1.0)
        error = keep_fault(caught.value, trainer, batches, RunFolder(config.dir), STEP)
        same = all(torch.equal(before[name], param) for name, param in weights.global_parameters(trainer.bare_chunks))
    return str(error), same


LAYOUTS = {
    "dp2": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "tp2 balanced": {"tp": 2, "vision_placement": "balanced"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pack_that_is_not_finite_is_named_on_every_rank_and_shows_again_in_another_layout(layout, tmp_path, capsys):
    seen = run_ranks(poisoned_step, 2, tmp_path, ParallelConfig(**layout), "pack")
    assert all(is_untouched for _, is_untouched in seen)
    assert seen[0][0] == seen[1][0]  # all ranks stop, with the same words
    place = "microbatch 3 of dp rank 0" if layout else "microbatch 1 of dp rank 1"
    message = seen[0][0]
    assert message.startswith(f"step {STEP}: the loss is nan") and f"First in {place}: loss nan" in message
    assert "samples sample-7;" in message and "1 of 4 microbatches" in message and "before the step" not in message
    fault = tmp_path / "faults" / f"step_{STEP:06d}"
    for kept, pack in zip(read_packs(fault), mixed_packs(), strict=True):
        assert kept.pieces_held is None and torch.equal(kept.pixels_Y, collate(pack, tiny_model(), SLOTS).pixels_Y)
    alone = [
        "parallel.tp=1",
        "parallel.pp=1",
        "parallel.vpp=1",
        "parallel.cp=1",
        "parallel.vision_placement=replicated",
    ]
    other = alone if layout else ["parallel.tp=2"]
    assert main(["replay", str(fault), "--ranks", "2", *other]) == 1
    said = capsys.readouterr().out
    assert said.count("loss nan") == 2 and "sample-7" in said  # the microbatch's line and the verdict


def test_where_the_step_cannot_be_kept_every_rank_still_says_what_was_wrong_with_it(tmp_path):
    (tmp_path / "faults").write_text("a file where the folder should be")
    for message, is_untouched in run_ranks(poisoned_step, 2, tmp_path, ParallelConfig(), "pack"):
        assert message.startswith(f"step {STEP}: the loss is nan") and "samples sample-7" in message
        assert "could not be kept whole" in message and "replay" not in message and is_untouched


def test_a_step_kept_again_on_fewer_ranks_leaves_no_pack_of_the_first_time(tmp_path):
    for num_ranks in (2, 1):
        run_ranks(poisoned_step, num_ranks, tmp_path, ParallelConfig(), "pack")
    assert len(read_packs(tmp_path / "faults" / f"step_{STEP:06d}")) == len(mixed_packs())


def test_a_mended_pack_replays_as_finite(tmp_path, capsys):
    run_ranks(poisoned_step, 2, tmp_path, ParallelConfig(), "pack")
    fault = tmp_path / "faults" / f"step_{STEP:06d}"
    packs = read_packs(fault)
    clean = [collate(pack, tiny_model(), SLOTS) for pack in mixed_packs()]
    assert [pack.sample_ids for pack in packs] == [pack.sample_ids for pack in clean]
    for name, value in vars(clean[2]).items():
        kept = vars(packs[2])[name]
        assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else name == "vision" or kept == value
    for rank in range(2):
        write_packs(fault, rank, clean[rank::2])
    assert main(["replay", str(fault), "--ranks", "2"]) == 0
    assert "Everything is finite" in capsys.readouterr().out


def test_a_weight_that_is_not_finite_is_named_by_its_checkpoint_name(tmp_path, capsys):
    name = "text.decoder.layers.3.mlp.linear_fc2.weight"  # on the second stage: its number counts over both
    message = run_ranks(poisoned_step, 2, tmp_path, ParallelConfig(pp=2), name)[0][0]
    assert f"Weights that are not finite before the step: {name} (1 in all)" in message
    assert "4 of 4 microbatches are not finite" in message
    assert main(["replay", str(tmp_path / "faults" / f"step_{STEP:06d}"), "--ranks", "2"]) == 1
    assert name in capsys.readouterr().out


def test_a_folder_without_packs_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="holds no packs_dp0000"):
        read_packs(tmp_path)
