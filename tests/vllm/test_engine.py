"""The engine ``vllm`` against our own scoring, on the CPU, with a tiny random model: `make test-vllm` runs these.

One engine serves most tests; each brings the weights it needs, so order does not matter.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.rl import VllmConfig
from mimo_megatron.config.run import EncodingConfig, ParallelConfig, VideoConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import write_hf_companions
from mimo_megatron.data.encode import encode_sample
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import EngineError, SyncError
from mimo_megatron.evaluation.score import ScoreRequest, score
from mimo_megatron.rl.engine.protocol import GenerationRequest
from mimo_megatron.rl.engine.vllm import VllmEngine
from mimo_megatron.rl.engine.vllm_start import engine_tensors, start_process
from mimo_megatron.rl.sync.buckets import Bucket, Manifest, pack
from mimo_megatron.rl.sync.shared_memory import LocalBuckets
from mimo_megatron.train.start import read_encoding
from mimo_megatron.types import EncodedSample, Rollout
from tests.data_fixtures import clip, picture, write_tokenizer
from tests.harness import run_ranks
from tests.samples import tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MODEL = tiny_model()
assert MODEL.vision is not None and MODEL.vision.video_advance == "frame"
TOKENS = MODEL.tokens
BANNED = {TOKENS.image_pad, TOKENS.video_pad, TOKENS.vision_start, TOKENS.vision_end, TOKENS.turn_start}
MOST_GAP = 2e-5
"""Between two fp32 implementations; measured: 2e-6 on words, pictures and a video."""
Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def encoding(tmp_path_factory) -> EncodingConfig:
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")
    # At 1.2 frames a second step 3 stands at 5 s: position 10 in float32, as we count, and 9 in float64.
    return EncodingConfig(tokenizer=tokenizer, max_pixels=50_000, video=VideoConfig(fps=1.2))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Words, a picture, two pictures and a video, as chat."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.png").write_bytes(picture(60, 90, seed=1))
    (folder / "b.png").write_bytes(picture(120, 40, seed=2))
    (folder / "flat.png").write_bytes(picture(28, 2900, seed=4))
    (folder / "c.avi").write_bytes(clip(64))  # it lasts longer than it is wide
    text = {"type": "text", "text": "What is in the image?"}
    parts: dict[str, list[dict[str, Any]]] = {
        "words": [{"type": "text", "text": "hello"}],
        "picture": [{"type": "image", "image": "a.png"}, text],
        "two": [{"type": "image", "image": "b.png"}, {"type": "image", "image": "a.png"}, text],
        "flat": [{"type": "image", "image": "flat.png"}, text],
        "video": [{"type": "video", "video": "c.avi"}, text],
    }
    rows = [
        {"id": name, "messages": [{"role": "user", "content": one}, {"role": "assistant", "content": "A red square."}]}
        for name, one in parts.items()
    ]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def samples(corpus: Path, encoding: EncodingConfig) -> dict[str, EncodedSample]:
    return {one.id: one for one in _encoded(corpus, encoding, is_open=False)}


@pytest.fixture(scope="module")
def prompts(corpus: Path, encoding: EncodingConfig) -> dict[str, EncodedSample]:
    return {one.id: one for one in _encoded(corpus, encoding, is_open=True)}


@pytest.fixture(scope="module")
def engine(encoding: EncodingConfig) -> Iterator[VllmEngine]:
    """Weights come to it through shared memory; over TCP they come as bytes, which a test of its own shows."""
    memory = LocalBuckets(16 << 20)
    engine = _started(encoding, memory)
    yield engine
    engine.close()
    memory.close()


def _started(encoding: EncodingConfig, memory: LocalBuckets | None = None, model: ModelConfig = MODEL) -> VllmEngine:
    config = VllmConfig(python=Path(os.environ["VLLM_PYTHON"]), max_model_len=1024)
    return VllmEngine.start(model, encoding, config, max_sequences=16, memory=memory)


def _encoded(corpus: Path, encoding: EncodingConfig, *, is_open: bool) -> list[EncodedSample]:
    tokenizer = load_tokenizer(encoding.tokenizer, MODEL.tokens, MODEL.text.vocab_size)
    raws = list(read_jsonl(corpus))
    if is_open:
        raws = [replace(raw, messages=raw.messages[:1]) for raw in raws]
    return [encode_sample(raw, tokenizer, MODEL, encoding, add_generation_prompt=is_open) for raw in raws]


def random_weights(seed: int) -> dict[str, Tensor]:
    """Under their Hugging Face names; large enough that answers depend on what was asked."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for rule in rules_for(MODEL):
        for spec in rule.hf:
            is_norm = "norm" in spec.name and spec.name.endswith("weight")
            noise = torch.empty(spec.shape).normal_(0.0, 0.06, generator=draw)
            found[spec.name] = noise + 1 if is_norm else noise
    return found


def own_logprobs(
    weights: Weights, corpus: Path, encoding: EncodingConfig, tmp_path: Path, model: ModelConfig = MODEL
) -> dict[str, np.ndarray]:
    """log p of every token of the corpus after the first, by our own model."""
    folder = tmp_path / "hf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_hf_companions(folder, model, torch.float32, encoding)
    save_file(dict(weights), folder / "model.safetensors")
    out = tmp_path / "scores.jsonl"
    run_ranks(score, 1, ScoreRequest(folder, corpus, out, ParallelConfig(), read_encoding(folder), tmp_path))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {row["id"]: np.array(row["logprobs"], np.float32) for row in rows}


def buckets(version: int, weights: Weights) -> tuple[Manifest, list[Bucket]]:
    """In three buckets, cut where layers are not."""
    order = engine_tensors(MODEL, torch.float32)
    third = len(order) // 3 + 1
    parts = [order[start : start + third] for start in range(0, len(order), third)]
    packed = [pack(version, number, [(e.name, weights[e.name]) for e in part]) for number, part in enumerate(parts)]
    return Manifest(version, order), packed


def next_version(engine: VllmEngine) -> int:
    version: int = getattr(engine, "test_version", 0) + 1
    engine.test_version = version  # type: ignore[attr-defined]
    return version


def update(engine: VllmEngine, weights: Weights, *, is_open: bool = True) -> int:
    engine.abort(list(engine._missing))
    version = next_version(engine)
    manifest, packed = buckets(version, weights)
    engine.begin_update(manifest)
    for one in packed:
        engine.receive(one)
    engine.finish_update()
    if is_open:
        engine.open_gate()
    return version


def collect(engine: VllmEngine, seconds: float = 120.0) -> list[Rollout]:
    found, deadline = [], time.monotonic() + seconds
    while engine.num_running and time.monotonic() < deadline:
        found += engine.poll(1.0)
    return sorted(found, key=lambda one: (one.request_id, one.index))


def gaps(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    distance = np.abs(found - wanted)
    return float(distance.mean()), float(distance.max())


def test_log_probabilities_equal_our_own_for_words_pictures_and_a_video(engine, samples, corpus, encoding, tmp_path):
    weights = random_weights(1)
    update(engine, weights, is_open=False)
    wanted = own_logprobs(weights, corpus, encoding, tmp_path)
    found = dict(zip(samples, engine.logprobs(list(samples.values())), strict=True))
    for name in samples:
        mean, most = gaps(found[name], wanted[name])
        print(f"{name}: {samples[name].num_tokens} tokens, |gap| mean {mean:.1e}, max {most:.1e}")
        assert most < MOST_GAP, name


def test_tensors_that_vllm_has_not_rearranged_are_read_back(engine):
    update(engine, random_weights(1))
    print(engine.last_update)
    assert engine.last_update["num_tensors"] == len(engine_tensors(MODEL, torch.float32))
    assert engine.last_update["num_read_back"] > engine.last_update["num_tensors"] // 3


def test_responses_have_versions_and_log_probabilities_and_repeat_by_seed(engine, prompts):
    version = update(engine, random_weights(2))
    for round_ in ("a", "b"):
        for name in ("words", "picture"):
            engine.submit(GenerationRequest(f"{round_}-{name}", prompts[name], 4, 12, seed=5))
    rollouts = collect(engine)
    assert [(one.request_id, one.index) for one in rollouts] == [
        (f"{round_}-{name}", index) for round_ in "ab" for name in ("picture", "words") for index in range(4)
    ]
    for one in rollouts:
        assert set(one.versions_T) == {version} and len(one.versions_T) == len(one.token_ids_T) == len(one.logprobs_T)
        assert (one.finish_reason == "stop") == (one.token_ids_T[-1] in TOKENS.ends)
        assert one.finish_reason == "stop" or len(one.token_ids_T) == 12
    first, again = rollouts[:8], rollouts[8:]
    assert [one.token_ids_T.tolist() for one in first] == [one.token_ids_T.tolist() for one in again]
    assert len({tuple(one.token_ids_T) for one in first}) == 8


def test_log_probabilities_of_a_response_are_those_of_its_prefill_up_to_the_ban(engine, prompts):
    """The ban takes 5 of 512 tokens out, so what is left has a little more than its share."""
    update(engine, random_weights(2))
    prompt = prompts["picture"]
    engine.submit(GenerationRequest("g", prompt, 4, 12))
    rollouts = collect(engine)
    for one in rollouts:
        ids = np.concatenate([prompt.token_ids_T, one.token_ids_T])
        (whole,) = engine.logprobs([replace(prompt, token_ids_T=ids, loss_mask_T=np.ones(len(ids), np.bool_))])
        excess = one.logprobs_T - whole[prompt.num_tokens - 1 :]
        assert (excess > -MOST_GAP).all() and 1e-4 < excess.mean() < 0.1


def test_banned_tokens_are_never_sampled_however_much_the_model_wants_them(engine, prompts):
    weights = random_weights(3)
    head = torch.zeros_like(weights["lm_head.weight"])
    direction = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    for token, sign in zip(sorted(BANNED), (30, -30, 30, -30, 30), strict=True):
        head[token] = sign * direction  # one of them has by far the largest logit wherever the hidden state points
    update(engine, {**weights, "lm_head.weight": head})
    engine.submit(GenerationRequest("sampled", prompts["picture"], 8, 16))
    engine.submit(GenerationRequest("greedy", prompts["words"], 1, 16, temperature=0.0))
    for one in collect(engine):
        assert not BANNED & set(one.token_ids_T.tolist())
        np.testing.assert_allclose(one.logprobs_T, -np.log(MODEL.text.vocab_size - len(BANNED)), atol=1e-5)


def test_after_an_update_words_and_the_same_picture_follow_the_new_weights(
    engine, samples, prompts, corpus, encoding, tmp_path
):
    old = random_weights(1)
    new = {name: one * 1.5 if name.startswith(("model.visual", "visual")) else one for name, one in old.items()}
    assert sum(not torch.equal(new[name], old[name]) for name in old) > 10
    update(engine, old)
    engine.submit(GenerationRequest("warm", prompts["picture"], 4, 4))  # its encoder output is cached now
    collect(engine)
    (before,) = engine.logprobs([samples["picture"]])
    update(engine, new, is_open=False)
    wanted = own_logprobs(new, corpus, encoding, tmp_path)
    for name in ("words", "picture"):
        (found,) = engine.logprobs([samples[name]])
        assert gaps(found, wanted[name])[1] < MOST_GAP
    (after,) = engine.logprobs([samples["picture"]])
    assert gaps(before, after)[1] > 0.01
    engine.open_gate()
    engine.submit(GenerationRequest("same", prompts["picture"], 2, 4))
    assert len(collect(engine)) == 2


@pytest.mark.parametrize("fault", ["flipped bit", "dropped bucket", "missing name"])
def test_a_broken_update_leaves_the_gate_closed_and_a_whole_one_opens_it(engine, prompts, fault):
    update(engine, random_weights(1))
    version = next_version(engine)
    manifest, packed = buckets(version, random_weights(2))
    if fault == "missing name":
        manifest = Manifest(version, manifest.tensors[:-1])
    elif fault == "flipped bit":
        packed[1].data[100] ^= 4
    else:
        del packed[1]
    with pytest.raises(SyncError):
        engine.begin_update(manifest)
        for one in packed:
            engine.receive(one)
        engine.finish_update()
    assert engine.policy_version is None
    with pytest.raises(EngineError, match="gate is closed"):
        engine.submit(GenerationRequest("late", prompts["words"], 1, 4))
    with pytest.raises(EngineError, match="no complete weights"):
        engine.open_gate()
    assert engine.policy_version is None
    again = update(engine, random_weights(2))
    assert engine.policy_version == again
    engine.submit(GenerationRequest("now", prompts["words"], 1, 4))
    assert [set(one.versions_T) for one in collect(engine)] == [{again}]


def test_abort_leaves_nothing_running_and_nothing_to_come(engine, prompts):
    update(engine, random_weights(1))
    for name in ("gone", "kept"):
        engine.submit(GenerationRequest(name, prompts["picture"], 6, 200))
    with pytest.raises(SyncError, match="being sampled"):
        engine.begin_update(buckets(99, random_weights(1))[0])
    engine.abort(["gone"])
    assert engine.num_running <= 6
    engine.abort(["kept", "never there"])
    assert engine.num_running == 0
    status = engine.status()
    assert status["num_running"] == status["num_unfinished"] == 0
    assert engine.poll(0.5) == []


def test_prompts_that_a_pass_has_no_room_for_are_read_in_parts_and_answered(engine, prompts):
    update(engine, random_weights(1))
    words = prompts["words"]
    for number in range(16):
        ids_T = np.concatenate([np.random.default_rng(number).integers(20, 500, 900), words.token_ids_T])
        engine.submit(GenerationRequest(f"long-{number}", replace(words, token_ids_T=ids_T), 1, 4))
    assert len(collect(engine)) == 16


def test_what_does_not_fit_or_would_be_another_policy_is_refused(engine, prompts):
    update(engine, random_weights(1))
    with pytest.raises(EngineError, match="do not fit"):
        engine.submit(GenerationRequest("long", prompts["words"], 1, 2000))
    with pytest.raises(EngineError, match="another policy"):
        engine.submit(GenerationRequest("warm", prompts["words"], 1, 4, temperature=0.7))
    assert engine.status()["num_running"] == 0


def test_an_engine_counts_after_videos_by_either_rule_and_its_kill_is_an_error_within_seconds(
    encoding, samples, prompts, corpus, tmp_path
):
    assert MODEL.vision is not None
    timed = MODEL.model_copy(update={"vision": MODEL.vision.model_copy(update={"video_advance": "time"})})
    engine = _started(encoding, model=timed)
    try:
        update(engine, weights := random_weights(1))
        (found,) = engine.logprobs([samples["video"]])
        by_rule = [own_logprobs(weights, corpus, encoding, tmp_path, model)["video"] for model in (timed, MODEL)]
        assert gaps(found, by_rule[0])[1] < MOST_GAP < 1e-3 < gaps(found, by_rule[1])[1]
        engine.submit(GenerationRequest("g", prompts["words"], 4, 400))
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(EngineError, match="ended with code -9"):
            while True:
                engine.poll(1.0)
        assert time.monotonic() - start < 5
        assert engine.policy_version is None
    finally:
        engine.close()


def test_over_tcp_only_the_token_lets_in_and_a_new_connection_finds_the_gate_closed_and_begins_anew(
    encoding, prompts, tmp_path
):
    config = VllmConfig(python=Path(os.environ["VLLM_PYTHON"]), max_model_len=1024)
    process = start_process(MODEL, encoding, config, dtype=torch.float32, max_sequences=16, listen="tcp:127.0.0.1:0")
    try:
        process.wait_until_ready(300)
        assert process.address_file.stat().st_mode & 0o077 == 0
        address = json.loads(process.address_file.read_text())
        wrong = tmp_path / "wrong.json"
        wrong.write_text(json.dumps({**address, "token": "0" * len(address["token"])}))
        with pytest.raises(EngineError, match="does not take the token"):
            VllmEngine.connect(MODEL, wrong)
        first = VllmEngine.connect(MODEL, process.address_file)
        update(first, random_weights(1))
        first.submit(GenerationRequest("g", prompts["words"], 2, 400))
        first.close()
        second = VllmEngine.connect(MODEL, process.address_file)
        status = second.status()
        assert status["num_unfinished"] == 0 and status["version"] is None
        update(second, random_weights(2))  # of the same version: another trainer may have begun anew, or gone back
        assert second.policy_version is not None
        second.close()
    finally:
        process.popen.kill()
        process.end()
