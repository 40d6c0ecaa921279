"""A linear layer whose three products take FP8 operands, and the two ways to multiply them.

The *twin* rounds operands to FP8 and multiplies what they stand for in fp32 (fp64 where the layer is): the numbers of
an FP8 product with exact accumulation, on any machine. ``scaled_mm`` gives PyTorch the FP8 operands themselves. Sums
over tp and the bias are the caller's, outside of FP8.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimo_megatron.fp8.quantise import Quantised
from mimo_megatron.fp8.scaling import Scaling

Product = Callable[[Quantised, Quantised, torch.dtype], Tensor]
"""a [M, K], b [N, K], dtype -> a b^T [M, N]."""


def twin_product(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (a_MK.dequantised(wide) @ b_NK.dequantised(wide).t()).to(dtype)


ALIGNMENT = 16
"""Of what PyTorch's product sums over."""


def scaled_product(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype) -> Tensor:
    """With one scale for a tensor. Accumulated as exactly as the device can, in all three products."""
    assert a_MK.tile is None and b_NK.tile is None, "tiles are for Transformer Engine or the twin"
    return torch._scaled_mm(
        _padded(a_MK.values_MK),
        _padded(b_NK.values_MK).t(),
        a_MK.inverse,
        b_NK.inverse,
        out_dtype=dtype,
        use_fast_accum=False,
    )


def _padded(values_MK: Tensor) -> Tensor:
    """Rows in succession, with zeros behind K up to the alignment: patches come in any number."""
    missing = -values_MK.shape[1] % ALIGNMENT
    if not missing:
        return values_MK.contiguous()
    return nn.functional.pad(values_MK.view(torch.uint8), (0, missing)).view(values_MK.dtype)  # the byte 0 is 0.0


PRODUCTS: dict[Literal["twin", "scaled_mm"], Product] = {"twin": twin_product, "scaled_mm": scaled_product}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, scaling: Scaling, records: bool, product: Product) -> Tensor:
        x, w = scaling.forward_operands(x_TI, w_OI, records)
        ctx.scaling, ctx.product, ctx.dtypes = scaling, product, (x_TI.dtype, w_OI.dtype)
        ctx.tiles = x.transposed.tile, w.transposed.tile
        needs_x, needs_w = ctx.needs_input_grad[1], ctx.needs_input_grad[0]  # each for the other's gradient
        ctx.save_for_backward(
            *((x.transposed.values_MK, x.transposed.inverse) if needs_x else (None, None)),
            *((w.transposed.values_MK, w.transposed.inverse) if needs_w else (None, None)),
        )
        return product(x.as_it_stands, w.as_it_stands, x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (dy_TO,) = grads
        x_values, x_inverse, w_values, w_inverse = ctx.saved_tensors
        (of_x, of_w), (x_tile, w_tile) = ctx.dtypes, ctx.tiles
        dy = ctx.scaling.gradient(dy_TO)
        dx_TI = dw_OI = None
        if w_values is not None:
            dx_TI = ctx.product(dy.as_it_stands, Quantised(w_values, w_inverse, w_tile), of_x)
        if x_values is not None:
            dw_OI = ctx.product(dy.transposed, Quantised(x_values, x_inverse, x_tile), of_w)
        return dx_TI, dw_OI, None, None, None


def fp8_linear(x_TI: Tensor, w_OI: Tensor, scaling: Scaling, product: Product) -> Tensor:
    """[T, O]: x w^T and its gradients, with FP8 operands. A collective over the scaling's ranks, on the way back too.

    What is kept for the way back is in FP8. Without gradients nothing is recorded of the magnitudes.
    """
    return _Linear.apply(x_TI, w_OI, scaling, torch.is_grad_enabled(), product)


class Fp8Linear(nn.Linear):
    """PyTorch's linear layer, [..., I] -> [..., O], with FP8 products. The bias is added in the layer's dtype."""

    def __init__(self, inputs: int, outputs: int, *, scaling: Scaling, product: Product) -> None:
        super().__init__(inputs, outputs)
        self.scaling, self.product = scaling, product

    def forward(self, x: Tensor) -> Tensor:
        out_TO = fp8_linear(x.flatten(0, -2), self.weight, self.scaling, self.product)
        return out_TO.unflatten(0, x.shape[:-1]) + self.bias
