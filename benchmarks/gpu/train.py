"""A training step of the 7B shape at reduced depth on real packs: tokens/s, MFU, memory, and where the time goes.

The trainer is the one that ``mimo-megatron train`` builds from the recipe. Every pack is stepped on once to warm up
(allocator, compiled kernels, heuristics), then as often as there is time; its seconds are the median. MFU is model
FLOPs by ``train/flops.py`` over the measured matrix product, and over the data sheet. Depth is cut, so the head and the
encoder weigh more in these steps than in the whole model: their FLOPs stand apart.
"""

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.ceilings import sheet
from benchmarks.gpu.correctness import is_fatal
from benchmarks.gpu.packs import PackClass, flops_of, grids_of
from benchmarks.gpu.profiling import top_kernels
from benchmarks.gpu.setting import Bench
from benchmarks.gpu.writing import Save
from mimo_megatron.attention.vision_kernel import VisionBackend, vision_kernel
from mimo_megatron.config.run import Recompute, RunConfig
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.planner.memory import rank_memory
from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.setting import Setting as PlannerSetting
from mimo_megatron.train.step import Trainer, build_trainer, local_packs, train_step
from mimo_megatron.types import PackedBatch

LADDER: tuple[Recompute, ...] = ("none", "selective", "full")
"""What is tried, in order, until a step fits into the device's memory."""
ATTENTION: tuple[VisionBackend, ...] = ("sdpa", "triton")
SECONDS_PER_VARIANT = 8.0
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Variant:
    """How the packs of one class are trained on; the first of each class is profiled."""

    packs: PackClass
    recompute: Recompute
    attention: VisionBackend

    @property
    def name(self) -> str:
        return f"{self.packs.name}, vision attention {self.attention}, recompute {self.recompute}"


def section(bench: Bench, save: Save) -> None:
    with megatron(bench.kept["packs"][0].config.parallel, RankAddress(0, 1, 0, "")) as mesh:
        for packs in bench.kept["packs"]:
            for recompute in LADDER:
                found = try_class(packs, recompute, mesh, bench, save)
                release(bench)
                if found:
                    break


def try_class(packs: PackClass, recompute: Recompute, mesh: Mesh, bench: Bench, save: Save) -> bool:
    """Whether the steps fit into memory. Rows are saved as they come; an attempt that does not fit is one too."""
    config = with_recompute(packs.config, recompute)
    planned = planned_bytes(config, packs, bench)
    capacity = torch.cuda.get_device_properties(0).total_memory if bench.setting.on_gpu else None
    head = {"class": packs.name, "recompute": recompute, "planned_bytes": planned}
    if capacity and recompute != LADDER[-1] and planned > 1.15 * capacity:
        save(attempts=[{**head, "skipped": f"the planner counts more than the device's {capacity:,} bytes"}])
        return False
    try:
        began = time.perf_counter()
        trainer = build_trainer(config, mesh)
        bench.setting.synchronize()
        save(attempts=[{**head, "build_seconds": round(time.perf_counter() - began, 2)}])
        for attention in ATTENTION:
            save(rows=[attention_row(trainer, Variant(packs, recompute, attention), bench, planned)])
        set_attention(trainer, ATTENTION[0])
        batch = packs.batches[0]
        profile = top_kernels(lambda: train_step(trainer, [batch], 1, 1.0), bench.setting)
        save(profiles=[{"class": packs.name, "attention": ATTENTION[0], "recompute": recompute, **profile}])
    except torch.OutOfMemoryError as error:
        save(attempts=[{**head, "failed": f"out of memory: {error}"[:300]}])
        return False
    return True


def with_recompute(config: RunConfig, recompute: Recompute) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})


def set_attention(trainer: Trainer, attention: VisionBackend) -> None:
    """As ``train.vision_attention`` would have built the encoder, without drawing three billion weights again."""
    for model in trainer.bare_chunks:
        assert model.vision is not None
        for block in model.vision.blocks:
            block.attn.kernel = vision_kernel() if attention == "triton" else None


def attention_row(trainer: Trainer, variant: Variant, bench: Bench, planned: int) -> dict[str, Any]:
    """The variant's row; why it failed, where something else than memory did."""
    try:
        set_attention(trainer, variant.attention)
        return step_row(trainer, variant, bench, planned)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_fatal(error, bench.setting.synchronize):
            raise
        reason = f"{type(error).__name__}: {error}"[:500]
        return {"variant": variant.name, "class": variant.packs.name, "failed": reason}


def step_row(trainer: Trainer, variant: Variant, bench: Bench, planned: int) -> dict[str, Any]:
    """Tokens/s and MFU over the packs of the class, each with the median of its times."""
    setting, packs = bench.setting, variant.packs
    head = {"variant": variant.name, "class": packs.name, "attention": variant.attention}
    losses = [train_step(trainer, [batch], 1, 1.0).loss for batch in packs.batches]
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
        **head,
        "rounds": rounds,
        "step_seconds": step_seconds / len(times),
        "forward_backward_seconds": backward_seconds / len(times),
        "encoder_seconds": vision_seconds / len(times),
        "first_losses": losses,
        "last_losses": last_losses,
        "planned_bytes": planned,
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
    """Forward and backward of encoder and projector alone, on the same pack: the median of three."""
    if batch.vision is None:
        return 0.0
    (model,) = trainer.bare_chunks
    pack = local_packs(trainer.config.model.text, trainer.mesh, [model], [batch])[0].to(trainer.device)
    times = []
    for _ in range(3 if bench.setting.on_gpu else 1):
        bench.setting.synchronize()
        began = time.perf_counter()
        features_MD = model.encode(pack)
        features_MD.backward(torch.ones_like(features_MD))
        bench.setting.synchronize()
        times.append(time.perf_counter() - began)
        del features_MD
    trainer.chunks[0].zero_grad_buffer()
    return statistics.median(times)


def planned_bytes(config: RunConfig, packs: PackClass, bench: Bench) -> int:
    """What `mimo-megatron plan` counts for the worst of these packs, to compare with what is measured."""
    setting = PlannerSetting.of(config, "cuda" if bench.setting.on_gpu else "cpu")
    return max(rank_memory(config, setting, 1, [shape_of(batch)], 0).total for batch in packs.batches)


def shape_of(batch: PackedBatch) -> PackShape:
    return PackShape("real", batch.num_slots, tuple(batch.segment_lengths), grids_of(batch), batch.num_trained)


def release(bench: Bench) -> None:
    gc.collect()
    if bench.setting.on_gpu:
        torch.cuda.empty_cache()
