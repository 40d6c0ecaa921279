"""A whole vision-language model on one device, for sampling: plain torch, a key-value cache, no parallel state.

It knows Hugging Face's names, and nothing of the trainer's layers or of how they are cut: what the two compute for the
same tokens is compared after every update (``sync/canary.py``), and would be no proof if both ran the same code.

Dims: T packed tokens, Q sequences, L slots of the cache, D width, N query heads, K key-value heads, G = N / K (in
``prefill`` the rows of one segment), H head width, F FFN width, V vocabulary, M merged vision tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from mimo_megatron.attention.packed import causal_attention, without_plans
from mimo_megatron.attention.pieces import causal_pieces
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.mcore.text import rotary_cos_sin
from mimo_megatron.model.projector import Projector
from mimo_megatron.model.vision import VisionEncoder
from mimo_megatron.model.vlm import splice
from mimo_megatron.ops import rms_norm, swiglu, turn
from mimo_megatron.types import PackedBatch, VisionLayout


@dataclass(frozen=True)
class _Layer:
    attention_norm_D: Tensor
    qkv: Tensor
    """[(N + 2K) H, D]: all queries, then all keys, then all values."""
    qkv_bias: Tensor
    out: Tensor
    mlp_norm_D: Tensor
    gate_up: Tensor
    """[2F, D]"""
    down: Tensor


class Cache:
    """Keys and values of every layer, [Q, K, L, H] each; row q is one sequence's. It grows as longer ones come."""

    def __init__(self, model: ModelConfig, num_rows: int, dtype: torch.dtype, device: torch.device):
        self._shape = (num_rows, model.text.num_kv_heads, 0, model.text.head_width)
        self._options = dict(dtype=dtype, device=device)
        self.layers = [self._empty(0) for _ in range(model.text.num_layers)]

    @property
    def num_slots(self) -> int:
        return self.layers[0].shape[3]

    def reserve(self, num_slots: int) -> None:
        """Room for sequences of this length; what is there stays."""
        if num_slots <= self.num_slots:
            return
        num_slots = max(num_slots, min(2 * self.num_slots, num_slots + 1024))
        for number, held in enumerate(self.layers):
            grown = self._empty(num_slots)
            grown[:, :, :, : held.shape[3]] = held
            self.layers[number] = grown

    def move(self, source: int, target: int, length: int) -> None:
        """Row ``source``'s first ``length`` slots into row ``target``."""
        for kv in self.layers:
            kv[:, target, :, :length] = kv[:, source, :, :length]

    def _empty(self, num_slots: int) -> Tensor:
        rows, heads, _, width = self._shape
        return torch.zeros((2, rows, heads, num_slots, width), **self._options)  # type: ignore[call-overload]


class InferenceModel:
    """``weights`` are all tensors by their Hugging Face names, views of what is computed with: write into them."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device):
        assert model.text.head == "vocabulary", "a reward model samples nothing"
        self.config, self.dtype, self.device = model, dtype, device
        text = model.text
        self.weights: dict[str, Tensor] = {}
        self._embedding_VD = self._own("model.embed_tokens.weight", text.vocab_size, text.width)
        self._final_norm_D = self._own("model.norm.weight", text.width)
        self._head_VD = (
            self._embedding_VD if text.tie_embeddings else self._own("lm_head.weight", text.vocab_size, text.width)
        )
        self._layers = [self._layer(f"model.layers.{number}") for number in range(text.num_layers)]
        self._vision: VisionEncoder | None = None
        self._projector: Projector | None = None
        if model.vision is not None:
            self._vision = VisionEncoder(model.vision).to(device, dtype).requires_grad_(False)
            self._projector = Projector(model.vision, text.width).to(device, dtype).requires_grad_(False)
            self.weights.update(self._vision_weights())

    def cache(self, num_rows: int) -> Cache:
        return Cache(self.config, num_rows, self.dtype, self.device)

    @torch.no_grad()
    def encode(self, pixels_Y: Tensor, layout: VisionLayout) -> Tensor:
        """[M, D] features of pictures and videos."""
        assert self._vision is not None and self._projector is not None
        return self._projector(self._vision(pixels_Y.to(self.device), layout), layout)

    @torch.no_grad()
    def prefill(
        self, batch: PackedBatch, features_MD: Tensor | None, slots_R: Tensor, into: Sequence[tuple[Cache, slice]] = ()
    ) -> Tensor:
        """[R, V] logits after the slots ``slots_R`` of a pack. ``into[i]`` are a cache, with room, and the rows of it
        that take the keys and values of segment i."""
        hidden_TD = self._embedding_VD[batch.token_ids_S.to(self.device)]
        if features_MD is not None:
            slots_M, rows_M = batch.splice_M.to(self.device), batch.splice_rows_M.to(self.device)
            hidden_TD = splice(hidden_TD.unsqueeze(1), features_MD, slots_M, rows_M).squeeze(1)
        cos, sin = rotary_cos_sin(self.config.text, batch.positions_3S.to(self.device), self.dtype)
        pieces = causal_pieces(batch.segment_bounds, ((0, batch.num_slots),))
        for number, layer in enumerate(self._layers):
            q_TNH, k_TKH, v_TKH = self._qkv(layer, hidden_TD)
            q_TNH, k_TKH = turn(q_TNH, cos, sin), turn(k_TKH, cos, sin)
            for (cache, rows_G), (start, end) in zip(into, itertools.pairwise(batch.segment_bounds), strict=False):
                for held, x_TKH in zip(cache.layers[number], (k_TKH, v_TKH), strict=True):
                    held[rows_G, :, : end - start] = x_TKH[start:end].transpose(0, 1)
            out_TNH = causal_attention(q_TNH, k_TKH, v_TKH, pieces)
            hidden_TD = self._rest(layer, hidden_TD, out_TNH)
        return self._logits(hidden_TD[slots_R.to(self.device)])

    @torch.no_grad()
    def step(self, token_ids_Q: Tensor, positions_Q: Tensor, lengths_Q: Tensor, cache: Cache, longest: int) -> Tensor:
        """[Q, V] logits after one more token of each of the cache's first Q rows, of which ``lengths_Q`` tokens are in
        the cache; ``longest`` is the largest of these."""
        num_rows, num_seen = len(token_ids_Q), longest + 1
        rows_Q = torch.arange(num_rows, device=self.device)
        is_seen_QL = torch.arange(num_seen, device=self.device) <= lengths_Q[:, None]
        hidden_QD = self._embedding_VD[token_ids_Q]
        cos, sin = rotary_cos_sin(self.config.text, positions_Q.expand(3, -1), self.dtype)
        for number, layer in enumerate(self._layers):
            q_QNH, k_QKH, v_QKH = self._qkv(layer, hidden_QD)
            keys_QKLH, values_QKLH = cache.layers[number][:, :num_rows, :, :num_seen]
            keys_QKLH[rows_Q, :, lengths_Q], values_QKLH[rows_Q, :, lengths_Q] = turn(k_QKH, cos, sin), v_QKH
            # The G query heads of a key-value head stand as G queries, so that nothing is repeated.
            q_QKGH = turn(q_QNH, cos, sin).unflatten(1, (keys_QKLH.shape[1], -1))
            mask_Q1GL = is_seen_QL[:, None, None].expand(-1, -1, q_QKGH.shape[2], -1)
            with without_plans(self.device):
                out_QKGH = scaled_dot_product_attention(q_QKGH, keys_QKLH, values_QKLH, attn_mask=mask_Q1GL)
            hidden_QD = self._rest(layer, hidden_QD, out_QKGH.flatten(1, 2))
        return self._logits(hidden_QD)

    def _qkv(self, layer: _Layer, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text = self.config.text
        normed_TD = rms_norm(hidden_TD, layer.attention_norm_D, text.norm_eps)
        heads = linear(normed_TD, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, text.head_width))
        q_TNH, k_TKH, v_TKH = heads.split([text.num_heads, text.num_kv_heads, text.num_kv_heads], dim=1)
        return q_TNH, k_TKH, v_TKH

    def _rest(self, layer: _Layer, hidden_TD: Tensor, out_TNH: Tensor) -> Tensor:
        hidden_TD = hidden_TD + linear(out_TNH.flatten(1), layer.out)
        normed_TD = rms_norm(hidden_TD, layer.mlp_norm_D, self.config.text.norm_eps)
        return hidden_TD + linear(swiglu(linear(normed_TD, layer.gate_up)), layer.down)

    def _logits(self, hidden_QD: Tensor) -> Tensor:
        """In at least fp32, as the trainer's."""
        normed_QD = rms_norm(hidden_QD, self._final_norm_D, self.config.text.norm_eps)
        wide = torch.promote_types(self.dtype, torch.float32)
        return linear(normed_QD.to(wide), self._head_VD.to(wide))

    def _own(self, name: str, *shape: int) -> Tensor:
        self.weights[name] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.weights[name]

    def _fused(self, names: list[str], num_rows: list[int], *rest: int) -> Tensor:
        """One tensor, whose ranges of rows are those of the names."""
        whole = torch.zeros((sum(num_rows), *rest), dtype=self.dtype, device=self.device)
        self.weights.update(zip(names, whole.split(num_rows), strict=True))
        return whole

    def _layer(self, name: str) -> _Layer:
        text = self.config.text
        heads = [count * text.head_width for count in (text.num_heads, text.num_kv_heads, text.num_kv_heads)]
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        return _Layer(
            attention_norm_D=self._own(f"{name}.input_layernorm.weight", text.width),
            qkv=self._fused([f"{attention}.{one}_proj.weight" for one in "qkv"], heads, text.width),
            qkv_bias=self._fused([f"{attention}.{one}_proj.bias" for one in "qkv"], heads),
            out=self._own(f"{attention}.o_proj.weight", text.width, heads[0]),
            mlp_norm_D=self._own(f"{name}.post_attention_layernorm.weight", text.width),
            gate_up=self._fused(
                [f"{mlp}.{one}_proj.weight" for one in ("gate", "up")], [text.ffn_width] * 2, text.width
            ),
            down=self._own(f"{mlp}.down_proj.weight", text.width, text.ffn_width),
        )

    def _vision_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The encoder's and the projector's parameters, which are one tensor each under both names."""
        params = {f"vision.{name}": param for name, param in self._vision.named_parameters()}  # type: ignore[union-attr]
        params |= {f"projector.{name}": param for name, param in self._projector.named_parameters()}  # type: ignore[union-attr]
        for rule in rules_for(self.config):
            if rule.ours.name in params:
                yield rule.hf[0].name, params[rule.ours.name].data.view(rule.hf[0].shape)
