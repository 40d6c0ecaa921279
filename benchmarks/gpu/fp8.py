"""FP8 against bf16 in the linear layers of the 7B shape: the three products of a training step, without and with casts.

FP8 is E4M3 with one scale a tensor, through ``torch._scaled_mm``, which takes the left operand by rows and the right by
columns: the backward's products need transposed copies, which are part of the casts. Beside casts by torch.compile are
those of this package's kernels, as its layer has them: the weight is rounded twice, once for each of its products.
Transformer Engine's layer is timed too where it imports. Dims: R rows, I inputs, O outputs.
"""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import rounding
from benchmarks.gpu.case import compiled
from benchmarks.gpu.correctness import is_fatal
from benchmarks.gpu.kernels import rates
from benchmarks.gpu.setting import NO_TIME, Bench, Setting
from benchmarks.gpu.timing import measure, relative_error
from benchmarks.gpu.writing import Save
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.fp8.linear import scaled_product
from mimo_megatron.fp8.rounding import KernelRounding
from mimo_megatron.fp8.scaling import CurrentScaling
from mimo_megatron.parallel.mesh import ALONE
from mimo_triton_kernels.fp8_rounding import largest_magnitude, round_two_ways

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
PRODUCTS = ("forward", "input gradient", "weight gradient")


def section(bench: Bench, save: Save) -> None:
    model: ModelConfig = bench.kept["packs"][0].config.model
    for name, inputs, outputs in islice(linears(model), bench.setting.sizes.num_linears):
        if not bench.has_time_for("torch.compile"):
            save(skipped=[f"{name}: {NO_TIME}"])
            continue
        save(rows=[row(name, bench.setting.sizes.fp8_rows, inputs, outputs, bench)])


def linears(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(name, inputs, outputs) of the layers that hold nearly all weights."""
    text, vision = model.text, model.vision
    queries, keys = text.num_heads * text.head_width, text.num_kv_heads * text.head_width
    yield "decoder output", queries, text.width
    yield "decoder q, k, v", text.width, queries + 2 * keys
    yield "decoder gate and up", text.width, 2 * text.ffn_width
    yield "decoder down", text.ffn_width, text.width
    if vision is not None:
        yield "encoder q, k, v", vision.width, 3 * vision.width
        yield "encoder gate and up", vision.width, 2 * vision.ffn_width


def row(name: str, rows: int, inputs: int, outputs: int, bench: Bench) -> dict[str, Any]:
    setting = bench.setting
    generator = setting.generator()
    x_RI = setting.normal(rows, inputs, generator=generator)
    w_OI = setting.normal(outputs, inputs, generator=generator) * inputs**-0.5
    d_RO = setting.normal(rows, outputs, generator=generator)
    flops = 6 * rows * inputs * outputs

    def plain() -> tuple[Tensor, ...]:
        return x_RI @ w_OI.t(), d_RO @ w_OI, d_RO.t() @ x_RI

    timing = measure(plain, setting)
    found: dict[str, Any] = {
        "linear": name,
        "shape": [rows, inputs, outputs],
        "bf16": {**timing.row(), "tflops": flops / timing.seconds / 1e12},
    }
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "fp8": lambda: fp8_times(x_RI, w_OI, d_RO, flops, setting),
        "kernels": lambda: kernel_times(x_RI, w_OI, d_RO, flops, bench),
        "transformer_engine_fp8": lambda: engine_times(x_RI, w_OI, d_RO, flops, setting),
    }
    for way, run in ways.items():
        try:
            found[way] = run()
        except Exception as error:
            if is_fatal(error, setting.synchronize):
                raise
            found[way] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return found


def cast(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in FP8 by rows, its transpose by rows, and the factor that undoes the scaling."""
    scale = x.abs().amax().float().clamp(min=1e-12) / LARGEST
    scaled = (x.float() / scale).to(FP8)
    return scaled, scaled.t().contiguous(), scale


def kernel_times(x_RI: Tensor, w_OI: Tensor, d_RO: Tensor, flops: float, bench: Bench) -> dict[str, Any]:
    if not rounding.has_kernels(bench.setting):
        return {"absent": rounding.NO_FP8}
    scaling = CurrentScaling(FP8, FP8, ALONE, KernelRounding())
    out_dtype = torch.bfloat16

    def step() -> tuple[Tensor, ...]:
        x, w, w_scale = scaling.forward_operands(x_RI, w_OI, records=True, keeps_x=True)
        d = scaling.gradient(d_RO, for_x=True, for_w=True)
        assert x.as_it_stands and x.transposed and d.as_it_stands and d.transposed
        return (
            scaled_product(x.as_it_stands, w, out_dtype),
            scaled_product(d.as_it_stands, scaling.transposed_weight(w_OI, w_scale), out_dtype),
            scaled_product(d.transposed, x.transposed, out_dtype),
        )

    wide = (x_RI.float() @ w_OI.float().t(), d_RO.float() @ w_OI.float(), d_RO.float().t() @ x_RI.float())
    errors = [relative_error(got, want) for got, want in zip(step(), wide, strict=True)]
    timing, cast_it = measure(step, bench.setting), compiled(bench.setting, cast)
    num_bytes = x_RI.nbytes + 2 * x_RI.numel()
    compiled_cast = rates(measure(lambda: cast_it(x_RI), bench.setting), 0, num_bytes, bench.ceilings)
    return {
        "with_casts": {**timing.row(), "tflops": flops / timing.seconds / 1e12},
        "errors": dict(zip(PRODUCTS, errors, strict=True)),
        "rounding": {**rounding_times(x_RI, bench), "torch.compile, magnitude and both": compiled_cast},
    }


def rounding_times(x_MK: Tensor, bench: Bench) -> dict[str, Any]:
    """Milliseconds and bytes a second of each kernel, as a share of the copy's. Bytes: x once, and what is written."""
    scale, size, num_bytes = torch.ones((), device=x_MK.device), x_MK.numel(), x_MK.nbytes
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "largest magnitude": (lambda: largest_magnitude(x_MK), num_bytes),
        "both": (lambda: round_two_ways(x_MK, scale, FP8), num_bytes + 2 * size),
        "as it stands": (lambda: round_two_ways(x_MK, scale, FP8, transposed=False), num_bytes + size),
        "transposed": (lambda: round_two_ways(x_MK, scale, FP8, as_it_stands=False), num_bytes + size),
    }
    return {
        name: rates(measure(call, bench.setting), 0, moved, bench.ceilings) for name, (call, moved) in calls.items()
    }


def fp8_times(x_RI: Tensor, w_OI: Tensor, d_RO: Tensor, flops: float, setting: Setting) -> dict[str, Any]:
    cast_it = compiled(setting, cast)
    x, w, d = (cast_it(one) for one in (x_RI, w_OI, d_RO))

    def product(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
        # bf16 out in a rehearsal too: the product has no other half-wide output
        return torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=torch.bfloat16)

    def three(x: Any, w: Any, d: Any) -> tuple[Tensor, ...]:
        return (
            product(x[0], w[0].t(), x[2], w[2]),
            product(d[0], w[1].t(), d[2], w[2]),
            product(d[1], x[1].t(), d[2], x[2]),
        )

    wide = (x_RI.float() @ w_OI.float().t(), d_RO.float() @ w_OI.float(), d_RO.float().t() @ x_RI.float())
    errors = [relative_error(got, want) for got, want in zip(three(x, w, d), wide, strict=True)]
    products = measure(lambda: three(x, w, d), setting)
    with_casts = measure(lambda: three(*(cast_it(one) for one in (x_RI, w_OI, d_RO))), setting)
    return {
        "products": {**products.row(), "tflops": flops / products.seconds / 1e12},
        "with_casts": {**with_casts.row(), "tflops": flops / with_casts.seconds / 1e12},
        "errors": dict(zip(PRODUCTS, errors, strict=True)),
    }


def engine_times(x_RI: Tensor, w_OI: Tensor, d_RO: Tensor, flops: float, setting: Setting) -> dict[str, Any]:
    if not setting.on_gpu or importlib.util.find_spec("transformer_engine") is None:
        return {"absent": "not installed" if setting.on_gpu else "needs a GPU"}
    import transformer_engine.pytorch as engine

    layer = engine.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, params_dtype=x_RI.dtype, device=x_RI.device)
    x_RI = x_RI.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        with engine.fp8_autocast(enabled=True):
            out = layer(x_RI)
        return torch.autograd.grad(out, [x_RI, *layer.parameters()], d_RO)

    timing = measure(step, setting)
    return {"with_casts": {**timing.row(), "tflops": flops / timing.seconds / 1e12}}
