"""The Qwen2.5-VL vision encoder over a whole pack of images and videos, in plain PyTorch.

Patches are permuted once, as bytes, into window order; the blocks then attend inside windows, or inside whole frames in
a few layers, and never across images. Invariants: features of an image do not depend on what else is in the pack;
parameters, values and gradients agree with transformers' encoder; float64 weights make everything float64 (the oracle).

Dims: P patches, C bytes of a patch, M merge units, D width, N heads, H head width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mimo_megatron.attention.packed import Backend, varlen_attention
from mimo_megatron.config.model import VisionConfig
from mimo_megatron.types import VisionLayout

# CLIP's pixel statistics, times 1e8: integers, so that casting a module to bfloat16 cannot round them.
PIXEL_MEAN_E8 = (48_145_466, 45_782_750, 40_821_073)
PIXEL_STD_E8 = (26_862_954, 26_130_258, 27_577_711)
INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistic in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_PD: Tensor) -> Tensor:
        wide = x_PD.to(torch.promote_types(x_PD.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x_PD.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: VisionConfig, backend: Backend) -> None:
        super().__init__()
        self.head_width, self.backend = config.head_width, backend
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_PD: Tensor, bounds: tuple[int, ...], cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        qkv_P3NH = self.qkv(x_PD).unflatten(-1, (3, -1, self.head_width))
        q_PNH, k_PNH = rotate(qkv_P3NH[:, :2], *cos_sin).unbind(1)
        out_PNH = varlen_attention(q_PNH, k_PNH, qkv_P3NH[:, 2], bounds, backend=self.backend)
        return self.proj(out_PNH.flatten(1))


class GatedMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width)
        self.up_proj = nn.Linear(config.width, config.ffn_width)
        self.down_proj = nn.Linear(config.ffn_width, config.width)

    def forward(self, x_PD: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x_PD)) * self.up_proj(x_PD))


class Block(nn.Module):
    def __init__(self, config: VisionConfig, backend: Backend) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config, backend)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x_PD: Tensor, bounds: tuple[int, ...], cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        x_PD = x_PD + self.attn(self.norm1(x_PD), bounds, cos_sin)
        return x_PD + self.mlp(self.norm2(x_PD))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig, *, backend: Backend = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_bytes, config.width, bias=False)
        self.blocks = nn.ModuleList(Block(config, backend) for _ in range(config.depth))
        for name, per_channel in (("pixel_mean_e8_C", PIXEL_MEAN_E8), ("pixel_std_e8_C", PIXEL_STD_E8)):
            values_per_channel = config.patch_bytes // config.in_channels
            self.register_buffer(
                name, torch.tensor(per_channel).repeat_interleave(values_per_channel), persistent=False
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, zero biases, unit norms, drawn from PyTorch's default generator."""
        reset_linear_and_norm(self)

    def forward(self, patches_PC: Tensor, layout: VisionLayout) -> Tensor:
        """hidden_PD in encoder order (units grouped by window) from the pack's uint8 patches in pack order."""
        order_M = layout.window_order_M.to(patches_PC.device, non_blocking=True)
        rope_hw_P2 = layout.rope_hw_P2.to(patches_PC.device, non_blocking=True)
        x_PD = self.patch_embed(self._normalized(self._in_window_order(patches_PC, order_M)))
        cos_sin = self._cos_sin(self._in_window_order(rope_hw_P2, order_M))
        for number, block in enumerate(self.blocks):
            is_full = number in self.config.full_attention_layers
            x_PD = block(x_PD, layout.frame_bounds if is_full else layout.window_bounds, cos_sin)
        return x_PD

    def _in_window_order(self, rows_P: Tensor, order_M: Tensor) -> Tensor:
        return rows_P.unflatten(0, (len(order_M), self.config.merge_factor))[order_M].flatten(0, 1)

    def _normalized(self, patches_PC: Tensor) -> Tensor:
        """(pixel / 255 - mean) / std in at least float32, then in the weights' dtype."""
        dtype = self.patch_embed.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        mean_C, std_C = (buffer.to(wide) / 1e8 for buffer in (self.pixel_mean_e8_C, self.pixel_std_e8_C))
        return patches_PC.to(wide).div_(255).sub_(mean_C).div_(std_C).to(dtype)

    def _cos_sin(self, rope_hw_P2: Tensor) -> tuple[Tensor, Tensor]:
        """Two [P, 1, 1, H / 2]: the first half of the angles turns with the row, the second with the column.

        Frequencies are float32 by definition, as those the released weights were trained with.
        """
        quarter = self.config.head_width // 4
        exponents = torch.arange(quarter, dtype=torch.float32, device=rope_hw_P2.device) / quarter
        frequencies = 1.0 / self.config.rope_theta**exponents
        wide = torch.promote_types(self.patch_embed.weight.dtype, torch.float32)
        angles = (rope_hw_P2[:, :, None].to(wide) * frequencies.to(wide)).flatten(1)[:, None, None]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each pair (i, i + H / 2) of its last dim turned by its angle, computed in the angles' dtype."""
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def reset_linear_and_norm(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=INIT_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, RMSNorm):
            nn.init.ones_(part.weight)
