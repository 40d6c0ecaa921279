"""What is checked and timed: attention and the operations on rows; the two lists of all cases.

A new kernel of ``triton_kernels/`` gets a function here and a line in ``small_cases`` and ``table_cases``.
Work is what the mathematics asks for, as in ``train/flops.py``: attention's backward is twice its forward, and a byte
is counted once for each tensor that must be read or written. Dims: T or R rows, N heads, K key heads, H head width.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu import head_cases, moves
from benchmarks.gpu.attention import Packed, Unavailable, packed_ways, reference, sdpa
from benchmarks.gpu.case import COMPILED_FLASH, FACTOR, FULL_WINDOWS, LIBRARY, Case, Key, Way, Work, compiled
from benchmarks.gpu.packs import PackClass
from benchmarks.gpu.peers import norms
from benchmarks.gpu.setting import Setting
from mimo_megatron import ops
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.loss.cross_entropy import token_losses
from mimo_megatron.parallel.mesh import Axis
from mimo_triton_kernels.causal_attention import causal_attention as causal_kernel
from mimo_triton_kernels.vision_attention import vision_attention, vision_attention_reference

WINDOW = 64
"""Patches of a window that no image border cuts."""


def small_cases(setting: Setting) -> list[Case]:
    """Odd sizes that take every path of every kernel, small enough for the definition in float64."""
    others = [head_cases.small_head(setting), *moves.small_moves(setting)]
    if setting.is_rehearsal:
        return [
            vision_case(setting, "windows", bounds_of((20, 4, 1, 9)), 1),
            vision_case(setting, "frames", bounds_of((5, 0, 66)), 1),
            text_case(setting, bounds_of((17, 70, 33)), 4, 1, 128),
            *others,
            *row_cases(setting, 37, 96, 136, 8, 1003),
        ]
    return [
        vision_case(setting, "windows", bounds_of((64, 16, 4, 1, 30, 33) * 20), 16),
        vision_case(setting, "frames", bounds_of((5, 0, 1370, 3, 610, 4096)), 16),
        text_case(setting, bounds_of((17, 700, 1, 2049)), 32, 8, 128),
        *others,
        *row_cases(setting, 1021, 4096, 11_008, 8, 151_680),
    ]


def table_cases(setting: Setting, packs: Sequence[PackClass]) -> list[Case]:
    """The sizes of training: full windows, then segments, windows and frames of real packs, rows as wide as the 7B
    model's. In the order in which they matter."""
    cases = []
    if (vision := packs[0].config.model.vision) is not None:
        bounds = bounds_of((WINDOW,) * setting.sizes.num_windows)
        cases.append(vision_case(setting, FULL_WINDOWS, bounds, vision.num_heads, vision.head_width))
    for one in packs:
        batch, model, slots = one.batches[0], one.config.model, one.config.data.pack_tokens
        if batch.vision is not None and model.vision is not None:
            heads, width = model.vision.num_heads, model.vision.head_width
            for what, bounds in (("windows", batch.vision.window_bounds), ("frames", batch.vision.frame_bounds)):
                key = (f"vision {what}", width, slots)
                cases.append(vision_case(setting, f"{what}, {one.name} pack", bounds, heads, width, key))
        text, name = model.text, f"segments, {one.name} pack"
        key = ("text causal", text.head_width, slots)
        cases.append(
            text_case(setting, batch.segment_bounds, text.num_heads, text.num_kv_heads, text.head_width, name, key)
        )
    return [*cases, *_row_cases_of(setting, packs[0].config.model), *moves.table_moves(setting, packs[0])]


def _row_cases_of(setting: Setting, model: ModelConfig) -> list[Case]:
    text, sizes = model.text, setting.sizes
    return row_cases(
        setting, sizes.table_rows, text.width, text.ffn_width, sizes.table_logit_rows, text.vocab_size, text.num_heads
    )


def bounds_of(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


# ---- attention -------------------------------------------------------------------------------------------------------


def vision_case(
    setting: Setting, name: str, bounds: tuple[int, ...], heads: int, width: int = 80, key: Key | None = None
) -> Case:
    """The encoder's attention from its QKV product, rotary turn included."""
    rows = bounds[-1]
    angles_TE = 3 * setting.normal(rows, width // 2, generator=setting.generator(), dtype=torch.float64)

    def turns(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        return angles_TE.cos().to(wide), angles_TE.sin().to(wide)

    cos_TE, sin_TE = turns(setting.dtype)

    def definition(qkv_T3NH: Tensor) -> Tensor:
        return vision_attention_reference(qkv_T3NH, *turns(qkv_T3NH.dtype), bounds)

    def turned(attend: Packed) -> Way:
        def run(qkv_T3NH: Tensor) -> Tensor:
            q, k, v = ops.turn_qk(qkv_T3NH, cos_TE.unsqueeze(1), sin_TE.unsqueeze(1))
            return attend(q, k, v, bounds, False)

        return run

    compiled_turn = compiled(setting, _plain_turn)

    def turned_by_compiler(attend: Packed) -> Way:
        def run(qkv_T3NH: Tensor) -> Tensor:
            q, k, v = qkv_T3NH.unbind(1)
            cos, sin = cos_TE.unsqueeze(1), sin_TE.unsqueeze(1)
            return attend(compiled_turn(q, cos, sin), compiled_turn(k, cos, sin), v, bounds, False)

        return run

    packed = packed_ways(setting.device, width, causal=False)
    flash = packed["varlen"] if isinstance(packed["flash-attn-2"], Unavailable) else packed["flash-attn-2"]
    peers = {way: attend if isinstance(attend, Unavailable) else turned(attend) for way, attend in packed.items()}
    ways = {
        "triton": lambda qkv_T3NH: vision_attention(qkv_T3NH, cos_TE, sin_TE, bounds),
        **peers,
        COMPILED_FLASH: flash if isinstance(flash, Unavailable) else turned_by_compiler(flash),
        "torch.compile of the turn, sdpa": turned_by_compiler(sdpa),
    }
    squares = sum((end - start) ** 2 for start, end in pairwise(bounds))
    return Case(
        "vision attention", f"{name}: {rows:,} rows in {len(bounds) - 1:,} segments, {heads} heads of {width}",
        lambda: [setting.normal(rows, 3, heads, width, generator=setting.generator())],
        definition, ways, {"triton": FACTOR, **LIBRARY}, "sdpa",
        _attention_work(setting, squares, heads, width, rows * heads * width, read=3, write=1), key, name,
    )  # fmt: skip


def text_case(
    setting: Setting,
    bounds: tuple[int, ...],
    heads: int,
    key_heads: int,
    width: int,
    name: str = "segments",
    key: Key | None = None,
) -> Case:
    """The decoder's causal attention after its rotary turn. Our kernel turns queries itself: here by an angle of 0,
    which takes it as long as any other."""
    rows = bounds[-1]
    cos_TE = torch.ones(rows, width // 2, device=setting.device)
    pieces = tuple((start, end, start, end) for start, end in pairwise(bounds))

    def draw() -> list[Tensor]:
        generator = setting.generator()
        return [setting.normal(rows, count, width, generator=generator) for count in (heads, key_heads, key_heads)]

    def way(attend: Packed) -> Way:
        return lambda q, k, v: attend(q, k, v, bounds, True)

    peers = {
        name: attend if isinstance(attend, Unavailable) else way(attend)
        for name, attend in packed_ways(setting.device, width, causal=True).items()
    }
    ways = {"triton": lambda q, k, v: causal_kernel(q, k, v, cos_TE, torch.zeros_like(cos_TE), pieces), **peers}
    squares = sum((end - start) ** 2 for start, end in pairwise(bounds)) / 2
    unit = rows * heads * width
    return Case(
        "text attention",
        f"{name}: {rows:,} rows in {len(bounds) - 1:,} segments, {heads} heads of {width} on {key_heads}",
        draw, way(reference), ways, {"triton": FACTOR, **LIBRARY}, "sdpa",
        _attention_work(setting, squares, heads, width, unit, read=1 + 2 * key_heads / heads, write=1), key, name,
    )  # fmt: skip


def _attention_work(
    setting: Setting, pairs: float, heads: int, width: int, unit: float, *, read: float, write: float
) -> Work:
    """Forward: inputs read, output written. Backward: inputs and the output's gradient read, theirs written."""
    flops = 4 * pairs * heads * width
    forward = (read + write) * unit * setting.dtype.itemsize
    backward = (2 * read + write) * unit * setting.dtype.itemsize
    return Work(flops, 3 * flops, forward, forward + backward)


# ---- row operations --------------------------------------------------------------------------------------------------


def row_cases(
    setting: Setting, rows: int, width: int, inner: int, logit_rows: int, vocabulary: int, heads: int = 4
) -> list[Case]:
    """Operations bound by memory: norm, gate, turn and cross entropy, as the model calls them."""
    return [
        _row_case(
            setting, "RMSNorm", (rows, width), lambda x, w: ops.rms_norm(x, w, 1e-5), _plain_norm, passes=(2, 5),
            weight=True,
            others={
                "torch": lambda x, w: functional.rms_norm(x, (width,), w, 1e-5),
                **norms(setting.device, setting.dtype, width, 1e-5),
            },
        ),
        _gate_case(setting, rows, inner),
        _turn_case(setting, rows, heads, 128),
        _loss_case(setting, logit_rows, vocabulary),
    ]  # fmt: skip


def _row_case(
    setting: Setting,
    op: str,
    shape: tuple[int, int],
    ours: Way,
    plain: Way,
    *,
    passes: tuple[float, float],
    weight: bool = False,
    others: Mapping[str, Way | Unavailable] = MappingProxyType({}),
) -> Case:
    """``passes``: over a tensor of ``shape``, of the forward and of both."""

    def draw() -> list[Tensor]:
        generator = setting.generator()
        drawn = [setting.normal(*shape, generator=generator)]
        return [*drawn, setting.normal(shape[-1], generator=generator)] if weight else drawn

    num_bytes = shape[0] * shape[1] * setting.dtype.itemsize
    ways = {"ops": ours, "eager": plain, "torch.compile": compiled(setting, plain), **others}
    return Case(
        op, " x ".join(f"{size:,}" for size in shape), draw, plain, ways, {"ops": FACTOR}, "eager",
        Work(0, 0, passes[0] * num_bytes, passes[1] * num_bytes),
    )  # fmt: skip


def _gate_case(setting: Setting, rows: int, inner: int) -> Case:
    """The encoder's. The decoder's is megatron's own, of ``torch.compile`` too."""

    def draw() -> list[Tensor]:
        generator = setting.generator()
        return [setting.normal(rows, inner, generator=generator) for _ in range(2)]

    num_bytes = rows * inner * setting.dtype.itemsize
    ways = {"ops": ops.gated, "eager": _plain_gated, "torch.compile": compiled(setting, _plain_gated)}
    return Case(
        "SwiGLU", f"{rows:,} x 2 x {inner:,}", draw, _plain_gated, ways, {"ops": FACTOR}, "eager",
        Work(0, 0, 3 * num_bytes, 8 * num_bytes),
    )  # fmt: skip


def _turn_case(setting: Setting, rows: int, heads: int, width: int) -> Case:
    angles = 3 * setting.normal(rows, 1, width // 2, generator=setting.generator(), dtype=torch.float64)

    def way(turn: Way) -> Way:
        def run(x_RNH: Tensor) -> Tensor:
            wide = torch.promote_types(x_RNH.dtype, torch.float32)
            cos, sin = (cos64, sin64) if wide == torch.float64 else (cos32, sin32)
            return turn(x_RNH, cos, sin)

        return run

    cos64, sin64 = angles.cos(), angles.sin()
    cos32, sin32 = cos64.float(), sin64.float()
    num_bytes = rows * heads * width * setting.dtype.itemsize
    ways = {"ops": way(ops.turn), "eager": way(_plain_turn), "torch.compile": way(compiled(setting, _plain_turn))}
    return Case(
        "rotary turn", f"{rows:,} x {heads} x {width}",
        lambda: [setting.normal(rows, heads, width, generator=setting.generator())],
        way(_plain_turn), ways, {"ops": FACTOR}, "eager", Work(0, 0, 2 * num_bytes, 4 * num_bytes),
    )  # fmt: skip


def _loss_case(setting: Setting, rows: int, vocabulary: int) -> Case:
    labels_R = torch.randint(0, vocabulary, (rows,), generator=setting.generator(), device=setting.device)

    def plain(logits_RV: Tensor) -> Tensor:
        wide = torch.promote_types(logits_RV.dtype, torch.float32)
        return functional.cross_entropy(logits_RV.to(wide), labels_R, reduction="none")

    num_bytes = rows * vocabulary * setting.dtype.itemsize
    ways = {
        "ops": lambda logits_RV: token_losses(logits_RV, labels_R, Axis(0, 1)),
        "eager": plain,
        "torch.compile": compiled(setting, plain),
    }
    return Case(
        "cross entropy", f"{rows:,} x {vocabulary:,}",
        lambda: [setting.normal(rows, vocabulary, generator=setting.generator())],
        plain, ways, {"ops": FACTOR}, "eager", Work(0, 0, num_bytes, 3 * num_bytes),
    )  # fmt: skip


def _plain_turn(x_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_H.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_H.dtype)


def _plain_norm(x_D: Tensor, weight_D: Tensor) -> Tensor:
    wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
    return (wide_D * torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + 1e-5)).to(x_D.dtype) * weight_D


def _plain_gated(gate_F: Tensor, up_F: Tensor) -> Tensor:
    return functional.silu(gate_F) * up_F
