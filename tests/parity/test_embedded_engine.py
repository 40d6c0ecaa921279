"""The embedded engine against transformers: the same tokens, the same log-probabilities."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from mimo_megatron.convert.hf_config import hf_config
from mimo_megatron.types import EncodedSample
from tests.pixels import normalized
from tests.rl_fixtures import MODEL, ask, engine_with, finished, prompts, random_weights, with_response

WEIGHTS = random_weights(scale=0.15)


@pytest.fixture(scope="module")
def hf_model() -> Qwen2_5_VLForConditionalGeneration:
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.for_model(**hf_config(MODEL, torch.float32))).float().eval()
    ours = {
        name.replace("visual.", "model.visual.").replace("model.layers", "model.language_model.layers")
        .replace("model.embed", "model.language_model.embed").replace("model.norm", "model.language_model.norm"): tensor
        for name, tensor in WEIGHTS.items()
    }  # fmt: skip
    model.load_state_dict(ours, strict=True)
    return model


def hf_inputs(sample: EncodedSample) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(sample.token_ids_T)[None]
    kinds = (ids == MODEL.tokens.image_pad).int() + 2 * (ids == MODEL.tokens.video_pad).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [one for one in sample.media if one.kind == kind]
        if media:
            inputs[pixels] = torch.cat([normalized(torch.from_numpy(one.patches_PC)) for one in media])
            inputs[grid] = torch.tensor([one.grid for one in media])
    if any(one.kind == "video" for one in sample.media):
        seconds = [one.seconds_per_grid for one in sample.media if one.kind == "video"]
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def hf_logprobs(
    model: Qwen2_5_VLForConditionalGeneration, sample: EncodedSample, banned: tuple[int, ...]
) -> torch.Tensor:
    """[T - 1]"""
    with torch.no_grad():
        logits = model(**hf_inputs(sample), use_cache=False).logits[0, :-1].double()
    logits[:, list(banned)] = -torch.inf
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(sample.token_ids_T)[1:, None]).squeeze(-1)


def test_log_probabilities_of_prompts_are_transformers(hf_model):
    samples = prompts()
    for ours, sample in zip(engine_with(WEIGHTS).logprobs(samples), samples, strict=True):
        np.testing.assert_allclose(ours, hf_logprobs(hf_model, sample, ()).numpy(), atol=2e-4)


def test_sampled_tokens_have_the_log_probability_that_transformers_gives_them(hf_model):
    engine = engine_with(WEIGHTS, max_sequences=5)  # groups wait, and rows are moved and used again
    for number, prompt in enumerate(prompts()):
        engine.submit(ask(str(number), prompt, 3, seed=number))
    rollouts = finished(engine)
    assert len(rollouts) == 12
    for (name, _), rollout in rollouts.items():
        prompt = prompts()[int(name)]
        expected = hf_logprobs(hf_model, with_response(prompt, rollout), MODEL.tokens.never_sampled)
        np.testing.assert_allclose(rollout.logprobs_T, expected[prompt.num_tokens - 1 :].numpy(), atol=2e-4)


def test_greedy_tokens_are_those_transformers_finds_likeliest(hf_model):
    engine = engine_with(WEIGHTS)
    for number, prompt in enumerate(prompts()):
        engine.submit(ask(str(number), prompt, temperature=0.0))
    for (name, _), rollout in finished(engine).items():
        sample = with_response(prompts()[int(name)], rollout)
        with torch.no_grad():
            logits = hf_model(**hf_inputs(sample), use_cache=False).logits[0, prompts()[int(name)].num_tokens - 1 : -1]
        logits[:, list(MODEL.tokens.never_sampled)] = -torch.inf
        assert logits.argmax(-1).tolist() == rollout.token_ids_T.tolist()
