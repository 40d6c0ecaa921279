"""One variant of the training step, measured: times, losses, memory, and the encoder alone.

Every pack is stepped on once to warm up (allocator, compiled kernels, heuristics), then as often as there is time; its
seconds are the median. MFU is model FLOPs by ``train/flops.py`` over the measured matrix product, and over the data
sheet.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.ceilings import sheet
from benchmarks.gpu.packs import PackClass, flops_of, grids_of
from benchmarks.gpu.profiling import top_kernels
from benchmarks.gpu.setting import Bench
from benchmarks.gpu.variants import Variant, losses_of_tokens
from mimo_megatron.planner.memory import rank_memory
from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.setting import Setting as PlannerSetting
from mimo_megatron.train.step import Trainer, local_packs, train_step
from mimo_megatron.types import PackedBatch

SECONDS_PER_VARIANT = 4.0
FEWEST_ROUNDS = 3
ENCODER_ROUNDS = 2


def step_row(trainer: Trainer, variant: Variant, bench: Bench) -> dict[str, Any]:
    """Tokens/s and MFU over the packs of the class, each with the median of its times; ``losses_R`` beside them."""
    setting, packs = bench.setting, variant.packs
    losses_R = losses_of_tokens(trainer, packs.batches[0])
    first = [train_step(trainer, [batch], 1, 1.0) for batch in packs.batches]
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[list[tuple[float, float]]] = [[] for _ in packs.batches]
    last_losses: list[float] = []
    began, rounds = time.perf_counter(), 0
    while not rounds or (
        setting.on_gpu and (rounds < FEWEST_ROUNDS or time.perf_counter() - began < SECONDS_PER_VARIANT)
    ):
        last_losses = []
        for own, batch in zip(times, packs.batches, strict=True):
            seconds, backward_seconds, loss = timed_step(trainer, batch, bench)
            own.append((seconds, backward_seconds))
            last_losses.append(loss)
        rounds += 1
    step_seconds = sum(statistics.median(seconds for seconds, _ in own) for own in times)
    backward_seconds = sum(statistics.median(seconds for _, seconds in own) for own in times)
    peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    vision_seconds = sum(encoder_seconds(trainer, batch, bench) for batch in packs.batches)
    return {
        "layers": variant.config.model.text.num_layers,
        "rounds": rounds,
        "step_seconds": step_seconds / len(times),
        "forward_backward_seconds": backward_seconds / len(times),
        "encoder_seconds": vision_seconds / len(times),
        "losses_R": losses_R,
        "first_losses": [one.loss for one in first],
        "first_gradient_norms": [one.grad_norm for one in first],
        "last_losses": last_losses,
        "planned_bytes": planned_bytes(variant, bench),
        "peak_bytes": peak if setting.on_gpu else None,
        **totals(packs, step_seconds, vision_seconds, bench),
    }


def totals(packs: PackClass, step_seconds: float, vision_seconds: float, bench: Bench) -> dict[str, Any]:
    """Rates over all packs of the class together: their tokens and FLOPs over their seconds."""
    counts = [flops_of(batch, packs.config.model) for batch in packs.batches]
    flops = {name: sum(count[name] for count in counts) for name in counts[0]}
    tokens = sum(batch.num_tokens for batch in packs.batches)
    ceiling = bench.ceilings["flops_per_second"]
    on_sheet = sheet(torch.cuda.get_device_name(0)) if bench.setting.on_gpu else {}
    rate = flops["total"] / step_seconds
    rest = flops["text"] / max(step_seconds - vision_seconds, 1e-9)
    return {
        "packs": len(packs.batches),
        "tokens": tokens,
        "patches": sum(batch.num_patches for batch in packs.batches),
        "images": sum(len(grids_of(batch)) for batch in packs.batches),
        "flops": flops,
        "tokens_per_second": tokens / step_seconds,
        "tflops": rate / 1e12,
        "mfu_of_gemm": rate / ceiling,
        "mfu_of_sheet": rate / on_sheet["flops_per_second"] if "flops_per_second" in on_sheet else None,
        "encoder_mfu_of_gemm": flops["vision"] / vision_seconds / ceiling if vision_seconds else None,
        "decoder_mfu_of_gemm": rest / ceiling,
    }


def timed_step(trainer: Trainer, batch: PackedBatch, bench: Bench) -> tuple[float, float, float]:
    """Seconds of the whole step and until its optimizer begins, and the loss. The pack starts on the host."""
    at_optimizer = 0.0

    def mark() -> None:
        nonlocal at_optimizer
        bench.setting.synchronize()
        at_optimizer = time.perf_counter()

    bench.setting.synchronize()
    began = time.perf_counter()
    result = train_step(trainer, [batch], 1, 1.0, mark)
    bench.setting.synchronize()
    return time.perf_counter() - began, at_optimizer - began, result.loss


def encoder_seconds(trainer: Trainer, batch: PackedBatch, bench: Bench) -> float:
    """Forward and backward of encoder and projector alone, on the same pack."""
    if batch.vision is None:
        return 0.0
    return statistics.median(total for total, _ in encoder_times(trainer, batch, bench))


def encoder_times(trainer: Trainer, batch: PackedBatch, bench: Bench) -> list[tuple[float, float]]:
    """Seconds of each pass: until it is done, and until the host has launched it."""
    encode = encoder_pass(trainer, batch)
    times = []
    for _ in range(ENCODER_ROUNDS if bench.setting.on_gpu else 1):
        bench.setting.synchronize()
        began = time.perf_counter()
        encode()
        launched = time.perf_counter() - began
        bench.setting.synchronize()
        times.append((time.perf_counter() - began, launched))
    trainer.chunks[0].zero_grad_buffer()
    return times


def encoder_pass(trainer: Trainer, batch: PackedBatch) -> Callable[[], None]:
    (model,) = trainer.bare_chunks
    pack = local_packs(trainer.config.model.text, trainer.mesh, [model], [batch])[0].to(trainer.device)

    def run() -> None:
        features_MD = model.encode(pack)
        features_MD.backward(torch.ones_like(features_MD))

    return run


def encoder_row(trainer: Trainer, variant: Variant, bench: Bench) -> dict[str, Any]:
    """Whether host or device is the limit of the encoder: its kernels' time together, and the host's to launch them.

    A device that waits for its host is busy for less time than the host takes; one that does not makes the host wait
    at the end of its queue, for no longer than itself.
    """
    batch = variant.packs.batches[0]
    host_seconds = statistics.median(launched for _, launched in encoder_times(trainer, batch, bench))
    watched = top_kernels(encoder_pass(trainer, batch), bench.setting)
    trainer.chunks[0].zero_grad_buffer()
    device_ms = watched["device_ms"]
    return {"class": variant.packs.name, "variant": variant.name, "host_ms": 1e3 * host_seconds, "device_ms": device_ms}


def planned_bytes(variant: Variant, bench: Bench) -> int:
    """What `mimo-megatron plan` counts for the worst of these packs, to compare with what is measured."""
    setting = PlannerSetting.of(variant.config, "cuda" if bench.setting.on_gpu else "cpu")
    batches = variant.packs.batches
    return max(rank_memory(variant.config, setting, 1, [shape_of(batch)], 0).total for batch in batches)


def shape_of(batch: PackedBatch) -> PackShape:
    return PackShape("real", batch.num_slots, tuple(batch.segment_lengths), grids_of(batch), batch.num_trained)


def release(bench: Bench) -> None:
    gc.collect()
    if bench.setting.on_gpu:
        torch.cuda.empty_cache()
