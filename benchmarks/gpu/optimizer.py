"""One step of AdamW on the parameters of a few layers: PyTorch's ways, and those of the libraries megatron takes.

Parameters, gradients and both moments are fp32, as megatron's optimizer holds them: 28 bytes of each parameter are read
or written in a step, which is what the rate is of.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.correctness import is_fatal
from benchmarks.gpu.peers import Unavailable
from benchmarks.gpu.setting import NO_TIME, Bench, Setting
from benchmarks.gpu.timing import measure, relative_error
from benchmarks.gpu.writing import Save
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import AdamName, OptimizerConfig
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore import adam

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
BYTES = 28
"""Of a parameter: it, its gradient and two moments are read, all but the gradient written, 4 bytes each."""
STEPS = 3
MOST_DIFFERENCE = 1e-4
"""Of what ``STEPS`` steps change: the order of operations rounds it otherwise."""
TRUSTED = "AdamW foreach"
RATE = 1e-3


def section(bench: Bench, save: Save) -> None:
    model: ModelConfig = bench.kept["packs"][0].config.model
    shapes = shapes_of(model, bench.setting.sizes.optimizer_layers)
    makers = ways(OptimizerConfig())
    want, _ = changed_by(makers[TRUSTED], shapes, bench.setting)
    trusted_ms = None
    for way, make in makers.items():
        found = row(way, make, shapes, want, bench)
        trusted_ms = found.get("ms") if way == TRUSTED else trusted_ms
        if trusted_ms and "ms" in found:
            found["times_as_fast"] = round(trusted_ms / found["ms"], 4)
        save(rows=[found])
        gc.collect()


def shapes_of(model: ModelConfig, num_layers: int) -> list[tuple[int, ...]]:
    """Of so many decoder layers, and as many of the encoder."""
    text, vision = model.text, model.vision
    queries, keys = text.num_heads * text.head_width, text.num_kv_heads * text.head_width
    layer: list[tuple[int, ...]] = [
        (text.width,), (queries + 2 * keys, text.width), (queries + 2 * keys,), (text.width, queries),
        (text.width,), (2 * text.ffn_width, text.width), (text.width, text.ffn_width),
    ]  # fmt: skip
    if vision is not None:
        width, inner = vision.width, vision.ffn_width
        layer += [
            (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (inner, width), (inner,),
            (inner, width), (inner,), (width, inner), (width,),
        ]  # fmt: skip
    return layer * num_layers


def ways(settings: OptimizerConfig) -> dict[str, MakeOptimizer | Unavailable]:
    """PyTorch's two; and those of ``mcore/adam.py`` that are others, or why they cannot be used here."""
    found: dict[str, MakeOptimizer | Unavailable] = {
        TRUSTED: lambda params: torch.optim.AdamW(params, foreach=True, **options(settings)),
        "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True, **options(settings)),
    }
    others: tuple[AdamName, ...] = ("transformer-engine", "apex")
    for name in others:
        try:
            adam.chosen(settings.model_copy(update={"implementation": name}))
            found[f"{name} FusedAdam"] = partial(_of_name, name, settings)
        except ConfigError as reason:
            found[f"{name} FusedAdam"] = Unavailable(str(reason))
    return found


def _of_name(name: AdamName, settings: OptimizerConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    return adam.make(name, [{"params": params}], RATE, settings)


def parameters(shapes: list[tuple[int, ...]], setting: Setting) -> list[Tensor]:
    """With their gradients, drawn from the seed."""
    generator = setting.generator()
    params = [0.02 * setting.normal(*shape, generator=generator, dtype=torch.float32) for shape in shapes]
    for param in params:
        param.requires_grad_().grad = setting.normal(*param.shape, generator=generator, dtype=torch.float32)
    return params


def options(settings: OptimizerConfig) -> dict[str, Any]:
    return {"lr": RATE, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}


def changed_by(
    make: MakeOptimizer | Unavailable, shapes: list[tuple[int, ...]], setting: Setting
) -> tuple[list[Tensor], Callable[[], Any]]:
    """What ``STEPS`` steps change of each parameter, and the call of one more step."""
    assert not isinstance(make, Unavailable)
    params = parameters(shapes, setting)
    before = [param.detach().clone() for param in params]
    step = make(params).step
    for _ in range(STEPS):
        step()
    return [param.detach() - old for param, old in zip(params, before, strict=True)], step


def row(
    way: str, make: MakeOptimizer | Unavailable, shapes: list[tuple[int, ...]], want: list[Tensor], bench: Bench
) -> dict[str, Any]:
    num_params = sum(torch.Size(shape).numel() for shape in shapes)
    head = {"way": way, "parameters": num_params, "tensors": len(shapes)}
    if isinstance(make, Unavailable):
        return {**head, "absent": str(make)}
    if bench.seconds_left() <= 0:
        return {**head, "absent": NO_TIME}
    try:
        got, step = changed_by(make, shapes, bench.setting)
        difference = max(relative_error(mine, theirs) for mine, theirs in zip(got, want, strict=True))
        if not difference <= MOST_DIFFERENCE:
            return {**head, "failed": f"what it changes is {difference:.2e} from that of {TRUSTED}"}
        timing = measure(step, bench.setting)
    except Exception as error:
        if is_fatal(error, bench.setting.synchronize):
            raise
        return {**head, "failed": f"{type(error).__name__}: {error}"[:500]}
    rate = BYTES * num_params / timing.seconds
    of_copy = round(rate / bench.ceilings["bytes_per_second"], 4)
    return {**head, **timing.row(), "difference": difference, "gbytes_per_second": rate / 1e9, "of_copy": of_copy}
