"""Numbers in FP8: scales, tiles, rounding. By Transformer Engine's rules, so that what is proven here holds there.

``values = round(x * scale)``, to nearest even, saturated; ``x ~ values / scale``. A scale maps the largest magnitude of
what shares it onto the format's largest number. Sources: transformer_engine/common/recipe/recipe_common.cuh (a scale
from a largest magnitude), Float8BlockScaling (tiles of 128); DeepSeek-V3, section 3.3.

Dims: M, N rows, K reduced dim of a product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = 128
ROW_TILE, SQUARE_TILE = (1, TILE), (TILE, TILE)


@dataclass(frozen=True)
class Quantised:
    """A matrix in FP8, scaled for products that reduce its last dim."""

    values_MK: Tensor
    """float8, perhaps with zeros behind either dim."""
    inverse: Tensor
    """float32, 1 / scale: a scalar, or one for each tile, [M / tile rows, K / tile columns], rounded up."""
    shape: tuple[int, int]
    """(M, K), without what is behind."""
    tile: tuple[int, int] | None = None
    """Rows and columns that share a scale; None where all do."""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[M, K] in ``dtype``."""
        inverse = self.inverse if self.tile is None else spread(self.inverse, self.tile, self.shape)
        return self.values_MK[: self.shape[0], : self.shape[1]].to(dtype) * inverse

    @property
    def transposed(self) -> "Quantised":
        """[K, M]. Scaled for products that reduce M only where one scale, or square tiles, are shared."""
        assert self.tile is None or self.tile[0] == self.tile[1]
        inverse = self.inverse if self.tile is None else self.inverse.t()
        return Quantised(self.values_MK.t(), inverse, self.shape[::-1], self.tile)


@dataclass(frozen=True)
class TwoWays:
    """One operand for its two products: reduced along its columns as it stands, and along its rows, transposed. Each
    is None where it was not asked for."""

    as_it_stands: Quantised | None
    transposed: Quantised | None


def largest(dtype: torch.dtype) -> float:
    """The largest finite number: 448 of e4m3, 57344 of e5m2."""
    return torch.finfo(dtype).max


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """float32 scales from largest magnitudes: ``largest / amax``, or the power of two at or below it.

    1 where the magnitude is 0 or not finite; the largest float32 where the quotient overflows.
    """
    amax = amax.float()
    scale = torch.full_like(amax, largest(dtype)) / amax  # torch would turn number / tensor into two roundings
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = (scale.view(torch.int32) & ~0x7FFFFF).view(torch.float32)  # the mantissa's bits cleared
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def round_to(x_MK: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * scale`` in FP8. What exceeds the format becomes its largest number; NaN stays."""
    limit = largest(dtype)
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    return (x_MK.to(wide) * scale).clamp(-limit, limit).to(dtype)


def quantise(x_MK: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantised:
    """With one given scale."""
    rows, columns = x_MK.shape
    return Quantised(round_to(x_MK, scale, dtype), scale.reciprocal(), (rows, columns))


def quantise_tiles(x_MK: Tensor, tile: tuple[int, int], dtype: torch.dtype) -> Quantised:
    """With a power-of-two scale for each tile. Tiles at the end may be smaller."""
    scale, (rows, columns) = scale_of(tile_amax(x_MK, tile), dtype, power_of_two=True), x_MK.shape
    values_MK = round_to(x_MK, spread(scale, tile, (rows, columns)), dtype)
    return Quantised(values_MK, scale.reciprocal(), (rows, columns), tile)


def tile_amax(x_MK: Tensor, tile: tuple[int, int]) -> Tensor:
    """The largest magnitude of each tile, [M / rows, K / columns], rounded up."""
    (rows, columns), (num_rows, num_columns) = tile, x_MK.shape
    padded = torch.nn.functional.pad(x_MK.abs(), (0, -num_columns % columns, 0, -num_rows % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax(dim=(1, 3))


def spread(of_tiles: Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Every element's own, of ``shape``."""
    rows = of_tiles.repeat_interleave(tile[0], 0)[: shape[0]]
    return rows.repeat_interleave(tile[1], 1)[:, : shape[1]]
