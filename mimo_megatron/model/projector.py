"""From the vision encoder's hidden states to the text model's width: each 2x2 merge unit becomes one feature.

Invariant: features come out in pack order, that of the placeholders they replace.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.model.vision import Linear, RMSNorm, reset_linear_and_norm
from mimo_megatron.types import VisionLayout


class Projector(nn.Module):
    def __init__(self, vision: VisionConfig, out_width: int, *, linear: Linear = nn.Linear) -> None:
        super().__init__()
        merged_width = vision.width * vision.merge_factor
        self.norm = RMSNorm(vision.width, vision.norm_eps)
        self.fc1 = linear(merged_width, merged_width)
        self.fc2 = linear(merged_width, out_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, zero biases, unit norm, drawn from PyTorch's default generator."""
        reset_linear_and_norm(self)

    def forward(self, hidden_PD: Tensor, layout: VisionLayout) -> Tensor:
        """features_MD in pack order from hidden states in encoder order, whose units are four rows in succession."""
        order_M = layout.window_order_M.to(hidden_PD.device, non_blocking=True)
        units_MD = self.norm(hidden_PD).reshape(len(order_M), self.fc1.in_features)
        features_MD = self.fc2(gelu(self.fc1(units_MD)))
        return torch.empty_like(features_MD).index_copy(0, order_M, features_MD)
