"""The update's gradient, in several layouts, against the objective written down in plain autograd over transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mimo_megatron.config.rl import AlgorithmConfig
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.loss.policy import Clipping
from mimo_megatron.mcore import optimizer, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.rl.groups import RewardedGroup, policy_rows, policy_sample
from mimo_megatron.rl.update import PolicyLoss
from mimo_megatron.train.step import local_packs
from mimo_megatron.types import EncodedSample, Rollout
from tests.harness import run_ranks
from tests.parity.test_model import HfModel
from tests.parity_rule import relative_error
from tests.rl_fixtures import MODEL, prompts

Named = dict[str, Tensor]
LENGTHS, MOST, SLOTS = (5, 1, 9, 3), 16, 96
CLIPPING = Clipping(0.1, 0.15, kl_weight=0.3)
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, dict(tp=2)),
    "tp2 sp": (2, dict(tp=2, sequence_parallel=True)),
    "pp2": (2, dict(pp=2)),
    "cp2": (2, dict(cp=2)),
    "dp2": (2, {}),
}


def groups() -> list[RewardedGroup]:
    draw = np.random.default_rng(3)

    def rollout(index: int, length: int) -> Rollout:
        token_ids_T = np.append(draw.integers(16, 512, length - 1), MODEL.tokens.turn_end)
        return Rollout("", index, token_ids_T, draw.normal(-5, 0.1, length), np.ones(length, np.int64), "stop")

    found = []
    for prompt in prompts():
        rollouts = tuple(rollout(index, length) for index, length in enumerate(draw.permutation(LENGTHS).tolist()))
        rewards = (*draw.choice([0.0, 1.0, 0.25], 3).tolist(), 0.6)
        found.append(RewardedGroup(prompt.id, "", prompt.num_tokens, prompt.num_patches, rollouts, rewards, ("",) * 4))
    return found


def samples_of(algorithm: AlgorithmConfig) -> list[EncodedSample]:
    """With the columns of both algorithms."""
    prompt_of = {prompt.id: prompt for prompt in prompts()}
    draw = np.random.default_rng(4)
    samples = []
    for number, row in enumerate(policy_rows(groups(), algorithm, MOST)):
        sample = policy_sample(prompt_of[row.question_id], row, number)
        more = {name: draw.normal(-6.3, 0.3, sample.num_tokens) for name in ("old_logprob", "reference_logprob")}
        columns = {name: (value * sample.loss_mask_T).astype(np.float32) for name, value in more.items()}
        samples.append(replace(sample, columns={**sample.columns, **columns}))
    return samples


TABLE = Numerics(torch.float64)
IN_CHUNKS = replace(TABLE, head_loss="chunked", head_logits=1000)


def ours(
    address: RankAddress, layout: dict, samples: list, clipping: Clipping | None, named: dict, numerics=TABLE
) -> Named:
    with megatron(ParallelConfig(**layout), address) as mesh:
        chunks = build_chunks(MODEL, ParallelConfig(**layout), numerics, mesh)
        with torch.no_grad():
            for name, param in weights.global_parameters(chunks):
                param.copy_(weights.shard(name, named[name], param, mesh.tp))
        wrapped = optimizer.wrap(chunks, dtype_is_bf16=False)
        packs = [samples[start : start + 2] for start in range(0, len(samples), 2)]
        batches = [collate(pack, MODEL, SLOTS) for pack in packs][mesh.dp.rank :: mesh.dp.size]
        loss = PolicyLoss(MODEL.tokens, mesh, len(samples), clipping, torch.device("cpu"))
        run_microbatches(wrapped, local_packs(MODEL.text, mesh, chunks, batches), SLOTS, loss, whole_gradients=True)
        return {
            name: weights.unshard(name, param.main_grad, param, mesh.tp).clone()
            for name, param in weights.global_parameters(chunks)
        }


def reference(hf: HfModel, algorithm: AlgorithmConfig, clipping: Clipping | None) -> Named:
    """The objective, response by response and without packs, rows, masks or weights."""
    samples = iter(samples_of(algorithm))
    found, per_response, per_group = [], [], []
    for group in groups():
        rewards = torch.tensor(group.rewards_G, dtype=torch.float64)
        advantages_G = (rewards - rewards.mean()) / rewards.std(correction=0).clamp(min=algorithm.std_floor)
        terms = []
        for advantage in advantages_G:
            sample = next(samples)
            where = np.flatnonzero(sample.loss_mask_T)
            logits = hf.logits(sample)[where - 1]
            logits[:, list(MODEL.tokens.never_sampled)] = -torch.inf
            logp = logits.log_softmax(-1).gather(-1, torch.from_numpy(sample.token_ids_T[where])[:, None])[:, 0]
            if clipping is None:
                terms.append(-advantage * logp)
                continue
            old, ref = (torch.from_numpy(sample.columns[name][where]) for name in ("old_logprob", "reference_logprob"))
            ratio = (logp - old).exp()
            clipped = ratio.clamp(1 - clipping.low, 1 + clipping.high)
            kl = (ref - logp).exp() - (ref - logp) - 1
            terms.append(-torch.minimum(ratio * advantage, clipped * advantage) + clipping.kl_weight * kl)
        per_group.append(torch.cat(terms).mean())
        per_response += [term.mean() for term in terms]
        found += terms
    objective = {
        "group-token-mean": lambda: torch.stack(per_group).mean(),
        "token-mean": lambda: torch.cat(found).mean(),
        "sequence-mean": lambda: torch.stack(per_response).mean(),
        "constant": lambda: torch.cat(found).sum() / (len(found) * MOST),
    }[algorithm.normaliser]()
    hf.model.zero_grad()
    objective.backward()
    return hf.under_our_names({name: p.grad for name, p in hf.model.named_parameters() if p.grad is not None})


@pytest.fixture(scope="module")
def hf() -> HfModel:
    return HfModel(MODEL, torch.float64)


def assert_same(got: list[Named], want: Named) -> None:
    seen = {name: grad for rank in got for name, grad in rank.items()}
    assert set(want) == {name for name, grad in seen.items() if grad.any()}
    for rank in got:
        for name, grad in rank.items():
            # transformers computes rotary angles and some norms in fp32 whatever the weights' dtype
            assert relative_error(grad, want.get(name, torch.zeros_like(grad))) < 2e-5, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_on_policy_gradient_is_that_of_the_objective_in_every_layout(name, hf):
    ranks, layout = LAYOUTS[name]
    algorithm = AlgorithmConfig()
    got = run_ranks(ours, ranks, layout, samples_of(algorithm), None, hf.weights())
    assert_same(got, reference(hf, algorithm, None))


@pytest.mark.parametrize("normaliser", ["token-mean", "sequence-mean", "constant"])
def test_every_normaliser_is_that_of_its_definition(normaliser, hf):
    algorithm = AlgorithmConfig(normaliser=normaliser)
    got = run_ranks(ours, 1, {}, samples_of(algorithm), None, hf.weights())
    assert_same(got, reference(hf, algorithm, None))


@pytest.mark.parametrize("name", ["one", "tp2", "cp2"])
def test_the_clipped_gradient_with_its_kl_term_is_that_of_grpo(name, hf):
    ranks, layout = LAYOUTS[name]
    algorithm = AlgorithmConfig(name="grpo")
    got = run_ranks(ours, ranks, layout, samples_of(algorithm), CLIPPING, hf.weights())
    assert_same(got, reference(hf, algorithm, CLIPPING))


@pytest.mark.parametrize("name", ["one", "tp2 sp"])
@pytest.mark.parametrize("clipping", [None, CLIPPING], ids=["on policy", "clipped"])
def test_without_a_table_of_logits_both_gradients_are_the_same(name, clipping, hf):
    ranks, layout = LAYOUTS[name]
    algorithm = AlgorithmConfig(name="grpo" if clipping else "on-policy")
    got = run_ranks(ours, ranks, layout, samples_of(algorithm), clipping, hf.weights(), IN_CHUNKS)
    assert_same(got, reference(hf, algorithm, clipping))


def test_an_advantage_of_the_wrong_response_is_noticed(hf):
    samples = samples_of(AlgorithmConfig())
    first, second = samples[:2]
    wrong = {**first.columns, "advantage": first.loss_mask_T * second.columns["advantage"].sum().astype(np.float32)}
    samples[0] = replace(first, columns=wrong)
    got = run_ranks(ours, 1, {}, samples, None, hf.weights())
    with pytest.raises(AssertionError):
        assert_same(got, reference(hf, AlgorithmConfig(), None))
