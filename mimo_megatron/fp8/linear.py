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
"""Of what PyTorch's product sums over, and of the rows of its right operand."""


def scaled_product(a_MK: Quantised, b_NK: Quantised, dtype: torch.dtype) -> Tensor:
    """With one scale for a tensor. Accumulated as exactly as the device can, in all three products.

    Any sizes: operands have zeros behind, or get them, which the sums do not see and the result is cut by.
    """
    assert a_MK.tile is None and b_NK.tile is None, "tiles are for Transformer Engine or the twin"
    (rows, reduced), (columns, _) = a_MK.shape, b_NK.shape
    if not (rows and reduced and columns):
        return a_MK.values_MK.new_zeros(rows, columns, dtype=dtype)
    product = torch._scaled_mm(
        _aligned(a_MK.values_MK, rows=False)[:rows],
        _aligned(b_NK.values_MK, rows=True).t(),
        a_MK.inverse,
        b_NK.inverse,
        out_dtype=dtype,
        use_fast_accum=False,
    )
    return product[:, :columns].contiguous()


def _aligned(values_MK: Tensor, *, rows: bool) -> Tensor:
    """Rows in succession, with zeros behind K, and behind M where ``rows``, up to the alignment; itself if it is so."""
    below, behind = -values_MK.shape[0] % ALIGNMENT if rows else 0, -values_MK.shape[1] % ALIGNMENT
    if not (below or behind):
        return values_MK.contiguous()
    bytes_MK = nn.functional.pad(values_MK.view(torch.uint8), (0, behind, 0, below))  # the byte 0 is 0.0
    return bytes_MK.view(values_MK.dtype)


PRODUCTS: dict[Literal["twin", "scaled_mm"], Product] = {"twin": twin_product, "scaled_mm": scaled_product}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, scaling: Scaling, records: bool, product: Product) -> Tensor:
        needs_x, needs_w = (records and needed for needed in ctx.needs_input_grad[:2])
        x, w, w_scale = scaling.forward_operands(x_TI, w_OI, records=records, keeps_x=needs_w)
        assert x.as_it_stands is not None
        ctx.scaling, ctx.product, ctx.dtypes = scaling, product, (x_TI.dtype, w_OI.dtype)
        kept = x.transposed if needs_w else None
        ctx.x_shape, ctx.x_tile = (None, None) if kept is None else (kept.shape, kept.tile)
        # Each for the other's gradient. The weight itself, as any linear layer keeps it: it is rounded once more.
        ctx.save_for_backward(
            *((None, None) if kept is None else (kept.values_MK, kept.inverse)),
            *((w_OI, w_scale) if needs_x else (None, None)),
        )
        return product(x.as_it_stands, w, x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (dy_TO,) = grads
        x_values, x_inverse, w_OI, w_scale = ctx.saved_tensors
        of_x, of_w = ctx.dtypes
        dy = ctx.scaling.gradient(dy_TO, for_x=w_OI is not None, for_w=x_values is not None)
        dx_TI = dw_OI = None
        if w_OI is not None:
            dx_TI = ctx.product(dy.as_it_stands, ctx.scaling.transposed_weight(w_OI, w_scale), of_x)
        if x_values is not None:
            x = Quantised(x_values, x_inverse, ctx.x_shape, ctx.x_tile)
            dw_OI = ctx.product(dy.transposed, x, of_w)
        return dx_TI, dw_OI, None, None, None


def fp8_linear(x_TI: Tensor, w_OI: Tensor, scaling: Scaling, product: Product) -> Tensor:
    """[T, O]: x w^T and its gradients, with FP8 operands. A collective over the scaling's ranks, on the way back too.

    What is kept for the way back is x in FP8. Without gradients nothing is recorded of the magnitudes.
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
