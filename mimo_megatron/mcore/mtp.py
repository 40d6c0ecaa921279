"""Multi-token prediction: layers after the decoder that predict the token after the next one, and so on.

Layer k sees, in slot i, the hidden state that layer k - 1 left there (the decoder's for k = 1) and the input embedding
of slot i + k, and predicts the token of slot i + k + 1 through the decoder's own head. The embeddings come from the
first pipeline stage, image features included, behind the hidden states (``TextDecoder``); megatron's own block would
embed token ids a second time on the last stage, where there are no image features. Source: DeepSeek-V3, section 2.2.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mimo_megatron.mcore.attention import PackParams
from mimo_megatron.mcore.layers import prediction_layer_spec


class PredictionLayers(MegatronModule):
    """``forward(hidden, ahead, params)``: the normed hidden states after every layer, each [S, 1, D] (S / tp under
    sequence parallelism), as ``hidden`` and every one of ``ahead`` are."""

    def __init__(self, config: TransformerConfig, num_layers: int, vp_stage: int | None):
        super().__init__(config)
        config = copy.copy(config)
        config.fp8 = None  # megatron would put these layers into Transformer Engine's FP8 with the others
        spec = prediction_layer_spec()
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.layers = torch.nn.ModuleList(
            spec.module(config, spec.submodules, layer_number=number + 1, vp_stage=vp_stage, pg_collection=groups)
            for number in range(num_layers)
        )

    def forward(self, hidden_S1D: Tensor, ahead: Sequence[Tensor], params: PackParams) -> list[Tensor]:
        found = []
        recomputes = self.config.recompute_granularity == "full" and self.training
        for layer, ahead_S1D in zip(self.layers, ahead, strict=True):
            run = functools.partial(_run, layer, params)
            if recomputes:
                hidden_S1D = tensor_parallel.checkpoint(run, False, hidden_S1D, ahead_S1D)
            else:
                hidden_S1D = run(hidden_S1D, ahead_S1D)
            found.append(hidden_S1D)
        return found

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's hook: a ModuleList has none of its own, and its tensors would pass for replicated ones."""
        sharded: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, MultiTokenPredictionLayer)
            sharded |= layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata)
        return sharded


def _run(layer: MultiTokenPredictionLayer, params: PackParams, hidden_S1D: Tensor, ahead_S1D: Tensor) -> Tensor:
    return layer._proj_and_transformer_layer(hidden_S1D, ahead_S1D, packed_seq_params=params)
