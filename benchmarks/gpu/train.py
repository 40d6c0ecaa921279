"""Training steps of the 7B shape at reduced depth on real packs: tokens/s, MFU, memory, and where the time goes.

The trainer is the one that ``mimo-megatron train`` builds from the recipe. Of the first class of packs a baseline, each
change by itself, the best of them together, the same on packs of text alone, and with FP8; of the others baseline and
best. Depth is cut, so the head and the encoder weigh more in these steps than in the whole model: their FLOPs stand
apart. A variant that computes something else than the baseline is marked, and is not counted in any target.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.correctness import is_fatal
from benchmarks.gpu.packs import PackClass
from benchmarks.gpu.profiling import top_kernels
from benchmarks.gpu.setting import NO_TIME, Bench
from benchmarks.gpu.steps import encoder_row, planned_bytes, release, step_row
from benchmarks.gpu.variants import (
    BASELINE,
    SINGLE,
    Start,
    Variant,
    Ways,
    best_of,
    can_be_put_into,
    differences,
    noise_of,
    put_into,
    why_wrong,
)
from benchmarks.gpu.writing import Save
from mimo_megatron.config.run import Recompute
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.train.step import Trainer, build_trainer, train_step

LADDER: tuple[Recompute, ...] = ("none", "selective", "full")
"""What is tried, in order, until a step fits into the device's memory."""
RESERVED_SECONDS = 80.0
"""For what comes behind the single changes: together, text alone, FP8, the other classes."""


def section(bench: Bench, save: Save) -> None:
    first, *others = bench.kept["packs"]
    with megatron(first.config.parallel, RankAddress(0, 1, 0, "")) as mesh:
        best, needed = BASELINE, 0.0
        for packs in (first, *others):
            for recompute in LADDER:
                bed = Bed(packs, recompute, mesh, bench, save)
                if packs is not first and bench.seconds_left() < needed:
                    bed.leave_out(BASELINE, best)
                    break
                began = time.perf_counter()
                fits = bed.fits()
                needed = max(needed, time.perf_counter() - began)
                if fits:
                    best = compare(bed, bench.kept["text packs"]) if packs is first else check_again(bed, best)
                    bed.close()
                    break
                bed.close()


def compare(bed: "Bed", text: PackClass) -> Ways:
    """All variants of a class, in order of value; what was best without FP8."""
    bed.look_into(BASELINE)
    for ways in SINGLE:
        bed.measure(ways, reserved=RESERVED_SECONDS)
    best = best_of(bed.rows)
    bed.measure(best)
    if best != BASELINE:
        bed.look_into(best)
    bed.measure(best, packs=text)
    bed.measure(replace(best, fp8="scaled_mm in all parts"))
    for ways in (best, BASELINE):
        bed.measure(replace(ways, fp8="scaled_mm"))
    bed.measure(replace(best, fp8="transformer-engine"))
    return best


def check_again(bed: "Bed", best: Ways) -> Ways:
    bed.measure(best)
    return best


class Bed:
    """One class of packs with one kind of recomputation, and the trainer that its variants take turns in."""

    def __init__(self, packs: PackClass, recompute: Recompute, mesh: Mesh, bench: Bench, save: Save) -> None:
        self.packs, self.recompute, self.mesh, self.bench, self.save = packs, recompute, mesh, bench, save
        self.rows: list[dict[str, Any]] = []
        """Of this class, with what a row holds for comparison only."""
        self._trainer: Trainer | None = None
        self._start: Start | None = None
        self._seconds = 0.0

    def fits(self) -> bool:
        """Whether the baseline's steps fit into memory, after which they are measured. An attempt is a row; so is a
        baseline that fails of something else, without which the other variants are measured still."""
        variant = Variant(self.packs, self.recompute, BASELINE)
        planned = planned_bytes(variant, self.bench)
        capacity = torch.cuda.get_device_properties(0).total_memory if self.bench.setting.on_gpu else None
        head = {"class": self.packs.name, "recompute": self.recompute, "planned_bytes": planned}
        if capacity and self.recompute != LADDER[-1] and planned > 1.15 * capacity:
            reason = f"the planner counts more than the device's {capacity:,} bytes"
            self.save(attempts=[{**head, "skipped": reason}])
            return False
        try:
            self._keep(variant, self._row(variant))
        except torch.OutOfMemoryError as error:
            self.save(attempts=[{**head, "failed": f"out of memory: {error}"[:300]}])
            return False
        except Exception as error:
            self._keep(variant, self._failure(error))
        return True

    def measure(self, ways: Ways, packs: PackClass | None = None, reserved: float = 0.0) -> None:
        """A row, whatever happens, unless there is one: measured, with the reason it failed, or for want of time."""
        variant = Variant(packs or self.packs, self.recompute, ways)
        if any(row["variant"] == variant.name for row in self.rows):
            return
        if self.bench.seconds_left() < max(1.3 * self._seconds, reserved):
            self._keep(variant, {"skipped": NO_TIME})
            return
        try:
            row = self._row(variant)
        except Exception as error:
            row = self._failure(error)
        release(self.bench)  # behind the handler, which keeps alive what the failed step held
        self._keep(variant, row)

    def leave_out(self, *all_ways: Ways) -> None:
        """A trainer takes longer to build than is left: rows that say so, instead of a section that is ended."""
        for ways in dict.fromkeys(all_ways):
            self._keep(Variant(self.packs, self.recompute, ways), {"skipped": NO_TIME})

    def look_into(self, ways: Ways) -> None:
        """Where the time of a measured variant goes: its kernels, and the encoder's host. A profiler that cannot run is
        a row."""
        variant = Variant(self.packs, self.recompute, ways)
        measured = any(row["variant"] == variant.name and "step_seconds" in row for row in self.rows)
        if not measured or self.bench.seconds_left() < self._seconds:
            return
        head = {"class": self.packs.name, "variant": variant.name, "recompute": self.recompute}
        try:
            trainer, batch = self._built(variant), self.packs.batches[0]
            profile = top_kernels(lambda: train_step(trainer, [batch], 1, 1.0), self.bench.setting)
            self.save(profiles=[{**head, **profile}])
            if batch.vision is not None:
                self.save(encoder=[encoder_row(trainer, variant, self.bench)])
        except Exception as error:
            self.save(profiles=[{**head, **self._failure(error)}])

    def close(self) -> None:
        self._trainer = self._start = None
        release(self.bench)

    def _failure(self, error: Exception) -> dict[str, Any]:
        """To be kept as a row; an error that the device does not survive is raised again."""
        if is_fatal(error, self.bench.setting.synchronize):
            raise error
        return {"failed": f"{type(error).__name__}: {error}"[:500]}

    def _row(self, variant: Variant) -> dict[str, Any]:
        began = time.perf_counter()
        row = step_row(self._built(variant), variant, self.bench)
        self._seconds = time.perf_counter() - began
        return row

    def _built(self, variant: Variant) -> Trainer:
        """The trainer of ``variant``, with the seed's weights and no history."""
        config = variant.config
        if self._trainer is not None and can_be_put_into(self._trainer, config):
            assert self._start is not None
            self._trainer = put_into(self._trainer, config)
            self._start.restore(self._trainer)
            return self._trainer
        self.close()
        began = time.perf_counter()
        self._trainer = build_trainer(config, self.mesh)
        self._start = Start(self._trainer)
        self.bench.setting.synchronize()
        head = {"class": self.packs.name, "recompute": self.recompute, "ways": variant.ways.name}
        self.save(attempts=[{**head, "build_seconds": round(time.perf_counter() - began, 2)}])
        return self._trainer

    def _keep(self, variant: Variant, row: dict[str, Any]) -> None:
        head = {"variant": variant.name, "class": variant.packs.name, "recompute": self.recompute}
        row = {**head, "ways": dict(vars(variant.ways)), **row}
        baseline = next((one for one in self.rows if "step_seconds" in one and one["class"] == row["class"]), row)
        if "step_seconds" in row:
            row["compared_with"], row["differences"] = baseline["variant"], differences(row, baseline)
            row["wrong"] = why_wrong(row["differences"], noise_of(variant.config))
        self.rows.append(row)
        self.save(rows=[{name: value for name, value in row.items() if name != "losses_R"}])
