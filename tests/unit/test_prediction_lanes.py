"""What a multi-token-prediction layer is fed: tokens, features and labels of slots further on in the segment."""

import itertools

import pytest
import torch

from mimo_megatron.data.collate import collate
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.parallel import zigzag
from mimo_megatron.parallel.mesh import Axis
from mimo_megatron.prove.cases import FEATURES, ONE, run_config
from mimo_megatron.prove.material import PACKS
from mimo_megatron.prove.measure import gradients, relative
from tests.harness import run_ranks
from tests.samples import tiny_model

SLOTS = 96
MODEL = tiny_model()
MTP = next(feature for feature in FEATURES if feature.name == "mtp")


@pytest.mark.parametrize("packs", ["mixed", "odd_segments"])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("ahead", [1, 2])
def test_slot_i_holds_what_slot_i_plus_k_of_its_segment_holds(packs, cp, ahead):
    for samples in PACKS[packs]:
        batch = collate(samples, MODEL, SLOTS)
        bounds = batch.segment_bounds
        end_of = [end for start, end in itertools.pairwise(bounds) for _ in range(start, end)]
        spliced, trained = {}, {}
        for rank in range(cp):
            lane = local_pack(batch, Axis(rank, cp), ahead).lanes[ahead]
            slots = zigzag.local_slots(SLOTS, rank, cp).tolist()
            for place, slot in enumerate(slots):
                if slot + ahead < end_of[slot]:
                    assert lane.token_ids_S[place] == batch.token_ids_S[slot + ahead]
            spliced |= {
                slots[place]: row
                for place, row in zip(lane.splice_slots_L.tolist(), lane.splice_rows_L.tolist(), strict=True)
            }
            trained |= {
                slots[place]: label for place, label in zip(lane.rows_R.tolist(), lane.labels_R.tolist(), strict=True)
            }
        features = {slot - ahead: row for row, slot in enumerate(batch.splice_M.tolist())}
        assert spliced == {
            slot: row for slot, row in features.items() if slot >= 0 and end_of[slot] == end_of[slot + ahead]
        }
        inside = [slot for slot in range(SLOTS) if slot + ahead < end_of[slot] and batch.loss_weights_S[slot + ahead]]
        assert trained == {slot: int(batch.labels_S[slot + ahead]) for slot in inside}


def test_a_segment_that_opens_with_an_image_loses_the_feature_that_has_no_slot_before_it():
    batch = collate(PACKS["mixed"][0], MODEL, SLOTS)
    first = torch.tensor([0])
    lane = local_pack(type(batch)(**(vars(batch) | {"splice_M": first})), Axis(0, 1), 1).lanes[1]
    assert len(lane.splice_slots_L) == 0


def packed_and_one_by_one(address: RankAddress) -> list[tuple[float, int, dict[str, torch.Tensor]]]:
    config = run_config(ONE, MTP)
    samples = [sample for pack in PACKS["mixed"] for sample in pack]
    with megatron(config.parallel, address) as mesh:
        packed = [collate(pack, config.model, SLOTS) for pack in PACKS["mixed"]]
        single = [collate([sample], config.model, SLOTS) for sample in samples]
        return [gradients(config, mesh, packs) for packs in (packed, single)]


def test_prediction_layers_see_nothing_of_the_neighbour_in_the_pack():
    packed, single = run_ranks(packed_and_one_by_one, 1)[0]
    assert packed[0] == pytest.approx(single[0], rel=1e-12) and packed[1] == single[1]
    assert max(relative(packed[2][name] - grad, grad) for name, grad in single[2].items()) < 1e-12
    assert all(grad.any() for name, grad in packed[2].items() if ".mtp." in name)


def objective(address: RankAddress, weight: float) -> tuple[float, int, dict[str, torch.Tensor]]:
    config = run_config(ONE, MTP)
    text = config.model.text.model_copy(update={"mtp_loss_weight": weight})
    config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
    with megatron(config.parallel, address) as mesh:
        return gradients(config, mesh, [collate(pack, config.model, SLOTS) for pack in PACKS["mixed"]])


def test_their_loss_is_added_with_its_weight_and_reaches_encoder_and_decoder():
    none, some, twice = (run_ranks(objective, 1, weight)[0] for weight in (0.0, 0.1, 0.2))
    assert none[1] == some[1] == twice[1]
    assert twice[0] - none[0] == pytest.approx(2 * (some[0] - none[0]), rel=1e-9) and some[0] > none[0]
    for name in ("vision.patch_embed.weight", "projector.fc2.weight", "text.decoder.layers.0.mlp.linear_fc2.weight"):
        assert relative(some[2][name] - none[2][name], none[2][name]) > 1e-3
    assert not any(none[2][name].any() for name in none[2] if ".mtp." in name)
