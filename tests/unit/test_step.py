"""What a trainer starts from, what a local pack holds, and how a rank's refusal reaches the caller."""

import pytest
import torch

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import MimoError
from mimo_megatron.mcore import weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.parallel.mesh import Axis
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.step import build_trainer, cross_entropy, local_packs
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


def brought(address: RankAddress) -> tuple[list[tuple[int, bool]], bool]:
    """When each pack is brought to the device, in calls of the model's forward by then, and whether it has pixels."""
    config = run_config(tiny_model(), parallel=ParallelConfig(pp=2))
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        packs = local_packs(
            config.model.text, mesh, trainer.bare_chunks, [collate(pack, config.model, SLOTS) for pack in mixed_packs()]
        )
        forwards, seen = [0], []
        trainer.bare_chunks[0].register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))

        def place(pack):
            seen.append((forwards[0], bool(len(pack.patches_PC))))
            return pack

        run_microbatches(trainer.chunks, packs, SLOTS, cross_entropy(mesh), place=place)
        return seen, mesh.is_first_stage


def test_a_pack_comes_to_the_device_when_its_turn_does_and_its_pixels_to_the_first_stage_only():
    for seen, is_first_stage in run_ranks(brought, 2):
        assert [forwards for forwards, _ in seen] == [0, 1, 2, 3]
        assert [has_pixels for _, has_pixels in seen] == ([True, False, True, True] if is_first_stage else [False] * 4)


def refusing(address: RankAddress) -> None:
    if address.rank == 1:
        raise MimoError("rank 1 says why")


def test_a_refusal_on_any_rank_reaches_the_caller_in_its_own_words():
    with pytest.raises(MimoError, match="rank 1 says why"):
        run_local(refusing, 2)
