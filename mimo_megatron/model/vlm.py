"""The vision-language model, one stage of its pipeline: encode images, project, splice into the embeddings, decode.

Vision encoder and projector live on the first stage, whole on every tp and cp rank. The features' gradient that comes
back is complete on every tp rank (the decoder sums it) and the share of its own slots on every cp rank.
Replicated placement: all these ranks compute the same features, and megatron's data-parallel sum, which runs over cp
too, completes the gradient. Balanced placement: each rank encodes its own images and features are gathered; their
gradient is summed over cp on the way back, the parameters' over tp too, for each tp rank saw other images
(``docs/vision-placement.md``). Nothing is counted twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mimo_megatron.config.fp8 import Fp8Config, Fp8Part
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ModuleName, ParallelConfig
from mimo_megatron.loss.implicit_logits import ImplicitLogits
from mimo_megatron.mcore.attention import PackParams
from mimo_megatron.mcore.fp8 import linear_maker
from mimo_megatron.mcore.layers import encoder_product
from mimo_megatron.mcore.module import MegatronModule, scatter_slots_over_tp, sum_gradients_over_tp
from mimo_megatron.mcore.text import Numerics, TextDecoder, transformer_config
from mimo_megatron.model.local_pack import Lane, LocalPack
from mimo_megatron.model.projector import Projector
from mimo_megatron.model.vision import Linear, VisionEncoder
from mimo_megatron.model.vision_share import VisionSharing
from mimo_megatron.offload import ActivationOffload
from mimo_megatron.parallel.collectives import gather_shared
from mimo_megatron.parallel.mesh import ALONE, Mesh
from mimo_megatron.types import VisionLayout


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, numerics: Numerics, mesh: Mesh
) -> list["VisionLanguageModel"]:
    """This rank's stages of the pipeline, in order: one, or several where the schedule is interleaved."""
    return [VisionLanguageModel(model, parallel, numerics, mesh, chunk) for chunk in range(parallel.vpp)]


class VisionLanguageModel(MegatronModule):
    """``forward(pack)``: the decoder's stream on inner stages, on the last the logits of the lanes' rows, [R, V / tp]
    (or what they are made of, where ``Numerics.head_loss`` says so), or their rewards, [R, 1].

    A model without a vision configuration is the text decoder alone.
    """

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, numerics: Numerics, mesh: Mesh, chunk: int = 0):
        config = transformer_config(model.text, parallel, numerics)
        super().__init__(config)
        self.model_config = model
        self.mesh = mesh
        self.offload = ActivationOffload() if numerics.offload != "none" else None
        of_text = self.offload if numerics.offload in ("text", "all") else None
        text = TextDecoder(model.text, config, mesh, chunk, numerics=numerics, offload=of_text)
        self.vision: VisionEncoder | None = None
        self.projector: Projector | None = None
        self.sharing: VisionSharing | None = None
        """For ``local_pack``, always so in training; None in replicated placement and beyond the first stage."""
        self.encodes_in_fp8 = numerics.fp8 is not None and bool(numerics.fp8.encoder_parts)
        if model.vision is not None and text.pre_process:
            if parallel.vision_placement == "balanced" and mesh.tp_cp.size > 1:
                self.sharing = VisionSharing(model.vision, model.text.width, mesh.tp_cp)
            encoder = VisionEncoder(
                model.vision,
                backend=numerics.vision_attention,
                recompute=numerics.recompute_vision,
                offload=self.offload if numerics.offload in ("vision", "all") else None,
                linear=self._linear("vision", numerics.fp8),
            )
            projector = Projector(model.vision, model.text.width, linear=self._linear("projector", numerics.fp8))
            self.vision, self.projector = encoder.to(numerics.dtype), projector.to(numerics.dtype)
            if self.sharing is not None:
                sum_gradients_over_tp([*self.vision.parameters(), *self.projector.parameters()])
        # Last, so that parameters stand in the order of the forward pass: gradient buckets are cut from its end on.
        self.text = text
        # Names by which megatron's schedule, gradient finalisation and embedding tying look for these.
        self.pre_process, self.post_process = self.text.pre_process, self.text.post_process
        self.share_embeddings_and_output_weights = model.text.ties_head
        self.model_type = self.text.model_type
        self.vp_stage = self.text.vp_stage

    def forward(self, pack: LocalPack) -> Tensor | ImplicitLogits:
        if self.offload is not None:
            self.offload.begin()
        params = PackParams(pieces=pack.pieces, cp=self.mesh.cp, merge_order_S=pack.merge_order_S, cache=pack.cache)
        stream = self._embed(pack) if self.pre_process else None
        return self.text.decode(stream, pack.positions_3S, params, [lane.rows_R for lane in pack.lanes])

    def _embed(self, pack: LocalPack) -> Tensor:
        features_MD = self.encode(pack) if pack.vision is not None else None
        parts = [self._embed_lane(lane, features_MD) for lane in pack.lanes]
        stream = torch.cat(parts) if len(parts) > 1 else parts[0]
        if torch.is_grad_enabled() and not stream.requires_grad:
            stream = stream.detach().requires_grad_()  # a pack that trains nothing on this stage still runs back
        return stream

    def _embed_lane(self, lane: Lane, features_MD: Tensor | None) -> Tensor:
        hidden_S1D = self.text.embed(lane.token_ids_S)
        if features_MD is not None:
            hidden_S1D = splice(hidden_S1D, features_MD, lane.splice_slots_L, lane.splice_rows_L)
        return scatter_slots_over_tp(hidden_S1D) if self.config.sequence_parallel else hidden_S1D

    def encode(self, pack: LocalPack) -> Tensor:
        """[M, D] features of the pack's images and videos, in pack order. A collective where images are shared out."""
        assert pack.vision is not None
        is_trained = torch.is_grad_enabled() and self._trains_vision()
        assert not is_trained or (pack.share is None) == (self.sharing is None), "local_pack wants the model's sharing"
        if pack.share is None:
            return self.encode_own(pack.pixels_Y, pack.vision)
        if pack.vision.num_patches or self.encodes_in_fp8:  # of FP8 tensors the ranks agree on the largest magnitudes
            own_XD = self.encode_own(pack.pixels_Y, pack.vision)
        else:  # nothing to encode, but the gather's gradient is a collective: it must run here too
            weight = next(self.projector.parameters())  # type: ignore[union-attr]
            own_XD = weight.new_empty(0, self.model_config.text.width).requires_grad_(is_trained)
        return gather_shared(own_XD, pack.share.order_M, pack.share.block, self.mesh)

    def _linear(self, part: Fp8Part, fp8: Fp8Config | None) -> Linear:
        if fp8 is None or part not in fp8.parts:
            return torch.nn.Linear
        return linear_maker(fp8, encoder_product(fp8), self.mesh.tp_cp if self.sharing else ALONE)

    def encode_own(self, pixels_Y: Tensor, layout: VisionLayout) -> Tensor:
        """Features of these pixels, computed on this rank."""
        assert self.vision is not None and self.projector is not None
        return self.projector(self.vision(pixels_Y, layout), layout)

    def _trains_vision(self) -> bool:
        parts = [part for part in (self.vision, self.projector) if part is not None]
        return any(param.requires_grad for part in parts for param in part.parameters())

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

    Gradient: that of the taken slots goes to the features, that of the others to the embeddings. A row may be taken
    several times: ``embedding`` sums its gradients in a fixed order on GPUs too, where ``index_select`` does not.
    """
    taken_L1D = functional.embedding(rows_L, features_MD).unsqueeze(1).to(hidden_S1D.dtype)
    return hidden_S1D.index_copy(0, slots_L, taken_L1D)
