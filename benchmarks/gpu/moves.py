"""Rows that only move: into window order before the encoder, out of it behind the projector, features among embeddings.

Nothing is computed, so a way can be as fast as the copy ceiling at best; what the model does now stands beside it, and
the gap is all that a kernel of our own could gain. Dims: P patches, M merge units, S slots, L vision tokens, D width.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import FACTOR, Case, Way, Work, compiled
from benchmarks.gpu.packs import PackClass
from benchmarks.gpu.setting import Setting
from mimo_megatron.model.vision import VisionEncoder
from mimo_megatron.model.vlm import splice

MERGED = 4
"""Patches of a merge unit."""


def small_moves(setting: Setting) -> list[Case]:
    """Of odd sizes; the last features are taken twice, as by samples that share an image."""
    num_units, width = (11, 24) if setting.is_rehearsal else (1021, 1280)
    order_M = torch.randperm(num_units, generator=setting.generator(), device=setting.device)
    slots_L = torch.randperm(2 * num_units, generator=setting.generator(), device=setting.device)[: num_units + 3]
    rows_L = torch.arange(num_units + 3, device=setting.device).clamp(max=num_units - 1)
    return [
        window_order(setting, order_M, width),
        pack_order(setting, order_M, width),
        spliced(setting, 2 * num_units, num_units, slots_L, rows_L, width),
    ]


def table_moves(setting: Setting, packs: PackClass) -> list[Case]:
    """Of the first pack of a class."""
    batch, model = packs.batches[0], packs.config.model
    if batch.vision is None or model.vision is None:
        return []
    order_M = batch.vision.window_order_M.to(setting.device)
    slots_L, rows_L = batch.splice_M.to(setting.device), batch.splice_rows_M.to(setting.device)
    width = model.text.width
    return [
        window_order(setting, order_M, model.vision.width),
        pack_order(setting, order_M, width),
        spliced(setting, batch.num_slots, len(order_M), slots_L, rows_L, width),
    ]


class _Permuted(torch.autograd.Function):
    """``x[order]``, whose gradient is a permutation too: no zero fill, no addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def window_order(setting: Setting, order_M: Tensor, width: int) -> Case:
    """Embedded patches [P, D] by merge units, before the first block."""
    encoder: Any = SimpleNamespace(config=SimpleNamespace(merge_factor=MERGED))
    inverse_M = order_M.argsort()

    def plain(x_PD: Tensor) -> Tensor:
        return x_PD.unflatten(0, (-1, MERGED))[order_M].flatten(0, 1)

    def permuted(x_PD: Tensor) -> Tensor:
        return _Permuted.apply(x_PD.unflatten(0, (-1, MERGED)), order_M, inverse_M).flatten(0, 1)

    model: Way = lambda x_PD: VisionEncoder._in_window_order(encoder, x_PD, order_M)  # noqa: E731
    return _move(setting, "window order", (MERGED * len(order_M), width), plain, model, permuted)


def pack_order(setting: Setting, order_M: Tensor, width: int) -> Case:
    """Features [M, D] as ``Projector.forward`` ends."""
    inverse_M = order_M.argsort()

    def model(x_MD: Tensor) -> Tensor:
        return torch.empty_like(x_MD).index_copy(0, order_M, x_MD)

    def permuted(x_MD: Tensor) -> Tensor:
        return _Permuted.apply(x_MD, inverse_M, order_M)

    return _move(setting, "pack order", (len(order_M), width), lambda x_MD: x_MD[inverse_M], model, permuted)


def _move(setting: Setting, op: str, shape: tuple[int, int], plain: Way, model: Way, permuted: Way) -> Case:
    num_bytes = shape[0] * shape[1] * setting.dtype.itemsize
    ways = {
        "model": model,
        "permutation, its inverse backwards": permuted,
        "eager": plain,
        "torch.compile": compiled(setting, plain),
    }
    return Case(
        op, " x ".join(f"{size:,}" for size in shape),
        lambda: [setting.normal(*shape, generator=setting.generator())],
        plain, ways, {"model": FACTOR}, "eager", Work(0, 0, 2 * num_bytes, 4 * num_bytes), name=op,
    )  # fmt: skip


def spliced(setting: Setting, num_slots: int, num_units: int, slots_L: Tensor, rows_L: Tensor, width: int) -> Case:
    """Features [M, D] into slots of the embeddings [S, 1, D]. Each slot is read once, from one of the two."""

    def draw() -> list[Tensor]:
        generator = setting.generator()
        hidden_S1D = setting.normal(num_slots, 1, width, generator=generator)
        return [hidden_S1D, setting.normal(num_units, width, generator=generator)]

    def plain(hidden_S1D: Tensor, features_MD: Tensor) -> Tensor:
        return hidden_S1D.index_copy(0, slots_L, features_MD[rows_L].unsqueeze(1))

    slots, units = (count * width * setting.dtype.itemsize for count in (num_slots, num_units))
    ways = {
        "model": lambda hidden_S1D, features_MD: splice(hidden_S1D, features_MD, slots_L, rows_L),
        "eager": plain,
        "torch.compile": compiled(setting, plain),
    }
    return Case(
        "splice", f"{len(slots_L):,} of {num_slots:,} x {width:,}", draw, plain, ways, {"model": FACTOR}, "eager",
        Work(0, 0, 2 * slots, 4 * slots + units), name="splice",
    )  # fmt: skip
