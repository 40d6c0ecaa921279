"""By what the operands of a linear layer are scaled: three rules behind one interface.

The scale of a tensor is that of the *whole* tensor - all slots of the microbatch, all rows of the weight - wherever its
parts lie: largest magnitudes are agreed over the ranks that share a microbatch and a layer (tp and cp). So a layout
changes no number. Tiles need no agreement: ``config/check_fp8.py`` refuses layouts that would cut one.

Dims: T rows of x (slots or patches, perhaps none on this rank), I, O inputs and outputs of the layer. Operands of the
three products: y = x w^T reduces I, dx = dy w reduces O, dw = dy^T x reduces T.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.fp8.quantise import ROW_TILE, SQUARE_TILE, Quantised, TwoWays, largest, quantise_tiles, scale_of
from mimo_megatron.fp8.rounding import TORCH, Rounding
from mimo_megatron.parallel.mesh import Axis

ACTIVATION, WEIGHT, GRADIENT = range(3)
NUM_OPERANDS = 3


class Operands(NamedTuple):
    """Of the forward product."""

    x: TwoWays
    w: Quantised
    w_scale: Tensor | None
    """By which the weight is rounded once more in the backward; None where that follows from the weight alone."""


class Scaling(Protocol):
    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, *, records: bool, keeps_x: bool) -> Operands:
        """``records`` is false where no step will come of it (evaluation). ``keeps_x``: x is wanted transposed too."""

    def transposed_weight(self, w_OI: Tensor, w_scale: Tensor | None) -> Quantised:
        """The weight of ``forward_operands``, with the same bits: it does not change between forward and backward."""

    def gradient(self, dy_TO: Tensor, *, for_x: bool, for_w: bool) -> TwoWays:
        """As it stands for the gradient of x, transposed for that of w."""


def shared_amax(tensors: list[Tensor], axis: Axis, rounding: Rounding = TORCH) -> Tensor:
    """float32 [len(tensors)]: the largest magnitude of each, over all ranks of ``axis``. One collective."""
    amax = torch.stack([rounding.amax(one) for one in tensors])
    if axis.size > 1:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=axis.group)
    return amax


class _OneScale:
    """What is rounded with one scale for a tensor, given each operand's."""

    of_forward: torch.dtype
    of_backward: torch.dtype
    rounding: Rounding

    def rounded(self, x_TI: Tensor, w_OI: Tensor, x_scale: Tensor, w_scale: Tensor, keeps_x: bool) -> Operands:
        x = self.rounding.quantised(x_TI, x_scale, self.of_forward, as_it_stands=True, transposed=keeps_x)
        w = self.rounding.quantised(w_OI, w_scale, self.of_forward, as_it_stands=True, transposed=False).as_it_stands
        assert w is not None
        return Operands(x, w, w_scale)

    def transposed_weight(self, w_OI: Tensor, w_scale: Tensor | None) -> Quantised:
        assert w_scale is not None
        w = self.rounding.quantised(w_OI, w_scale, self.of_forward, as_it_stands=False, transposed=True).transposed
        assert w is not None
        return w

    def rounded_gradient(self, dy_TO: Tensor, scale: Tensor, for_x: bool, for_w: bool) -> TwoWays:
        return self.rounding.quantised(dy_TO, scale, self.of_backward, as_it_stands=for_x, transposed=for_w)


class CurrentScaling(_OneScale):
    """One scale for a tensor, from the tensor itself (Transformer Engine's Float8CurrentScaling)."""

    def __init__(self, forward: torch.dtype, backward: torch.dtype, axis: Axis, rounding: Rounding = TORCH):
        self.of_forward, self.of_backward, self.axis, self.rounding = forward, backward, axis, rounding

    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, *, records: bool, keeps_x: bool) -> Operands:
        of_x, of_w = scale_of(shared_amax([x_TI, w_OI], self.axis, self.rounding), self.of_forward)
        return self.rounded(x_TI, w_OI, of_x, of_w, keeps_x)

    def gradient(self, dy_TO: Tensor, *, for_x: bool, for_w: bool) -> TwoWays:
        (scale,) = scale_of(shared_amax([dy_TO], self.axis, self.rounding), self.of_backward)
        return self.rounded_gradient(dy_TO, scale, for_x, for_w)


class BlockScaling:
    """Power-of-two scales for tiles: 1 x 128 of activations and gradients, along what is reduced, and 128 x 128 of
    weights (Float8BlockScaling). Both orientations are rounded from the numbers themselves, not one from the other."""

    def __init__(self, forward: torch.dtype, backward: torch.dtype):
        self.forward, self.backward = forward, backward

    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, *, records: bool, keeps_x: bool) -> Operands:
        x = _with_row_tiles(x_TI, self.forward, True, keeps_x)
        return Operands(x, quantise_tiles(w_OI, SQUARE_TILE, self.forward), None)

    def transposed_weight(self, w_OI: Tensor, w_scale: Tensor | None) -> Quantised:
        return quantise_tiles(w_OI, SQUARE_TILE, self.forward).transposed

    def gradient(self, dy_TO: Tensor, *, for_x: bool, for_w: bool) -> TwoWays:
        return _with_row_tiles(dy_TO, self.backward, for_x, for_w)


def _with_row_tiles(x: Tensor, dtype: torch.dtype, as_it_stands: bool, transposed: bool) -> TwoWays:
    return TwoWays(
        quantise_tiles(x, ROW_TILE, dtype) if as_it_stands else None,
        quantise_tiles(x.t(), ROW_TILE, dtype) if transposed else None,
    )


class DelayedScaling(_OneScale, torch.nn.Module):
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

    def __init__(
        self, forward: torch.dtype, backward: torch.dtype, history: int, margin: int, rounding: Rounding = TORCH
    ):
        super().__init__()
        self.of_forward, self.of_backward, self.rounding = forward, backward, rounding
        self.limits = tuple(largest(dtype) / 2**margin for dtype in (forward, forward, backward))
        self.register_buffer("history_H3", torch.zeros(history, NUM_OPERANDS), persistent=False)
        self.register_buffer("scale_3", torch.ones(NUM_OPERANDS), persistent=False)
        self.register_buffer("seen_3", torch.zeros(NUM_OPERANDS), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Buffers move with the model, and stay float32 where it is cast."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def forward_operands(self, x_TI: Tensor, w_OI: Tensor, *, records: bool, keeps_x: bool) -> Operands:
        if records:
            self._see(ACTIVATION, x_TI)
            self._see(WEIGHT, w_OI)
        return self.rounded(x_TI, w_OI, self.scale_3[ACTIVATION], self.scale_3[WEIGHT], keeps_x)

    def gradient(self, dy_TO: Tensor, *, for_x: bool, for_w: bool) -> TwoWays:
        self._see(GRADIENT, dy_TO)
        return self.rounded_gradient(dy_TO, self.scale_3[GRADIENT], for_x, for_w)

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
        seen.copy_(torch.maximum(seen, self.rounding.amax(x)))
