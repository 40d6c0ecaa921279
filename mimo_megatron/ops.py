"""Row operations whose gradient is written by hand: RMSNorm, SwiGLU and the rotary turn.

Autograd's graph of the same expressions makes up to twice as many passes over the rows and keeps more of them. On the
CPU they are plain torch calls. On a GPU, where each such call is a pass over memory, ``torch.compile`` makes one kernel
of an expression, and the norm is torch's own. Invariants: values and gradients are those of the plain expressions; what
is computed in at least float32 is float64 for float64 inputs; inputs and saved tensors are never written to.

Dims: the last one is written D (width), F (gate or up), 2F (both side by side) or H (head width); the others are rows.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x): out = n w, d_x = (d_out w - n mean(d_out w n)) / rms(x), d_w = sum(d_out n)."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
        inverse_rms_1 = torch.linalg.vector_norm(wide_D, dim=-1, keepdim=True).square_()
        inverse_rms_1 = inverse_rms_1.div_(x_D.shape[-1]).add_(eps).rsqrt_()
        normed_D = wide_D * inverse_rms_1
        ctx.save_for_backward(normed_D, inverse_rms_1, weight_D)
        return normed_D.to(x_D.dtype) * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_D: Tensor) -> tuple[Tensor, Tensor, None]:
        normed_D, inverse_rms_1, weight_D = ctx.saved_tensors
        wide_D, wide_weight_D = d_out_D.to(normed_D.dtype), weight_D.to(normed_D.dtype)
        d_weight_D = wide_D * normed_D
        along_1 = (d_weight_D @ wide_weight_D).div_(len(weight_D)).unsqueeze(-1)
        d_x_D = torch.addcmul(wide_D * wide_weight_D, normed_D, along_1, value=-1).mul_(inverse_rms_1)
        return d_x_D.to(d_out_D.dtype), d_weight_D.flatten(0, -2).sum(0).to(weight_D.dtype), None


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, the statistic in at least float32.

    Forward + backward on a CPU core: 5,760 rows 128 wide 2.3 ms, against 4.3 ms for the plain expression and 4.1 ms for
    ``torch.nn.functional.rms_norm``; 3,840 rows 256 wide 4.0 ms, against 6.6 and 6.4 ms. On a GPU torch's, which is one
    kernel each way there and keeps x instead of x / rms(x) in fp32 (docs/optimizer.md); not timed by us.
    """
    return torchs_rms_norm(x_D, weight_D, eps) if x_D.is_cuda else _RMSNorm.apply(x_D, weight_D, eps)


def torchs_rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As ``rms_norm``; multiplied by the weight before it is rounded to x's dtype, not after."""
    return torch.nn.functional.rms_norm(x_D, weight_D.shape, weight_D, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_2F: Tensor) -> Tensor:
        gate_F, up_F = x_2F.chunk(2, dim=-1)
        activated_F = silu(gate_F)
        ctx.save_for_backward(x_2F, activated_F)
        return activated_F * up_F

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_F: Tensor) -> Tensor:
        x_2F, activated_F = ctx.saved_tensors
        gate_F, up_F = x_2F.chunk(2, dim=-1)
        d_x_2F = torch.empty_like(x_2F)
        d_gate_F, d_up_F = d_x_2F.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(d_out_F * up_F, gate_F, grad_input=d_gate_F)
        torch.mul(d_out_F, activated_F, out=d_up_F)
        return d_x_2F


def swiglu(x_2F: Tensor) -> Tensor:
    """silu(gate) * up, where the last dim holds the gate's half, then that of up.

    Both halves of the gradient are written in place instead of joined: forward + backward of 3,840 rows of 2 x 704 take
    15.8 ms on a CPU core, against 21.4 ms in megatron's own expression, which also keeps a third more.
    """
    return _SwiGLU.apply(x_2F)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_F: Tensor, up_F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_F, up_F)
        return _gated_kernel(gate_F, up_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_F: Tensor) -> tuple[Tensor, Tensor]:
        return _gated_gradient_kernel(d_out_F, *ctx.saved_tensors)


def gated(gate_F: Tensor, up_F: Tensor) -> Tensor:
    """silu(gate) * up. On a GPU silu(gate) is not kept."""
    return _Gated.apply(gate_F, up_F) if is_compiled(gate_F) else silu(gate_F) * up_F


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_H, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_H: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(d_out_H, cos, -sin), None, None


def turn(x_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each pair (i, i + H / 2) of the last dim turned by its angle; ``cos`` and ``sin`` are H / 2 wide.

    Computes in the angles' dtype. Forward + backward of 3,840 rows of 4 x 64: 5.3 ms on a CPU core, against 9.3 ms in
    megatron's own expression, which joins halves and takes the cosines anew in every layer.
    """
    return _Turn.apply(x_H, cos, sin)


class _TurnQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_P3NH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        q_PNH, k_PNH, v_PNH = qkv_P3NH.unbind(1)
        return _turned(q_PNH, cos, sin), _turned(k_PNH, cos, sin), v_PNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q_PNH: Tensor, d_k_PNH: Tensor, d_v_PNH: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if is_compiled(d_q_PNH):
            return _qkv_gradient_kernel(d_q_PNH, d_k_PNH, d_v_PNH, cos, -sin), None, None
        d_qkv_P3NH = d_q_PNH.new_empty(len(d_q_PNH), 3, *d_q_PNH.shape[1:])
        _turn_into(d_qkv_P3NH[:, 0], d_q_PNH, cos, -sin)
        _turn_into(d_qkv_P3NH[:, 1], d_k_PNH, cos, -sin)
        d_qkv_P3NH[:, 2] = d_v_PNH
        return d_qkv_P3NH, None, None


def turn_qk(qkv_P3NH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [P, N, H] of P rows, q and k turned.

    The gradient of qkv is written once instead of summed from zero-filled slices: forward + backward of 5,760 rows of
    3 x 4 x 32 takes 11 ms on a CPU core, against 17 ms.
    """
    q_PNH, k_PNH, v_PNH = _TurnQK.apply(qkv_P3NH, cos, sin)
    return q_PNH, k_PNH, v_PNH


def _turned(x_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A new tensor, without gradient: for the functions that write theirs by hand."""
    if is_compiled(x_H):
        return _turn_kernel(x_H, cos, sin)
    return _turn_into(x_H.new_empty(x_H.shape), x_H, cos, sin)


def _turn_into(out_H: Tensor, x_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``out_H``, overwritten."""
    first, second = x_H.to(cos.dtype).chunk(2, dim=-1)
    out_first, out_second = out_H.chunk(2, dim=-1)
    torch.addcmul(first * cos, second, sin, value=-1, out=out_first)
    torch.addcmul(second * cos, first, sin, out=out_second)
    return out_H


# ---- what is compiled on a GPU ---------------------------------------------------------------------------------------


def is_compiled(x: Tensor) -> bool:
    """Whether expressions over ``x`` are compiled into kernels."""
    return x.is_cuda


def _kernel(expression: Callable[..., Any]) -> Callable[..., Any]:
    """``expression`` by ``torch.compile``, for each width and dtype once, whatever the number of rows."""
    compiled = cache(lambda: torch.compile(expression, dynamic=False))  # torch loads its compiler here, on a CPU never

    @wraps(expression)
    def run(*tensors: Tensor) -> Any:
        tensors = tuple(tensor.detach() for tensor in tensors)  # or forward and backward would be compiled apart
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled()(*tensors)

    return run


@_kernel
def _turn_kernel(x_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn_expression(x_H, cos, sin)


@_kernel
def _qkv_gradient_kernel(d_q_PNH: Tensor, d_k_PNH: Tensor, d_v_PNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d_q_PNH, d_k_PNH = (_turn_expression(x, cos, sin) for x in (d_q_PNH, d_k_PNH))
    return torch.stack((d_q_PNH, d_k_PNH, d_v_PNH), 1)


def _turn_expression(x_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_H.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_H.dtype)


@_kernel
def _gated_kernel(gate_F: Tensor, up_F: Tensor) -> Tensor:
    return silu(gate_F) * up_F


@_kernel
def _gated_gradient_kernel(d_out_F: Tensor, gate_F: Tensor, up_F: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(d_out_F * up_F, gate_F), d_out_F * silu(gate_F)
