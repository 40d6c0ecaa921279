"""The Triton kernel of the decoder's attention, where it can run; refused by name where it cannot."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from mimo_megatron.attention.packed import Piece
from mimo_megatron.attention.vision_kernel import check_kernels_run

TextBackend = Literal["reference", "sdpa", "varlen", "flash", "triton"]
TextKernel = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Sequence[Piece]], Tensor]


def text_kernel() -> TextKernel:
    """out_TNH from q as projected, k turned already, v, the cosines and sines of q's angles, [T, 1, H / 2], and pieces.

    ConfigError where this machine cannot run Triton's kernels.
    """
    check_kernels_run("train.text_attention")
    from mimo_triton_kernels.causal_attention import causal_attention

    def attend(
        q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cos_sin: tuple[Tensor, Tensor], pieces: Sequence[Piece]
    ) -> Tensor:
        cos_TE, sin_TE = (angles_T1E.squeeze(1) for angles_T1E in cos_sin)
        numbers = tuple((piece.q_start, piece.q_end, piece.k_start, piece.k_end) for piece in pieces)
        return causal_attention(q_TNH, k_TKH, v_TKH, cos_TE, sin_TE, numbers)

    return attend
