"""The multi-token-prediction layer against a plain one of transformers' parts, as MiMo-7B releases and serves it.

The reference, in fp64: RMSNorm of the decoder's last (normed) hidden state and of the next token's embedding, joined in
that order by one projection, a Qwen2 decoder layer with the slot's own position, a last norm, and the decoder's head.
Its weights are ours under their Hugging Face names, so the converter's rules are part of what is compared.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as torch_cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import optimizer, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.prove.material import random_sample
from mimo_megatron.train.step import cross_entropy
from tests.harness import run_ranks

LENGTH = 24
MODEL = preset("tiny-base")
SAMPLE = random_sample(3, LENGTH)
Named = dict[str, Tensor]


def ours(address: RankAddress, model: ModelConfig) -> tuple[Named, Named, float, float]:
    """Weights and gradients under their Hugging Face names, the main loss and the objective, as sums over tokens."""
    with megatron(ParallelConfig(), address) as mesh:
        chunks = build_chunks(model, ParallelConfig(), Numerics(torch.float64), mesh)
        weights.draw_weights(chunks, 1, mesh.tp)
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in chunks[0].parameters():  # norms and biases that matter, and are not alike
                param.add_(torch.randn(param.shape, generator=draw, dtype=param.dtype), alpha=0.1)
        wrapped = optimizer.wrap(chunks, dtype_is_bf16=False)
        pack = local_pack(collate([SAMPLE], model, LENGTH), mesh.cp, model.text.num_mtp_layers)
        sums = run_microbatches(
            wrapped,
            [pack],
            pack.num_stream_slots,
            cross_entropy(mesh, model.text.mtp_loss_weight),
            whole_gradients=True,
        )
        params = dict(weights.global_parameters(chunks))
        held = {name: param.detach().clone() for name, param in params.items()}
        grads = {name: param.main_grad * sums.count for name, param in params.items()}
    return renamed(model, held), renamed(model, grads), sums.loss, sums.objective


def renamed(model: ModelConfig, named: Named) -> Named:
    """The tensors under Hugging Face's names; the gradient of a rearranged weight is the rearranged gradient."""
    return {
        spec.name: tensor.clone()
        for rule in rules_for(model)
        for spec, tensor in zip(rule.hf, rule.to_hf(named[rule.ours.name]), strict=True)
    }


class Reference(nn.Module):
    def __init__(self, model: ModelConfig, swapped: bool = False):
        super().__init__()
        text = model.text
        config = Qwen2Config(
            vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=text.ffn_width,
            num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads, head_dim=text.head_width,
            num_key_value_heads=text.num_kv_heads, rms_norm_eps=text.norm_eps, tie_word_embeddings=False,
            rope_theta=text.rope_theta, rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            attn_implementation="eager",
        )  # fmt: skip
        self.base = Qwen2ForCausalLM(config)
        self.token_layernorm = Qwen2RMSNorm(text.width, text.norm_eps)
        self.hidden_layernorm = Qwen2RMSNorm(text.width, text.norm_eps)
        self.input_proj = nn.Linear(2 * text.width, text.width, bias=False)
        self.block = Qwen2DecoderLayer(config, 0)
        self.final_layernorm = Qwen2RMSNorm(text.width, text.norm_eps)
        self.swapped = swapped

    def forward(self, ids_T: Tensor) -> Tensor:
        """Logits [T - 1, V]: those in row i are of token i + 2."""
        embeddings = self.base.model.embed_tokens(ids_T)[None]
        hidden = self.base.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
        pair = [self.hidden_layernorm(hidden), self.token_layernorm(embeddings[:, 1:])]
        x = self.input_proj(torch.cat(pair[::-1] if self.swapped else pair, dim=-1))
        places = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        rotary = self.base.model.rotary_emb(x, places)
        x = self.block(x, attention_mask=mask, position_embeddings=rotary, position_ids=places)
        x = x[0] if isinstance(x, tuple) else x
        return self.base.lm_head(self.final_layernorm(x))[0]

    def filled(self, hf: Named) -> "Reference":
        mtp = "model.mtp_layers.0."
        own = {f"base.{name}": tensor for name, tensor in hf.items() if not name.startswith(mtp)}
        for name, tensor in hf.items():
            if name.startswith(mtp):
                short = name.removeprefix(mtp)
                inside = short.startswith(("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"))
                own[f"block.{short}" if inside else short] = tensor
        self.double().load_state_dict(own, strict=True)
        return self

    def hf_gradients(self) -> Named:
        return {
            (name.removeprefix("base.") if name.startswith("base.") else
             f"model.mtp_layers.0.{name.removeprefix('block.')}"): param.grad
            for name, param in self.named_parameters() if param.grad is not None
        }  # fmt: skip


def prediction_loss(reference: Reference) -> Tensor:
    ids_T, mask_T = torch.from_numpy(SAMPLE.token_ids_T), torch.from_numpy(SAMPLE.loss_mask_T)
    losses = torch_cross_entropy(reference(ids_T)[:-1], ids_T[2:], reduction="none")
    return (losses * mask_T[2:]).sum()


@pytest.fixture(scope="module")
def measured() -> Any:
    return run_ranks(ours, 1, MODEL)[0]


def test_the_prediction_layers_loss_and_every_gradient_equal_those_of_transformers_parts(measured):
    held, grads, loss, objective = measured
    reference = Reference(MODEL).filled(held)
    ids_T, mask_T = torch.from_numpy(SAMPLE.token_ids_T), torch.from_numpy(SAMPLE.loss_mask_T)
    main = torch_cross_entropy(reference.base(ids_T[None], use_cache=False).logits[0, :-1], ids_T[1:], reduction="none")
    main_loss, ahead = (main * mask_T[1:]).sum(), prediction_loss(reference)
    assert loss == pytest.approx(main_loss.item(), rel=1e-6)
    assert (objective - loss) / MODEL.text.mtp_loss_weight == pytest.approx(ahead.item(), rel=1e-6)
    (main_loss + MODEL.text.mtp_loss_weight * ahead).backward()
    theirs = reference.hf_gradients()
    assert theirs.keys() == grads.keys() and any("mtp_layers" in name for name in grads)
    # 1e-6: rotary angles are float32 by definition on either side, rounded in another order.
    errors = {name: ((grads[name] - want).norm() / want.norm()).item() for name, want in theirs.items()}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda one: one[1])


def test_halves_joined_in_the_other_order_are_noticed(measured):
    held, _, loss, objective = measured
    wrong = prediction_loss(Reference(MODEL, swapped=True).filled(held)).item()
    assert abs((objective - loss) / MODEL.text.mtp_loss_weight / wrong - 1) > 1e-4
