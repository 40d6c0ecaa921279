"""Keys and values of growing sequences, layer by layer, for generation one token at a time.

Dims: Q sequences, L slots of the cache, N query heads, K key-value heads, H head width. The prompt goes through the
packed path once (``remember``); after it every sequence adds one token a step (``attend``).
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class KVCache:
    """The cache of all layers of this rank. ``advance`` after each step's last layer."""

    def __init__(self, bounds: tuple[int, ...], num_new_tokens: int, device: torch.device):
        """``bounds`` are the prompts' cumulative lengths in their pack; each may grow by ``num_new_tokens``."""
        self._bounds = bounds
        self._prompt_lengths = [end - start for start, end in itertools.pairwise(bounds)]
        self._num_slots = max(self._prompt_lengths) + num_new_tokens
        self.lengths_Q = torch.tensor(self._prompt_lengths, device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def holds(self, layer: int) -> bool:
        return layer in self._layers

    def remember(self, layer: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Keep the prompts' keys and values, ``T`` the pack's slots."""
        shape = (len(self._prompt_lengths), self._num_slots, *k_TKH.shape[1:])
        k_QLKH, v_QLKH = k_TKH.new_zeros(shape), v_TKH.new_zeros(shape)
        for row, (start, length) in enumerate(zip(self._bounds[:-1], self._prompt_lengths, strict=True)):
            k_QLKH[row, :length] = k_TKH[start : start + length]
            v_QLKH[row, :length] = v_TKH[start : start + length]
        self._layers[layer] = k_QLKH, v_QLKH

    def attend(self, layer: int, q_QNH: Tensor, k_QKH: Tensor, v_QKH: Tensor) -> Tensor:
        """[Q, N, H]: each sequence's new token attends to all its tokens, the new one included."""
        k_QLKH, v_QLKH = self._layers[layer]
        rows_Q = torch.arange(len(q_QNH), device=q_QNH.device)
        k_QLKH[rows_Q, self.lengths_Q], v_QLKH[rows_Q, self.lengths_Q] = k_QKH, v_QKH
        is_seen_QL = torch.arange(self._num_slots, device=q_QNH.device) <= self.lengths_Q[:, None]
        out_QN1H = scaled_dot_product_attention(
            q_QNH.unsqueeze(2),
            k_QLKH.transpose(1, 2),
            v_QLKH.transpose(1, 2),
            attn_mask=is_seen_QL[:, None, None],
            enable_gqa=True,
        )
        return out_QN1H.squeeze(2)

    def advance(self) -> None:
        self.lengths_Q = self.lengths_Q + 1
