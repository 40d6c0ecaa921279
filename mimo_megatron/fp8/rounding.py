"""Largest magnitudes, and rounding with one scale: by PyTorch's operations, or by Triton kernels with the same bits."""

from typing import Protocol

import torch
from torch import Tensor

from mimo_megatron.errors import ConfigError
from mimo_megatron.fp8.quantise import Quantised, TwoWays, quantise


class Rounding(Protocol):
    def amax(self, x: Tensor) -> Tensor:
        """float32 scalar; 0 where there is nothing, NaN where one is."""

    def quantised(
        self, x_MK: Tensor, scale: Tensor, dtype: torch.dtype, *, as_it_stands: bool, transposed: bool
    ) -> TwoWays:
        """In the orientations that are asked for, of which there is one at least."""


class TorchRounding:
    """The definition. Several passes; the transposed is a view of what stands."""

    def amax(self, x: Tensor) -> Tensor:
        return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)

    def quantised(
        self, x_MK: Tensor, scale: Tensor, dtype: torch.dtype, *, as_it_stands: bool, transposed: bool
    ) -> TwoWays:
        found = quantise(x_MK, scale, dtype)
        return TwoWays(found if as_it_stands else None, found.transposed if transposed else None)


class KernelRounding:
    """``mimo_triton_kernels.fp8_rounding``: one read for a magnitude, one for both orientations, each with its rows in
    succession and zeros behind both dims, as the FP8 product of a GPU wants them. Not for float64."""

    def __init__(self) -> None:
        """``ConfigError`` where the kernels cannot run."""
        if reason := why_no_kernels():
            raise ConfigError(f"train.fp8.rounding=triton, and {reason}: set train.fp8.rounding=torch")
        from mimo_triton_kernels.fp8_rounding import largest_magnitude, round_two_ways

        self._largest_magnitude, self._round_two_ways = largest_magnitude, round_two_ways

    def amax(self, x: Tensor) -> Tensor:
        return self._largest_magnitude(x.detach().contiguous())

    def quantised(
        self, x_MK: Tensor, scale: Tensor, dtype: torch.dtype, *, as_it_stands: bool, transposed: bool
    ) -> TwoWays:
        stands, turned = self._round_two_ways(
            x_MK.detach().contiguous(), scale, dtype, as_it_stands=as_it_stands, transposed=transposed
        )
        inverse, (rows, columns) = scale.reciprocal(), x_MK.shape
        return TwoWays(
            None if stands is None else Quantised(stands, inverse, (rows, columns)),
            None if turned is None else Quantised(turned, inverse, (columns, rows)),
        )


TORCH = TorchRounding()


def why_no_kernels() -> str:
    """Empty where Triton's kernels run on this machine."""
    try:
        from mimo_triton_kernels import launching
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "triton is not installed (pip install 'mimo-megatron[kernels]')"
    return "" if launching.can_run() else "torch sees no GPU"
