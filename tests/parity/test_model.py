"""The whole model, several samples to a pack, against transformers one sample at a time: logits and every gradient."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as hf_cross_entropy
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import hf_config
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import optimizer, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.schedule import run_forward, run_microbatches
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.train.step import cross_entropy
from mimo_megatron.types import EncodedMedia, EncodedSample
from tests.harness import run_ranks
from tests.parity_rule import assert_named_parity, relative_error
from tests.pixels import normalized
from tests.samples import mixed_packs, random_media, random_sample, tiny_model

SLOTS = 128
Named = dict[str, Tensor]

SAMPLES: dict[str, list[EncodedSample]] = {
    "text-only": [random_sample(1, 40), random_sample(2, 2), random_sample(3, 33)],
    "several-images": [random_sample(4, 20, [random_media((1, 4, 6), 0), random_media((1, 10, 6), 1)])],
    "one-row-and-one-column-images": [random_sample(5, 12, [random_media((1, 2, 34), 2), random_media((1, 34, 2), 3)])],
    "windows-cut-at-borders": [random_sample(6, 9, [random_media((1, 18, 10), 4)]), random_sample(7, 20)],
    "video": [
        random_sample(8, 15, [random_media((4, 4, 6), 5, 1.5)]),
        random_sample(9, 6, [random_media((2, 8, 4), 6, 0.4)]),
    ],
    "video-and-image": [random_sample(10, 15, [random_media((3, 4, 6), 7, 1.0), random_media((1, 4, 4), 8)])],
}


class HfModel:
    """transformers' model of a random configuration, and its weights and gradients under our names."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        self.config, self.dtype = model, dtype
        settings = AutoConfig.for_model(**hf_config(model, torch.float32))
        self.model = Qwen2_5_VLForConditionalGeneration(settings).to(torch.float32)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=draw) * 0.05 + (param.dim() == 1))
        self.model.to(dtype)

    def under_our_names(self, tensors: dict[str, Tensor]) -> Named:
        released = {_released(name): tensor for name, tensor in tensors.items()}
        return {
            rule.ours.name: rule.to_ours([released[spec.name] for spec in rule.hf])
            for rule in rules_for(self.config)
            if all(spec.name in released for spec in rule.hf)
        }

    def weights(self) -> Named:
        return self.under_our_names({name: param.detach() for name, param in self.model.named_parameters()})

    def logits(self, sample: EncodedSample) -> Tensor:
        """[T, V]"""
        tokens = self.config.tokens
        ids = torch.from_numpy(sample.token_ids_T)[None]
        kinds = (ids == tokens.image_pad).int() + 2 * (ids == tokens.video_pad).int()
        inputs: dict[str, Any] = {"mm_token_type_ids": kinds} | self.images(sample.media) | self.videos(sample.media)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits[0]

    def images(self, media: Sequence[EncodedMedia]) -> dict[str, Tensor]:
        chosen = [one for one in media if one.kind == "image"]
        return {"pixel_values": self._pixels(chosen), "image_grid_thw": _grids(chosen)} if chosen else {}

    def videos(self, media: Sequence[EncodedMedia]) -> dict[str, Tensor]:
        chosen = [one for one in media if one.kind == "video"]
        if not chosen:
            return {}
        return {
            "pixel_values_videos": self._pixels(chosen),
            "video_grid_thw": _grids(chosen),
            "second_per_grid_ts": torch.tensor([one.seconds_per_grid for one in chosen]),
        }

    def _pixels(self, media: Sequence[EncodedMedia]) -> Tensor:
        return torch.cat([normalized(torch.from_numpy(one.patches_PC), self.dtype) for one in media])

    def mean_loss_gradients(self, samples: Sequence[EncodedSample]) -> Named:
        total, count = torch.zeros((), dtype=self.dtype), 0
        for sample in samples:
            mask = torch.from_numpy(sample.loss_mask_T[1:])
            labels = torch.from_numpy(sample.token_ids_T[1:])[mask]
            total = total + hf_cross_entropy(self.logits(sample)[:-1][mask], labels, reduction="sum")
            count += len(labels)
        self.model.zero_grad()
        (total / count).backward()
        grads = {name: param.grad for name, param in self.model.named_parameters() if param.grad is not None}
        return {"loss": (total / count).detach()[None]} | self.under_our_names(grads)


def _released(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def _grids(media: Sequence[EncodedMedia]) -> Tensor:
    return torch.tensor([one.grid for one in media])


def build(model: ModelConfig, named: Named, dtype: torch.dtype, mesh: Any) -> VisionLanguageModel:
    ours = VisionLanguageModel(model, ParallelConfig(), Numerics(dtype), mesh)
    with torch.no_grad():
        for name, param in weights.global_parameters([ours]):
            param.copy_(named[name])
    return ours


def our_gradients(address: RankAddress, model: ModelConfig, named: Named, dtype: torch.dtype, packs: list) -> Named:
    with megatron(ParallelConfig(), address) as mesh:
        ours = build(model, named, dtype, mesh)
        wrapped = optimizer.wrap([ours], dtype_is_bf16=False)
        local = [local_pack(collate(samples, model, SLOTS), mesh.cp) for samples in packs]
        sums = run_microbatches(wrapped, local, SLOTS, cross_entropy(mesh), whole_gradients=True)
        loss = torch.tensor([sums.loss / sums.count]).to(dtype)
        grads = {name: param.main_grad.clone() for name, param in weights.global_parameters([ours])}
        return {"loss": loss} | {name: grad for name, grad in grads.items() if grad.any()}


def our_logits(address: RankAddress, model: ModelConfig, named: Named, dtype: torch.dtype, samples: list) -> Tensor:
    """Logits of every real slot of the pack."""
    with megatron(ParallelConfig(), address) as mesh:
        ours = build(model, named, dtype, mesh)
        batch = collate(samples, model, SLOTS)
        everywhere = torch.ones(batch.num_tokens)
        batch.loss_weights_S[: batch.num_tokens] = everywhere
        (logits,) = run_forward([ours], [local_pack(batch, mesh.cp)], SLOTS, lambda logits, _pack: logits)
        return logits


@pytest.mark.parametrize("kind", SAMPLES)
def test_packed_logits_and_every_gradient_equal_transformers(kind):
    model, samples = tiny_model(), SAMPLES[kind]
    eager, oracle = HfModel(model, torch.float32), HfModel(model, torch.float64)
    named = eager.weights()
    want_logits = torch.cat([oracle.logits(sample).detach() for sample in samples])
    eager_logits = torch.cat([eager.logits(sample).detach() for sample in samples])
    got_logits = run_ranks(our_logits, 1, model, named, torch.float32, samples)[0]
    want, eager_grads = oracle.mean_loss_gradients(samples), eager.mean_loss_gradients(samples)
    got = run_ranks(our_gradients, 1, model, named, torch.float32, [samples])[0]
    assert_named_parity(
        got | {"logits": got_logits},
        eager_grads | {"logits": eager_logits},
        want | {"logits": want_logits},
        torch.float32,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_of_mixed_packs_has_the_gradients_of_its_samples_one_by_one(tied):
    model = tiny_model(tie_embeddings=tied)
    samples = [sample for pack in mixed_packs() for sample in pack]
    eager, oracle = HfModel(model, torch.float32), HfModel(model, torch.float64)
    got = run_ranks(our_gradients, 1, model, eager.weights(), torch.float32, mixed_packs())[0]
    assert_named_parity(got, eager.mean_loss_gradients(samples), oracle.mean_loss_gradients(samples), torch.float32)


def test_transformers_own_packing_with_a_cache_lets_samples_attend_to_each_other():
    """The trap our parity is measured around: packed positions isolate samples only with ``use_cache=False``."""
    samples = SAMPLES["text-only"]
    model = tiny_model()
    hf = HfModel(model, torch.float64)
    ids = torch.from_numpy(np.concatenate([sample.token_ids_T for sample in samples]))[None]
    positions = torch.cat([torch.arange(sample.num_tokens) for sample in samples]).expand(4, 1, -1)
    apart = torch.cat([hf.logits(sample).detach() for sample in samples])
    hf.model.train()

    def packed(**options: Any) -> Tensor:
        return hf.model(input_ids=ids, position_ids=positions, **options).logits[0].detach()

    assert relative_error(packed(use_cache=False), apart) < 1e-6
    assert relative_error(packed(), apart) > 1e-2
    ours = run_ranks(our_logits, 1, model, {k: v.float() for k, v in hf.weights().items()}, torch.float32, samples)[0]
    assert relative_error(ours, apart) < 1e-5


def test_a_planted_error_in_one_weight_is_rejected():
    model, samples = tiny_model(), SAMPLES["several-images"]
    eager, oracle = HfModel(model, torch.float32), HfModel(model, torch.float64)
    wrong = eager.weights()
    wrong["vision.blocks.2.attn.qkv.bias"] = wrong["vision.blocks.2.attn.qkv.bias"] * 1.001
    got = run_ranks(our_gradients, 1, model, wrong, torch.float32, [samples])[0]
    with pytest.raises(AssertionError):
        assert_named_parity(got, eager.mean_loss_gradients(samples), oracle.mean_loss_gradients(samples), torch.float32)
