"""The vision-language model on one pipeline stage: encode images, project, splice into the token embeddings, decode.

Vision encoder and projector live on the first stage, whole on every tp and cp rank. All of those compute the same
features; the gradient that comes back is complete on every tp rank (the decoder sums it) and the share of its own slots
on every cp rank, where megatron's data-parallel sum, which runs over cp too, completes it. Nothing is counted twice.
"""

from typing import Any

import torch
from torch import Tensor

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ModuleName, ParallelConfig
from mimo_megatron.mcore.attention import PackParams
from mimo_megatron.mcore.module import MegatronModule, scatter_slots_over_tp
from mimo_megatron.mcore.text import Numerics, TextDecoder, transformer_config
from mimo_megatron.model.local_pack import LocalPack
from mimo_megatron.model.projector import Projector
from mimo_megatron.model.vision import VisionEncoder
from mimo_megatron.parallel.mesh import Mesh


class VisionLanguageModel(MegatronModule):
    """``forward(pack)``: hidden states [S, 1, D] on inner stages, logits [R, V / tp] of the pack's rows on the last.

    A model without a vision configuration is the text decoder alone.
    """

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, numerics: Numerics, mesh: Mesh):
        config = transformer_config(model.text, parallel, numerics)
        super().__init__(config)
        self.model_config = model
        self.mesh = mesh
        self.text = TextDecoder(model.text, config, mesh)
        self.vision: VisionEncoder | None = None
        self.projector: Projector | None = None
        if model.vision is not None and mesh.is_first_stage:
            self.vision = VisionEncoder(model.vision).to(numerics.dtype)
            self.projector = Projector(model.vision, model.text.width).to(numerics.dtype)
        # Names by which megatron's schedule, gradient finalisation and embedding tying look for these.
        self.pre_process = mesh.is_first_stage
        self.post_process = mesh.is_last_stage
        self.share_embeddings_and_output_weights = model.text.tie_embeddings
        self.model_type = self.text.model_type
        self.vp_stage = None

    def forward(self, pack: LocalPack) -> Tensor:
        params = PackParams(pieces=pack.pieces, cp=self.mesh.cp, merge_order_S=pack.merge_order_S, cache=pack.cache)
        decoder_input = self._embed(pack) if self.mesh.is_first_stage else None
        return self.text.decode(decoder_input, pack.positions_3S, params, pack.rows_R)

    def _embed(self, pack: LocalPack) -> Tensor:
        hidden_S1D = self.text.embed(pack.token_ids_S)
        if pack.vision is not None:
            features_MD = self.encode(pack)
            hidden_S1D = splice(hidden_S1D, features_MD, pack.splice_slots_L, pack.splice_rows_L)
        if torch.is_grad_enabled() and not hidden_S1D.requires_grad:
            hidden_S1D = (
                hidden_S1D.detach().requires_grad_()
            )  # a pack that trains nothing on this stage still runs back
        if self.config.sequence_parallel:
            hidden_S1D = scatter_slots_over_tp(hidden_S1D)
        return hidden_S1D

    def encode(self, pack: LocalPack) -> Tensor:
        """[M, D] features of the pack's images and videos, in pack order."""
        assert self.vision is not None and self.projector is not None and pack.vision is not None
        return self.projector(self.vision(pack.patches_PC, pack.vision), pack.vision)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedule hands the previous stage's hidden states over here."""
        self.text.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.text.shared_embedding_or_output_weight()

    def freeze(self, names: set[ModuleName]) -> None:
        """Take the named parts out of training. Parts that live on another stage are passed over."""
        for name in names:
            part = getattr(self, name)
            if part is not None:
                part.requires_grad_(False)


def splice(hidden_S1D: Tensor, features_MD: Tensor, slots_L: Tensor, rows_L: Tensor) -> Tensor:
    """``hidden`` with feature row ``rows_L[i]`` in slot ``slots_L[i]``. Slots are distinct, so the result is exact.

    Gradient: that of the taken slots goes to the features, that of the others to the embeddings.
    """
    taken_L1D = features_MD.index_select(0, rows_L).unsqueeze(1).to(hidden_S1D.dtype)
    return hidden_S1D.index_copy(0, slots_L, taken_L1D)
