"""``score`` and ``generate`` on a Hugging Face folder and on a checkpoint, in several layouts, against transformers."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from mimo_megatron.config.run import EncodingConfig, ParallelConfig
from mimo_megatron.convert.hf_config import write_hf_companions
from mimo_megatron.convert.verbs import from_hf
from mimo_megatron.data.encode import encode_sample
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import CheckpointError, ConfigError, DataError
from mimo_megatron.evaluation.answer import AnswerRequest, answer, read_prompts
from mimo_megatron.evaluation.generate import Sampling
from mimo_megatron.evaluation.output import write_lines
from mimo_megatron.evaluation.score import ScoreRequest, score
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.train.start import read_encoding
from mimo_megatron.types import EncodedSample
from tests.data_fixtures import picture, write_tokenizer
from tests.harness import run_ranks
from tests.pixels import normalized
from tests.samples import tiny_model

MODEL = tiny_model()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    """A random model that transformers saved itself, with a tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = write_tokenizer(folder / "tokenizer")
    described = tmp_path_factory.mktemp("described")
    write_hf_companions(described, MODEL, torch.float32, EncodingConfig(tokenizer=tokenizer, max_pixels=50_000))
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(described)).float()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3.0 if param.dim() > 1 else 1.0)  # answers that depend on what was asked
    model.save_pretrained(folder / "model")
    for file in described.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    return folder / "model"


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "a.png").write_bytes(picture(60, 90, seed=1))
    (folder / "b.png").write_bytes(picture(120, 40, seed=2))

    def chat(*content: Any, reply: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": reply}]

    text = {"type": "text", "text": "What is in the image?"}
    rows = [
        {"id": "picture", "messages": chat({"type": "image", "image": "a.png"}, text, reply="A red square.")},
        {"id": "words", "messages": chat({"type": "text", "text": "hello"}, reply="hello hello")},
        {
            "id": "two",
            "messages": chat(
                {"type": "image", "image": "b.png"}, {"type": "image", "image": "a.png"}, text, reply="above a blue one"
            ),
        },
    ]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encoded(hf_dir: Path, samples: Path, *, open_turn: bool = False) -> list[EncodedSample]:
    encoding = read_encoding(hf_dir)
    tokenizer = load_tokenizer(encoding.tokenizer, MODEL.tokens, MODEL.text.vocab_size)
    raws = list(read_jsonl(samples))
    if open_turn:
        raws = [type(raw)(raw.id, raw.source, raw.messages[:1], raw.media, raw.meta) for raw in raws]
    return [encode_sample(raw, tokenizer, MODEL, encoding, add_generation_prompt=open_turn) for raw in raws]


def hf_inputs(sample: EncodedSample) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(sample.token_ids_T)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sample.media:
        inputs["pixel_values"] = torch.cat([normalized(torch.from_numpy(one.patches_PC)) for one in sample.media])
        inputs["image_grid_thw"] = torch.tensor([one.grid for one in sample.media])
        inputs["mm_token_type_ids"] = (ids == MODEL.tokens.image_pad).int()
    return inputs


@pytest.fixture(scope="module")
def hf_model(hf_dir: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(hf_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hf_logprobs(hf_model: Qwen2_5_VLForConditionalGeneration, hf_dir: Path, samples: Path) -> list[np.ndarray]:
    """Of every token but the first, sample by sample, by transformers."""

    def logprobs(sample: EncodedSample) -> np.ndarray:
        with torch.no_grad():
            logits = hf_model(**hf_inputs(sample), use_cache=False).logits[0, :-1].log_softmax(-1)
        return logits.gather(-1, torch.from_numpy(sample.token_ids_T)[1:, None]).squeeze(-1).numpy()

    return [logprobs(sample) for sample in encoded(hf_dir, samples)]


@pytest.fixture(scope="module")
def hf_answers(hf_model: Qwen2_5_VLForConditionalGeneration, hf_dir: Path, samples: Path) -> list[str]:
    tokenizer = load_tokenizer(read_encoding(hf_dir).tokenizer, MODEL.tokens, MODEL.text.vocab_size)

    def answer_of(sample: EncodedSample) -> str:
        said = hf_model.generate(**hf_inputs(sample), max_new_tokens=12, do_sample=False)[0]
        said = said[sample.num_tokens :].tolist()
        ends = [at for at, token in enumerate(said) if token in (MODEL.tokens.turn_end, MODEL.tokens.pad)]
        return tokenizer.decode(said[: ends[0]] if ends else said)

    return [answer_of(sample) for sample in encoded(hf_dir, samples, open_turn=True)]


@pytest.fixture(scope="module")
def checkpoint(hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint of ours; to be read only."""
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    from_hf(hf_dir, folder)
    return folder


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, dict(tp=2)),
    "tp2-sequence-parallel": (2, dict(tp=2, sequence_parallel=True)),
    "pp2": (2, dict(pp=2)),
    "cp2": (2, dict(cp=2)),
    "tp2-balanced-vision": (2, dict(tp=2, vision_placement="balanced")),
    "cp2-balanced-vision": (2, dict(cp=2, vision_placement="balanced")),
    "dp2": (2, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_score_gives_transformers_log_probability_of_every_token(
    name, hf_dir, hf_logprobs, checkpoint, samples, tmp_path
):
    world_size, layout = LAYOUTS[name]
    out = tmp_path / "scores.jsonl"
    request = ScoreRequest(
        checkpoint, samples, out, ParallelConfig(**layout), read_encoding(checkpoint), tmp_path, pack_tokens=64
    )
    run_ranks(score, world_size, request)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = encoded(hf_dir, samples)
    assert [row["id"] for row in rows] == [sample.id for sample in wanted] == ["picture", "words", "two"]
    for row, sample, logprobs in zip(rows, wanted, hf_logprobs, strict=True):
        assert row["token_ids"] == sample.token_ids_T.tolist()
        assert len(row["logprobs"]) == sample.num_tokens - 1
        np.testing.assert_allclose(row["logprobs"], logprobs, rtol=2e-4, atol=2e-5)


def test_score_reads_a_hugging_face_folder_directly(hf_dir, hf_logprobs, samples, tmp_path):
    out = tmp_path / "scores.jsonl"
    run_ranks(score, 1, ScoreRequest(hf_dir, samples, out, ParallelConfig(), read_encoding(hf_dir), tmp_path))
    first = json.loads(out.read_text().splitlines()[0])
    np.testing.assert_allclose(first["logprobs"], hf_logprobs[0], rtol=2e-4, atol=2e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def prompts(samples: Path) -> tuple:
    return tuple(type(raw)(raw.id, raw.source, raw.messages[:1], raw.media, raw.meta) for raw in read_jsonl(samples))


@pytest.mark.parametrize("name", ["one", "tp2", "pp2", "tp2-balanced-vision"])
def test_greedy_answers_are_those_of_transformers(name, hf_dir, hf_answers, samples, tmp_path):
    world_size, layout = LAYOUTS[name]
    out = tmp_path / "answers.jsonl"
    encoding = read_encoding(hf_dir)
    request = AnswerRequest(hf_dir, prompts(samples), out, ParallelConfig(**layout), encoding, Sampling(12), tmp_path)
    run_ranks(answer, world_size, request)
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == hf_answers


def refusal(address: Any, request: AnswerRequest) -> str:
    with pytest.raises(ConfigError) as caught:
        answer(address, request)
    return str(caught.value)


def test_generation_refuses_to_share_out_one_token(hf_dir, samples, tmp_path):
    layout = ParallelConfig(cp=2)
    request = AnswerRequest(hf_dir, prompts(samples), None, layout, read_encoding(hf_dir), Sampling(2), tmp_path)
    assert "parallel.cp is 2" in run_ranks(refusal, 2, request)[0]


def test_sampled_answers_repeat_with_their_seed_and_differ_with_another(hf_dir, samples, tmp_path):
    def say(seed: int) -> str:
        out = tmp_path / f"answers-{seed}.jsonl"
        sampling = Sampling(12, temperature=1.0, top_p=0.9, seed=seed)
        run_ranks(
            answer,
            1,
            AnswerRequest(hf_dir, prompts(samples), out, ParallelConfig(), read_encoding(hf_dir), sampling, tmp_path),
        )
        return out.read_text()

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_a_prompt_from_the_command_line_shows_its_images(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (30, 30)).save(image, "PNG")
    (tmp_path / "x.png").write_bytes(image.getvalue())
    (raw,) = read_prompts("What?", [tmp_path / "x.png"], None)
    assert [part["type"] for part in raw.messages[0]["content"]] == ["image", "text"]
    assert raw.media[0].path == str(tmp_path / "x.png")
    with pytest.raises(ConfigError, match="--prompt"):
        read_prompts(None, [], None)


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_read(hf_dir, samples, tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = Path("/nonexistent/model")
    for out in (tmp_path / "no folder" / "x.jsonl", tmp_path / "file" / "x.jsonl", tmp_path):
        asked = AnswerRequest(
            nowhere, prompts(samples), out, ParallelConfig(), read_encoding(hf_dir), Sampling(2), tmp_path
        )
        assert f"--out {out} cannot be written" in refusal(RankAddress(0, 1, 0, ""), asked)
        scored = ScoreRequest(nowhere, samples, out, ParallelConfig(), read_encoding(hf_dir), tmp_path)
        with pytest.raises(ConfigError, match=f"--out {out} cannot be written"):
            score(RankAddress(0, 1, 0, ""), scored)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_lines_that_fail_on_their_way_leave_the_older_file(tmp_path):
    out = tmp_path / "x.jsonl"
    out.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_lines(out, (str(1 // number) for number in (1, 0)))
    assert out.read_text() == "old"
    write_lines(out, ["a", "b"])
    assert out.read_text() == "a\nb\n" and [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_prompts_that_are_not_there_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read \(No such file"):
        read_prompts(None, [], tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    "field", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
)
def test_a_sampling_that_chooses_nothing_is_refused_by_its_key(field):
    with pytest.raises(ConfigError, match=f"{next(iter(field))} is"):
        Sampling(**field)


def test_a_checkpoint_without_a_tokenizer_asks_for_one(hf_dir, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    from_hf(hf_dir, checkpoint)
    for file in (checkpoint / "processor").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="--tokenizer"):
        read_encoding(checkpoint)
