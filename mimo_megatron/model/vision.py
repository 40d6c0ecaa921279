"""The Qwen2.5-VL vision encoder over a whole pack of images and videos, in plain PyTorch.

Embedded patches are permuted once, into window order; the blocks then attend inside windows, or inside whole frames in
a few layers, and never across images. Invariants: features of an image do not depend on what else is in the pack;
parameters, values and gradients agree with transformers' encoder; float64 weights make everything float64 (the oracle).

Dims: P patches, C values of a patch, Y bytes of pixels, M merge units, D width, N heads, H head width.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimo_megatron.attention.packed import Backend, varlen_attention
from mimo_megatron.attention.vision_kernel import VisionBackend, vision_kernel
from mimo_megatron.config.model import VisionConfig
from mimo_megatron.model.patch_embed import PatchEmbedding
from mimo_megatron.offload import ActivationOffload
from mimo_megatron.ops import gated, rms_norm, turn_qk
from mimo_megatron.types import VisionLayout

INIT_STD = 0.02
Linear = Callable[[int, int], nn.Linear]
"""Makes a linear layer of so many inputs and outputs."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistic in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_PD: Tensor) -> Tensor:
        return rms_norm(x_PD, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig, backend: VisionBackend, linear: Linear = nn.Linear) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.kernel = vision_kernel() if backend == "triton" else None
        self.backend: Backend = "sdpa" if backend == "triton" else backend
        self.qkv = linear(config.width, 3 * config.width)
        self.proj = linear(config.width, config.width)

    def forward(self, x_PD: Tensor, bounds: tuple[int, ...], cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        qkv_P3NH = self.qkv(x_PD).unflatten(-1, (3, -1, self.head_width))
        if self.kernel is not None:
            cos_PE, sin_PE = (angles_P1E.squeeze(1) for angles_P1E in cos_sin)
            return self.proj(self.kernel(qkv_P3NH, cos_PE, sin_PE, bounds).flatten(1))
        q_PNH, k_PNH, v_PNH = turn_qk(qkv_P3NH, *cos_sin)
        out_PNH = varlen_attention(q_PNH, k_PNH, v_PNH, bounds, backend=self.backend)
        return self.proj(out_PNH.flatten(1))


class GatedMLP(nn.Module):
    def __init__(self, config: VisionConfig, linear: Linear) -> None:
        super().__init__()
        self.gate_proj = linear(config.width, config.ffn_width)
        self.up_proj = linear(config.width, config.ffn_width)
        self.down_proj = linear(config.ffn_width, config.width)

    def forward(self, x_PD: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x_PD), self.up_proj(x_PD)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig, backend: VisionBackend, linear: Linear) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config, backend, linear)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config, linear)

    def forward(self, x_PD: Tensor, bounds: tuple[int, ...], cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        x_PD = x_PD + self.attn(self.norm1(x_PD), bounds, cos_sin)
        return x_PD + self.mlp(self.norm2(x_PD))


class VisionEncoder(nn.Module):
    """``recompute``: the blocks are computed again in the backward pass, so that only their inputs are kept. With
    ``offload``, what they keep waits on the host. ``linear`` makes their linear layers.

    ConfigError where ``backend`` is "triton" and this machine cannot run Triton's kernels.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        backend: VisionBackend = "sdpa",
        recompute: bool = False,
        linear: Linear = nn.Linear,
        offload: ActivationOffload | None = None,
    ) -> None:
        super().__init__()
        self.config, self.recompute, self.offload = config, recompute, offload
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, backend, linear) for _ in range(config.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, zero biases, unit norms, drawn from PyTorch's default generator."""
        reset_linear_and_norm(self)

    def forward(self, pixels_Y: Tensor, layout: VisionLayout) -> Tensor:
        """hidden_PD in encoder order (units grouped by window) from the pack's uint8 pixels in pack order.

        Whole patches, [P, 1176], may come as such where the layout has no stills.
        """
        order_M = layout.window_order_M.to(pixels_Y.device, non_blocking=True)
        rope_hw_P2 = layout.rope_hw_P2.to(pixels_Y.device, non_blocking=True)
        x_PD = self._in_window_order(self.patch_embed(pixels_Y.flatten(), layout.pixel_runs), order_M)
        cos_sin = self._cos_sin(self._in_window_order(rope_hw_P2, order_M))
        with self.offload.over(self, *cos_sin) if self.offload is not None else nullcontext():
            for number, block in enumerate(self.blocks):
                if self.offload is not None:
                    self.offload.next_layer()
                is_full = number in self.config.full_attention_layers
                bounds = layout.frame_bounds if is_full else layout.window_bounds
                if self.recompute and self.training and torch.is_grad_enabled():
                    x_PD = checkpoint(block, x_PD, bounds, cos_sin, use_reentrant=False)
                else:
                    x_PD = block(x_PD, bounds, cos_sin)
        return x_PD

    def _in_window_order(self, rows_P: Tensor, order_M: Tensor) -> Tensor:
        return rows_P.unflatten(0, (len(order_M), self.config.merge_factor)).index_select(0, order_M).flatten(0, 1)

    def _cos_sin(self, rope_hw_P2: Tensor) -> tuple[Tensor, Tensor]:
        """Two [P, 1, H / 2]: the first half of the angles turns with the row, the second with the column.

        Frequencies are float32 by definition, as those the released weights were trained with.
        """
        quarter = self.config.head_width // 4
        exponents = torch.arange(quarter, dtype=torch.float32, device=rope_hw_P2.device) / quarter
        frequencies = 1.0 / self.config.rope_theta**exponents
        wide = torch.promote_types(self.patch_embed.weight.dtype, torch.float32)
        angles = (rope_hw_P2[:, :, None].to(wide) * frequencies.to(wide)).flatten(1)[:, None]
        return angles.cos(), angles.sin()


def reset_linear_and_norm(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=INIT_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbedding):
            nn.init.normal_(part.weight, std=INIT_STD)
        elif isinstance(part, RMSNorm):
            nn.init.ones_(part.weight)
