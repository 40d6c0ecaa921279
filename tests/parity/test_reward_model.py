"""A reward model and its export as a sequence classifier: transformers gives the same scores."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from mimo_megatron.config.calibration import Calibration, read_calibration, write_calibration
from mimo_megatron.config.manifest import check_whole
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import EncodingConfig, ParallelConfig
from mimo_megatron.convert.hf_config import model_of
from mimo_megatron.convert.verbs import from_hf, to_hf, verify
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import CheckpointError, ConfigError
from mimo_megatron.evaluation.opened import opened
from mimo_megatron.mcore import checkpoint, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.prove.material import image, random_sample
from mimo_megatron.reward_model.scoring import scores_of
from mimo_megatron.train.start import load_weights
from mimo_megatron.types import EncodedSample
from tests.data_fixtures import write_tokenizer
from tests.harness import run_ranks
from tests.samples import tiny_model

CALIBRATION = Calibration(mu=0.5, tau=2.0, accuracy=0.9, num_pairs=10, pairs_sha256="")
MODELS = {
    "text": tiny_model(head="reward").model_copy(update={"vision": None}),
    "multimodal": tiny_model(head="reward"),
}


def judged(kind: str) -> list[EncodedSample]:
    media = [image(6, 10, 3)] if kind == "multimodal" else []
    samples = [random_sample(seed, 5 + 7 * seed, media if seed % 2 else []) for seed in range(4)]
    return [EncodedSample(one.id, one.token_ids_T, one.loss_mask_T, one.media, reads_reward=True) for one in samples]


def save_random(address: RankAddress, model: ModelConfig, folder: Path) -> None:
    with megatron(ParallelConfig(), address) as mesh:
        chunks = build_chunks(model, ParallelConfig(), Numerics(), mesh)
        weights.draw_weights(chunks, 5, mesh.tp)
        with torch.no_grad():  # scores that differ by more than rounding
            chunks[0].text.output_layer.weight.mul_(50)
        checkpoint.save(folder, model, chunks)


def scores(address: RankAddress, folder: Path, kind: str, encoding: EncodingConfig, scratch: Path) -> list[float]:
    with opened(folder, ParallelConfig(), encoding, address, scratch, head="reward") as model:
        return scores_of(model, ParallelConfig(), judged(kind), 64)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> tuple[str, Path, Path, list[float]]:
    """Kind, checkpoint, Hugging Face folder, and our scores."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = write_tokenizer(folder / "tokenizer")
    run_ranks(save_random, 1, MODELS[kind], folder / "checkpoint")
    write_calibration(folder / "checkpoint", CALIBRATION)
    to_hf(folder / "checkpoint", folder / "hf", tokenizer_from=tokenizer)
    encoding = EncodingConfig(tokenizer=tokenizer)
    (found,) = run_ranks(scores, 1, folder / "checkpoint", kind, encoding, folder)
    return kind, folder / "checkpoint", folder / "hf", found


def test_transformers_reads_the_export_and_gives_the_same_scores(exported) -> None:
    kind, _, folder, ours = exported
    assert max(ours) - min(ours) > 0.1
    if kind == "text":
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(model).__name__ == "Qwen2ForSequenceClassification" and model.config.num_labels == 1
        with torch.no_grad():
            theirs = [model(torch.from_numpy(one.token_ids_T)[None]).logits.item() for one in judged(kind)]
    else:  # no such class there: its body, and the exported head
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        (file,) = folder.glob("*.safetensors")
        head = load_file(file)["language_model.score.weight"]
        theirs = []
        for one in judged(kind):
            pack = collate([one], MODELS[kind], one.num_tokens)
            pixels = {}
            if one.media:
                grid = torch.tensor([media.grid for media in one.media])
                patches_PC = torch.cat([torch.from_numpy(media.patches_PC) for media in one.media])
                pixels = {"pixel_values": normalised(patches_PC), "image_grid_thw": grid}
            ids = pack.token_ids_S[None]
            with torch.no_grad():
                hidden = model(input_ids=ids, position_ids=pack.positions_3S[:, None], **pixels).last_hidden_state
            theirs.append((hidden[0, -1] @ head[0]).item())
    assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)


def normalised(patches_PC: torch.Tensor) -> torch.Tensor:
    """Pixels as Hugging Face's image processor gives them."""
    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    pixels = patches_PC.float().unflatten(1, (3, -1)) / 255
    return ((pixels - mean[:, None]) / std[:, None]).flatten(1)


def test_a_score_does_not_depend_on_what_is_scored_beside_it(exported, tmp_path: Path) -> None:
    kind, folder, _, together = exported
    encoding = EncodingConfig(tokenizer=folder.parent / "tokenizer")
    (alone,) = run_ranks(scores_one_by_one, 1, folder, kind, encoding, tmp_path)
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)


def scores_one_by_one(
    address: RankAddress, folder: Path, kind: str, encoding: EncodingConfig, scratch: Path
) -> list[float]:
    with opened(folder, ParallelConfig(), encoding, address, scratch, head="reward") as model:
        return [scores_of(model, ParallelConfig(), [one], 8)[0] for one in judged(kind)]


def test_the_round_trip_is_exact_and_carries_the_calibration(exported, tmp_path: Path) -> None:
    kind, folder, hf, _ = exported
    assert model_of(hf) == MODELS[kind]
    from_hf(hf, tmp_path / "back")
    assert verify(tmp_path / "back", hf).is_equal and verify(folder, hf).is_equal
    assert {read_calibration(one) for one in (folder, hf, tmp_path / "back")} == {CALIBRATION}


def test_a_calibrated_checkpoint_is_sealed_again_and_can_be_calibrated_anew(exported, tmp_path: Path) -> None:
    _, _, hf, _ = exported
    folder = tmp_path / "copy"
    from_hf(hf, folder)
    for mu in (0.0, 1.0):
        write_calibration(folder, Calibration(mu, 1.0, 0.5, 2, ""))
        check_whole(folder)
        assert read_calibration(folder).mu == mu
    (folder / "reward_model.json").write_text('{"mu": 7}')
    with pytest.raises(CheckpointError, match="reward_model"):
        check_whole(folder)
    with pytest.raises(CheckpointError, match="is no calibration"):
        read_calibration(folder)


def starts(address: RankAddress, source: Path, model: ModelConfig, scratch: Path) -> dict[str, bool]:
    """Which parameters are those of the drawn model still, after loading ``source``."""
    with megatron(ParallelConfig(pp=address.world_size), address) as mesh:
        chunks = build_chunks(model, ParallelConfig(pp=address.world_size), Numerics(), mesh)
        weights.draw_weights(chunks, 9, mesh.tp)
        before = {name: param.detach().clone() for name, param in weights.global_parameters(chunks)}
        load_weights(source, model, chunks, scratch)
        now = dict(weights.global_parameters(chunks))
        return {name: torch.equal(before[name], now[name]) for name in before if now[name].dim() > 1}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fields", [{"num_mtp_layers": 1}, {"tie_embeddings": True}], ids=str)
def test_a_reward_model_starts_from_a_language_model_and_keeps_its_own_head(
    fields: dict, ranks: int, tmp_path: Path
) -> None:
    source = MODELS["text"].model_copy(update={"text": tiny_model(**fields).text})
    run_ranks(save_body, 1, source, tmp_path / "body")
    kept = {}
    for found in run_ranks(starts, ranks, tmp_path / "body", MODELS["text"], tmp_path / "scratch"):
        kept |= found
    assert [name for name, is_kept in kept.items() if is_kept] == ["text.output_layer.weight"]


def save_body(address: RankAddress, model: ModelConfig, folder: Path) -> None:
    with megatron(ParallelConfig(), address) as mesh:
        chunks = build_chunks(model, ParallelConfig(), Numerics(), mesh)
        weights.draw_weights(chunks, 5, mesh.tp)
        checkpoint.save(folder, model, chunks)


def test_another_body_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    other = MODELS["text"].model_copy(update={"text": tiny_model(num_layers=2).text})
    run_ranks(save_body, 1, other, tmp_path / "body")
    with pytest.raises(Exception, match=r"model\.text\.num_layers: found 2, wanted 4"):
        run_ranks(starts, 1, tmp_path / "body", MODELS["text"], tmp_path / "scratch")


def test_a_reward_model_writes_no_answers_and_a_language_model_gives_no_rewards(exported, tmp_path: Path) -> None:
    _, folder, _, _ = exported
    encoding, alone = EncodingConfig(tokenizer=folder.parent / "tokenizer"), RankAddress(0, 1, 0, "")
    with (
        pytest.raises(ConfigError, match="reward-model evaluate"),
        opened(folder, ParallelConfig(), encoding, alone, tmp_path),
    ):
        pass


def test_a_reward_model_with_prediction_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_mtp_layers is 1, but a reward model predicts no tokens"):
        ModelConfig.model_validate(tiny_model(num_mtp_layers=1, head="reward").model_dump())
