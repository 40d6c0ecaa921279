"""What a trainer starts from, what a local pack holds, and how a rank's refusal reaches the caller."""

import pytest
import torch

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import MimoError
from mimo_megatron.mcore import weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.model.local_pack import LocalPack, local_pack
from mimo_megatron.parallel.mesh import Axis
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.step import backward, build_trainer
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96


def drawn(address: RankAddress, seed: int) -> dict[str, torch.Tensor]:
    config = run_config(tiny_model()).model_copy(update={"seed": seed})
    with megatron(config.parallel, address) as mesh:
        model = build_trainer(config, mesh).bare_chunks
        return {name: param.detach().clone() for name, param in weights.global_parameters(model)}


def test_start_weights_are_a_function_of_the_seed():
    first, again, other = (run_ranks(drawn, 1, seed)[0] for seed in (1, 1, 2))
    matrix = "text.decoder.layers.3.mlp.linear_fc2.weight"
    assert torch.equal(first[matrix], again[matrix])
    assert not torch.equal(first[matrix], other[matrix])
    assert first[matrix].std() == pytest.approx(weights.INIT_STD, rel=0.05)
    assert not first["text.decoder.layers.0.self_attention.linear_qkv.bias"].any()
    assert (first["text.decoder.final_layernorm.weight"] == 1).all()


def test_two_context_parallel_ranks_hold_every_trained_row_and_every_vision_token_once():
    model = tiny_model()
    batch = collate(mixed_packs()[0], model, SLOTS)
    lanes = [local_pack(batch, Axis(rank, 2)).lanes[0] for rank in range(2)]
    assert sorted(torch.cat([lane.splice_rows_L for lane in lanes]).tolist()) == list(range(len(batch.splice_M)))
    assert sum(len(lane.rows_R) for lane in lanes) == batch.num_trained
    for lane in lanes:
        assert (lane.token_ids_S[lane.splice_slots_L] == model.tokens.image_pad).all()


def brought(address: RankAddress) -> list[tuple[int, bool, bool]]:
    """Of each pack brought to the device: forwards done by then, whether it has pixels, whether the stage encodes."""
    config = run_config(tiny_model(), parallel=ParallelConfig(pp=2, vpp=2))
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        seen: list[tuple[int, bool, bool]] = []
        num_forwards = 0

        def count(stage: torch.nn.Module, args: tuple, _out: torch.Tensor) -> None:
            nonlocal num_forwards
            seen.append((num_forwards, bool(len(args[0].pixels_Y)), stage.pre_process))
            num_forwards += 1

        move = LocalPack.to
        moves: list[int] = []
        LocalPack.to = lambda pack, device: moves.append(num_forwards) or move(pack, device)
        for chunk in trainer.bare_chunks:
            chunk.register_forward_hook(count)
        backward(trainer, [collate(pack, config.model, SLOTS) for pack in mixed_packs()])
        LocalPack.to = move
        assert moves == list(range(num_forwards))
        return seen


def test_a_pack_comes_to_the_device_when_its_turn_does_and_its_pixels_to_the_encoders_stage_only():
    for seen in run_ranks(brought, 2):
        assert len(seen) == 8
        assert not any(has_pixels for _, has_pixels, encodes in seen if not encodes)
        assert sum(has_pixels for _, has_pixels, encodes in seen if encodes) in (0, 3)


def refusing(address: RankAddress) -> None:
    if address.rank == 1:
        raise MimoError("rank 1 says why")


def test_a_refusal_on_any_rank_reaches_the_caller_in_its_own_words():
    with pytest.raises(MimoError, match="rank 1 says why"):
        run_local(refusing, 2)
