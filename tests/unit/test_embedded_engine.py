"""The embedded engine's gate, its batching and its sampling."""

import numpy as np
import pytest
import torch

from mimo_megatron.errors import EngineError, SyncError
from mimo_megatron.rl.engine.embedded import _choose
from mimo_megatron.rl.sync.buckets import Manifest, entry_of, pack
from tests.rl_fixtures import MODEL, ask, empty_engine, engine_with, finished, prompts, random_weights, update

WEIGHTS = random_weights()
TEXT, PICTURE, *_ = prompts()


def tokens_of(found) -> dict:
    return {key: rollout.token_ids_T.tolist() for key, rollout in found.items()}


def test_nothing_is_sampled_before_weights_have_come():
    with pytest.raises(EngineError, match="the gate is closed"):
        empty_engine().submit(ask("early", TEXT))


def test_a_failed_update_leaves_the_gate_closed_until_one_ends_well():
    engine = engine_with(WEIGHTS)
    engine.begin_update(Manifest(2, tuple(entry_of(name, tensor) for name, tensor in WEIGHTS.items())))
    bucket = pack(2, 0, list(WEIGHTS.items()))
    bucket.data[1000] ^= 1
    with pytest.raises(SyncError):
        engine.receive(bucket)
    with pytest.raises(SyncError):
        engine.finish_update()
    with pytest.raises(EngineError, match="the gate is closed"):
        engine.submit(ask("after", TEXT))
    update(engine, WEIGHTS, version=2)
    engine.submit(ask("after", TEXT))
    assert finished(engine)


def test_weights_do_not_change_under_a_running_response():
    engine = engine_with(WEIGHTS)
    engine.submit(ask("runs", TEXT))
    with pytest.raises(EngineError, match="1 responses run"):
        update(engine, WEIGHTS, version=2)


def test_every_token_says_the_version_that_sampled_it():
    engine = engine_with(WEIGHTS)
    engine.submit(ask("old", TEXT, 2))
    assert all((one.versions_T == 1).all() for one in finished(engine).values())
    update(engine, random_weights(seed=1), version=2)
    engine.submit(ask("new", TEXT, 2))
    new = finished(engine).values()
    assert all(len(one.versions_T) == len(one.token_ids_T) and (one.versions_T == 2).all() for one in new)


def test_an_aborted_request_returns_nothing_and_the_others_are_not_disturbed():
    alone = engine_with(WEIGHTS)
    alone.submit(ask("kept", PICTURE, 2, seed=5))
    engine = engine_with(WEIGHTS, max_sequences=4)
    for name in ("running", "kept", "waiting"):
        engine.submit(ask(name, PICTURE, 2, seed=5))
    engine.advance()
    engine.abort(["running", "waiting"])
    assert engine.num_running == 2
    assert tokens_of(finished(engine)) == tokens_of(finished(alone))


def test_a_response_does_not_depend_on_what_is_sampled_beside_it():
    alone = {}
    for number, prompt in enumerate(prompts()):
        engine = engine_with(WEIGHTS)
        engine.submit(ask(str(number), prompt, 2, seed=number))
        alone |= tokens_of(finished(engine))
    together = engine_with(WEIGHTS, max_sequences=3)
    for number, prompt in enumerate(prompts()):
        together.submit(ask(str(number), prompt, 2, seed=number))
    assert tokens_of(finished(together)) == alone


def test_tokens_that_only_a_prompt_may_hold_are_never_sampled_however_likely():
    weights = dict(WEIGHTS)
    weights["lm_head.weight"] = WEIGHTS["lm_head.weight"].clone()
    banned = list(MODEL.tokens.never_sampled)
    weights["lm_head.weight"][banned] = 100 * weights["lm_head.weight"][banned].abs()
    engine = engine_with(weights)
    engine.submit(ask("loved", TEXT, 16, most=20))
    sampled = {token for rollout in finished(engine).values() for token in rollout.token_ids_T.tolist()}
    assert sampled and not sampled & set(banned)


def test_a_picture_is_encoded_once_for_a_policy_version():
    engine = engine_with(WEIGHTS)
    for name in ("a", "b"):
        engine.submit(ask(name, PICTURE, 4))
        finished(engine)
    assert engine.num_encoded == 1
    update(engine, random_weights(seed=2), version=2)
    engine.submit(ask("c", PICTURE, 4))
    finished(engine)
    assert engine.num_encoded == 2


def test_prompts_that_share_a_picture_read_it_each_as_if_alone():
    engine = engine_with(WEIGHTS)
    with_pictures = [one for one in prompts() if one.media]
    samples = [*with_pictures, *with_pictures[::-1]]
    for found, sample in zip(engine.logprobs(samples), samples, strict=True):
        np.testing.assert_allclose(found, engine.logprobs([sample])[0], atol=1e-5)


def test_new_vision_weights_change_what_is_read_from_a_picture_seen_before():
    engine = engine_with(WEIGHTS)
    before = engine.logprobs([PICTURE, TEXT])
    changed = {name: tensor * (1.5 if name.startswith("visual.") else 1.0) for name, tensor in WEIGHTS.items()}
    update(engine, changed, version=2)
    after = engine.logprobs([PICTURE, TEXT])
    assert np.abs(after[0] - before[0]).max() > 1e-3
    assert np.array_equal(after[1], before[1])
    for ours, fresh in zip(after, engine_with(changed).logprobs([PICTURE, TEXT]), strict=True):
        assert np.array_equal(ours, fresh)


def test_a_prompt_that_does_not_fit_is_refused_and_never_cut():
    engine = engine_with(WEIGHTS, max_tokens=20, max_sequences=4)
    with pytest.raises(EngineError, match="1 responses of up to 24 tokens"):
        engine.submit(ask("long", TEXT, most=12))
    with pytest.raises(EngineError, match="5 responses"):
        engine.submit(ask("many", TEXT, 5, most=2))


def test_a_temperature_that_is_neither_sampling_nor_greedy_is_refused():
    with pytest.raises(EngineError, match=r"temperature 0\.5"):
        engine_with(WEIGHTS).submit(ask("warm", TEXT, temperature=0.5))


def test_a_response_ends_with_the_end_token_or_by_length():
    engine = engine_with(WEIGHTS)
    engine.submit(ask("some", TEXT, 16, most=200))
    ends = {MODEL.tokens.turn_end, MODEL.tokens.pad}
    for rollout in finished(engine).values():
        *before, last = rollout.token_ids_T.tolist()
        assert not ends & set(before)
        assert (last in ends) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.token_ids_T) == 200


def test_tokens_are_drawn_with_their_probabilities():
    logprobs_V = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    draws_Q = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    chosen_Q = _choose(logprobs_V.expand(10_000, -1), draws_Q)
    assert chosen_Q.bincount(minlength=4).tolist() == pytest.approx([1000, 0, 6000, 3000], abs=1)


def test_the_largest_draw_takes_the_last_token_that_may_be_taken():
    logprobs_1V = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert _choose(logprobs_1V, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [1]
