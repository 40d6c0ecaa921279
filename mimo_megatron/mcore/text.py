"""The decoder: megatron's GPTModel with packed attention and a head that sees only the slots it is asked about."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mimo_megatron import platform
from mimo_megatron.attention.packed import Backend
from mimo_megatron.attention.text_kernel import TextBackend, text_kernel
from mimo_megatron.attention.vision_kernel import VisionBackend
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.model import TextConfig
from mimo_megatron.config.run import HeadLoss, Offload, ParallelConfig, Recompute
from mimo_megatron.loss.chunk_softmax import chunk_softmax
from mimo_megatron.loss.implicit_logits import Chunking, ImplicitLogits
from mimo_megatron.mcore.attention import PackParams
from mimo_megatron.mcore.layers import block_spec, uses_engine
from mimo_megatron.mcore.mtp import PredictionLayers
from mimo_megatron.mcore.overlap import gathered
from mimo_megatron.offload import ActivationOffload
from mimo_megatron.parallel import zigzag
from mimo_megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class Numerics:
    """The dtype of parameters and activations, and what is computed again in the backward pass to save memory."""

    dtype: torch.dtype = torch.float32
    recompute: Recompute = "none"
    recompute_vision: bool = False
    offload: Offload = "none"
    """Whose layers' activations wait on the host for the backward pass."""
    fp32_head: bool = False
    """Logits are computed in at least fp32: a policy is compared with an engine by its log-probabilities."""
    vision_attention: VisionBackend = "sdpa"
    text_attention: TextBackend = "sdpa"
    head_loss: HeadLoss = "logits"
    """Unless it is that, the head gives implicit logits, of which at most ``head_logits`` exist at a time."""
    head_logits: int = 2**27
    fp8: Fp8Config | None = None
    """Of the linear layers of its ``parts``."""

    @property
    def decoder_fp8(self) -> Fp8Config | None:
        return self.fp8 if self.fp8 and "text" in self.fp8.parts else None


def _leave_uninitialised(weight: Tensor) -> None:
    """Megatron still marks the tensor's parallel dim, which its gradient norm relies on."""


def transformer_config(text: TextConfig, parallel: ParallelConfig, numerics: Numerics) -> TransformerConfig:
    """Megatron's configuration of the decoder. Fusions that need CUDA are on exactly where there is CUDA."""
    on_cpu = platform.current().is_cpu
    return TransformerConfig(
        num_layers=text.num_layers,
        hidden_size=text.width,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        kv_channels=text.head_width,
        ffn_hidden_size=text.ffn_width,
        normalization="RMSNorm",
        layernorm_epsilon=text.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        pipeline_model_parallel_layout=_stages(parallel.layers_of_stages(text.num_layers)) if parallel.pp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=numerics.dtype,
        params_dtype=numerics.dtype,
        bf16=numerics.dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        init_method=_leave_uninitialised,  # weights are drawn by name (mcore/weights.py) or loaded
        output_layer_init_method=_leave_uninitialised,
        use_cpu_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=not on_cpu,
        use_te_activation_func=on_cpu,  # the layer spec's activation, which is ours there
        bias_dropout_fusion=not on_cpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=not on_cpu,
        deallocate_pipeline_outputs=True,
        **_RECOMPUTE[numerics.recompute],
        **(_engine_fp8(fp8) if (fp8 := numerics.decoder_fp8) and uses_engine(fp8) else {}),
    )


def _engine_fp8(fp8: Fp8Config) -> dict[str, Any]:
    """Megatron's switches of Transformer Engine's FP8. Written by its documentation; never run on a GPU."""
    recipes = {"current": "tensorwise", "delayed": "delayed", "blockwise": "blockwise"}
    return dict(
        fp8=fp8.number_format,
        fp8_recipe=recipes[fp8.scaling],
        fp8_amax_history_len=fp8.history,
        fp8_amax_compute_algo="max",
        fp8_margin=fp8.margin,
        first_last_layers_bf16=fp8.first_layers + fp8.last_layers > 0,
        num_layers_at_start_in_bf16=fp8.first_layers,
        num_layers_at_end_in_bf16=fp8.last_layers,
    )


_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _stages(num_layers: Sequence[int]) -> list[list[str]]:
    """Megatron's description of a pipeline: what each stage holds, in order."""
    stages = [["decoder"] * layers for layers in num_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def rotary_cos_sin(text: TextConfig, positions_3T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two [T, 1, H / 2]: the first ``mrope_section[0]`` pairs of a head turn with time, the next with height and width.

    Angles are float32 by definition, as those the released weights were trained with.
    """
    pairs = text.head_width // 2
    exponents = torch.arange(pairs, dtype=torch.float32, device=positions_3T.device) / pairs
    parts = (1.0 / text.rope_theta**exponents).split(list(text.mrope_section))
    axes = positions_3T.to(torch.float32).unsqueeze(-1)
    angles = torch.cat([axis_T1 * part for axis_T1, part in zip(axes, parts, strict=True)], dim=-1).unsqueeze(1)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


class RewardHead(torch.nn.Module):
    """``forward(hidden [R, D])``: one fp32 number for each row, [R, 1]. Whole on every tp rank, which all compute the
    same, so that its gradient is complete on each."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, width, dtype=dtype))

    def forward(self, hidden_RD: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        """``weight`` is what megatron's head takes when it is tied; here it never is."""
        assert weight is None
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        return torch.nn.functional.linear(hidden_RD.to(wide), self.weight.to(wide)), None


class TextDecoder(GPTModel):
    """One stage of the decoder; see ``embed`` and ``decode``. ``chunk`` counts the stages of this pipeline rank.

    What travels between stages is a *stream*: the hidden states, and behind them, along dim 0, the embeddings that the
    multi-token-prediction layers of the last stage will need.

    ConfigError where ``numerics`` ask for Triton kernels and this machine cannot run Triton's kernels.
    """

    def __init__(
        self,
        text: TextConfig,
        config: TransformerConfig,
        mesh: Mesh,
        chunk: int = 0,
        *,
        numerics: Numerics,
        offload: ActivationOffload | None = None,
    ):
        stages_of_rank = config.virtual_pipeline_model_parallel_size
        vp_stage = chunk if stages_of_rank else None
        super().__init__(
            config,
            block_spec(config, vp_stage, numerics.decoder_fp8),
            vocab_size=text.vocab_size,
            max_sequence_length=text.max_positions,
            pre_process=mesh.is_first_stage and chunk == 0,
            post_process=mesh.is_last_stage and chunk == (stages_of_rank or 1) - 1,
            share_embeddings_and_output_weights=text.ties_head,
            position_embedding_type="none",  # core attention turns queries and keys (``rotary_cos_sin``)
            scatter_embedding_sequence_parallel=False,  # image features are spliced into the whole slice first
            vp_stage=vp_stage,
        )
        self.text_config = text
        self.numerics = numerics
        self.kernel = text_kernel() if numerics.text_attention == "triton" else None
        self.backend: Backend = "sdpa" if numerics.text_attention == "triton" else numerics.text_attention
        self.mtp: PredictionLayers | None = None
        self.chunking: Chunking | None = None
        self._received: Tensor | None = None
        if self.post_process and text.head == "reward":
            self.output_layer = RewardHead(text.width, config.params_dtype)
        elif self.post_process:
            # The head sees gathered rows, so it must not gather again under sequence parallelism, and must sum its
            # input gradient over tp itself.
            head: Any = self.output_layer
            head.sequence_parallel, head.allreduce_dgrad = False, mesh.tp.size > 1
            if text.num_mtp_layers:
                self.mtp = PredictionLayers(config, text.num_mtp_layers, vp_stage)
            if numerics.head_loss != "logits":
                kernels = chunk_softmax("triton" if numerics.head_loss == "triton" else "torch")
                self.chunking = Chunking(numerics.head_logits, kernels)

        self.offload = offload
        if offload is not None:
            for layer in (*self.decoder.layers, *(self.mtp.layers if self.mtp is not None else ())):
                layer.register_forward_pre_hook(offload.next_layer)

    def embed(self, token_ids_S: Tensor) -> Tensor:
        """[S, 1, D] embeddings of this rank's slots, whole on every tp rank."""
        return self.embedding(input_ids=token_ids_S.unsqueeze(0), position_ids=None)

    def decode(
        self, stream: Tensor | None, positions_3S: Tensor, params: PackParams, rows: Sequence[Tensor]
    ) -> Tensor | ImplicitLogits:
        """The stream, each part [S, 1, D], on inner stages; the head's [R + R1 + ..., V / tp] (explicit or
        implicit) or [R, 1] on the last.

        ``rows`` are the local slots whose logits are wanted: of the decoder, then of each prediction layer that the
        stream has a part for. ``positions_3S`` are those of the whole pack. ``stream`` is None where the schedule has
        set this stage's input.
        """
        ranges = zigzag.local_ranges(positions_3S.shape[1], params.cp.rank, params.cp.size)
        local_positions_3S = torch.cat([positions_3S[:, start:end] for start, end in ranges], dim=1)
        cos_sin = rotary_cos_sin(self.text_config, local_positions_3S, self.config.params_dtype)
        received = () if stream is not None or self._received is None else (self._received,)
        stream = self._received if stream is None else stream
        assert stream is not None, "megatron's schedule sets the input of inner stages"
        hidden_S1D, *ahead = stream.chunk(len(rows))
        params = replace(params, cos_sin=cos_sin, kernel=self.kernel, backend=self.backend)
        self.decoder.set_input_tensor(hidden_S1D)
        # What inner stages receive stays: the schedule holds it until its gradient is sent.
        with self.offload.over(self, *cos_sin, *received) if self.offload is not None else nullcontext():
            hidden_S1D = self.decoder(hidden_S1D, attention_mask=None, packed_seq_params=params)
            layers = [hidden_S1D]
            if self.mtp is not None and ahead:
                layers += self.mtp(hidden_S1D, ahead, params)
        if not self.post_process:
            return torch.cat([hidden_S1D, *ahead]) if ahead else hidden_S1D
        return self._logits(layers, rows)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Megatron's schedule hands over what the stage before has sent; see ``decode``."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _logits(self, layers: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor | ImplicitLogits:
        """All rows of all layers through the head at once."""
        if self.config.sequence_parallel:
            layers = [
                tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
                for hidden in layers
            ]
        found = [hidden.squeeze(1).index_select(0, rows_R) for hidden, rows_R in zip(layers, rows, strict=True)]
        hidden_RD = torch.cat(found) if len(found) > 1 else found[0]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if self.chunking is not None or self.numerics.fp32_head:  # which read it themselves
            weight = gathered(self.output_layer.weight if weight is None else weight)
        if self.numerics.fp32_head:
            hidden_RD = hidden_RD.to(torch.promote_types(hidden_RD.dtype, torch.float32))
        if self.chunking is not None:
            assert weight is not None
            return ImplicitLogits(hidden_RD, weight, self.chunking)
        if self.numerics.fp32_head:
            assert weight is not None
            weight = weight.to(hidden_RD.dtype)
        logits_RV, _bias = self.output_layer(hidden_RD, weight=weight)
        return logits_RV
