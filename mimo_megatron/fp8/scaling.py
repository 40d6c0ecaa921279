"""By what the operands of a linear layer are scaled: three rules behind one interface.

The scale of a tensor is that of the *whole* tensor - all slots of the microbatch, all rows of the weight - wherever its
parts lie: largest magnitudes are agreed over the ranks that share a microbatch and a layer (tp and cp). So a layout
changes no number. Tiles need no agreement: ``config/check_fp8.py`` refuses layouts that would cut one.

Dims: T rows of x (slots or patches, perhaps none on this rank), I, O inputs and outputs of the layer. Operands of the
three products: y = x w^T reduces I, dx = dy w reduces O, dw = dy^T x reduces T.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.fp8.quantise import ROW_TILE, SQUARE_TILE, Quantised, largest, quantise, quantise_tiles, scale_of
from mimo_megatron.parallel.mesh import Axis

ACTIVATION, WEIGHT, GRADIENT = range(3)
NUM_OPERANDS = 3


@dataclass(frozen=True)
class TwoWays:
    """One operand for its two products: reduced along its columns as it stands, and along its rows, transposed."""

    as_it_stands: Quantised
    transposed: Quantised


class Scaling(Protocol):
    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, records: bool) -> tuple[TwoWays, TwoWays]:
        """x and w. ``records`` is false where no step will come of it (evaluation)."""

    def gradient(self, dy_TO: Tensor) -> TwoWays: ...


def shared_amax(tensors: list[Tensor], axis: Axis) -> Tensor:
    """float32 [len(tensors)]: the largest magnitude of each, over all ranks of ``axis``. One collective."""
    amax = torch.stack([_amax(one) for one in tensors])
    if axis.size > 1:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=axis.group)
    return amax


def _amax(x: Tensor) -> Tensor:
    """float32; 0 where there is nothing."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def _with_one_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> TwoWays:
    quantised = quantise(x, scale, dtype)
    return TwoWays(quantised, quantised.transposed)


class CurrentScaling:
    """One scale for a tensor, from the tensor itself (Transformer Engine's Float8CurrentScaling)."""

    def __init__(self, forward: torch.dtype, backward: torch.dtype, axis: Axis):
        self.forward, self.backward, self.axis = forward, backward, axis

    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, records: bool) -> tuple[TwoWays, TwoWays]:
        of_x, of_w = scale_of(shared_amax([x_TI, w_OI], self.axis), self.forward)
        return _with_one_scale(x_TI, of_x, self.forward), _with_one_scale(w_OI, of_w, self.forward)

    def gradient(self, dy_TO: Tensor) -> TwoWays:
        (scale,) = scale_of(shared_amax([dy_TO], self.axis), self.backward)
        return _with_one_scale(dy_TO, scale, self.backward)


class BlockScaling:
    """Power-of-two scales for tiles: 1 x 128 of activations and gradients, along what is reduced, and 128 x 128 of
    weights (Float8BlockScaling). Both orientations are rounded from the numbers themselves, not one from the other."""

    def __init__(self, forward: torch.dtype, backward: torch.dtype):
        self.forward, self.backward = forward, backward

    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, records: bool) -> tuple[TwoWays, TwoWays]:
        weight = quantise_tiles(w_OI, SQUARE_TILE, self.forward)
        return _with_row_tiles(x_TI, self.forward), TwoWays(weight, weight.transposed)

    def gradient(self, dy_TO: Tensor) -> TwoWays:
        return _with_row_tiles(dy_TO, self.backward)


def _with_row_tiles(x: Tensor, dtype: torch.dtype) -> TwoWays:
    return TwoWays(quantise_tiles(x, ROW_TILE, dtype), quantise_tiles(x.t(), ROW_TILE, dtype))


class DelayedScaling(torch.nn.Module):
    """One scale for a tensor, from its largest magnitudes in earlier steps (DelayedScaling with ``max``).

    A step's magnitudes are gathered in ``seen_3`` over its microbatches - taking a maximum, recomputation counts
    nothing twice - and become history in ``end_step``, once all ranks' are known. Transformer Engine does that after
    every microbatch of a rank, so that its scales depend on how packs are dealt to ranks. The buffers are no part of
    the model's state: ``mcore/fp8.py`` saves them beside it.
    """

    history_H3: Tensor
    """Largest magnitudes of activation, weight and gradient, the newest step first; 0 where there was none."""
    scale_3: Tensor
    """For the step in progress; 1 at first."""
    seen_3: Tensor
    """Largest magnitudes of the step in progress, on this rank."""

    def __init__(self, forward: torch.dtype, backward: torch.dtype, history: int, margin: int):
        super().__init__()
        self.dtypes = (forward, forward, backward)
        self.limits = tuple(largest(dtype) / 2**margin for dtype in self.dtypes)
        self.register_buffer("history_H3", torch.zeros(history, NUM_OPERANDS), persistent=False)
        self.register_buffer("scale_3", torch.ones(NUM_OPERANDS), persistent=False)
        self.register_buffer("seen_3", torch.zeros(NUM_OPERANDS), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Buffers move with the model, and stay float32 where it is cast."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, records: bool) -> tuple[TwoWays, TwoWays]:
        if records:
            self._see(ACTIVATION, x_TI)
            self._see(WEIGHT, w_OI)
        return self._quantise(ACTIVATION, x_TI), self._quantise(WEIGHT, w_OI)

    def gradient(self, dy_TO: Tensor) -> TwoWays:
        self._see(GRADIENT, dy_TO)
        return self._quantise(GRADIENT, dy_TO)

    def end_step(self, seen_3: Tensor) -> None:
        """``seen_3`` of all ranks that share the layer becomes history; the next step's scales follow from it.

        A magnitude that is 0 or not finite leaves its scale as it is.
        """
        self.history_H3.copy_(torch.cat((seen_3.unsqueeze(0), self.history_H3[:-1])))
        amax_3 = self.history_H3.amax(0)
        scale_3 = (amax_3.new_tensor(self.limits) / amax_3).clamp(max=torch.finfo(torch.float32).max)
        self.scale_3.copy_(torch.where((amax_3 > 0) & amax_3.isfinite(), scale_3, self.scale_3))
        self.seen_3.zero_()

    def _see(self, operand: int, x: Tensor) -> None:
        seen = self.seen_3[operand]
        seen.copy_(torch.maximum(seen, _amax(x)))

    def _quantise(self, operand: int, x: Tensor) -> TwoWays:
        return _with_one_scale(x, self.scale_3[operand], self.dtypes[operand])
