"""What a checkpoint costs: how long training stalls for it, written at once or beside training, and MB/s of each part.

    python benchmarks/bench_checkpoint.py             # twelve steps, a checkpoint every fourth; a few minutes
    python benchmarks/bench_checkpoint.py --steps 24

One process, one thread, fp32: a model of 9 M parameters, whose checkpoint (weights, AdamW's fp32 copy and moments) is
about 140 MB. A step is AdamW on 2 packs of 1,000 text tokens. Stall is the wall
time inside ``Saver.save`` and ``Saver.check``, and at the end ``finish``; ``stall_fraction`` divides it by the run's
wall time. Steps beside a background write share the processor with it: ``slower_steps`` is their median over the median
of the others, on a machine with as few cores as the CSV's name says.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch
from provenance import ROOT, write_rows

from mimo_megatron.config.manifest import check_whole
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import (
    CheckpointConfig,
    DataConfig,
    ModuleTraining,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import checkpoint
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.shard_files import HostBuffers, write_part
from mimo_megatron.train.run_folder import RunFolder
from mimo_megatron.train.saving import Saver
from mimo_megatron.train.step import Trainer, build_trainer, train_step
from mimo_megatron.types import EncodedSample, PackedBatch

PACKS, PACK_TOKENS, EVERY = 2, 1024, 4


def model_config() -> ModelConfig:
    """The preset ``tiny-vl`` with a decoder of 8 layers of width 256 and a vocabulary of 4,096."""
    model = preset("tiny-vl")
    wider = dict(num_layers=8, width=256, num_heads=8, num_kv_heads=4, ffn_width=768, vocab_size=4096)
    return model.model_copy(update={"text": model.text.model_copy(update=wider)})


def run_config(mode: str, folder: Path, steps: int) -> RunConfig:
    every = ModuleTraining(lr=1e-4)
    nowhere, tokenizer = Path("/nonexistent"), ROOT / "examples/quickstart/base/text"
    return RunConfig(
        name="bench",
        dir=folder,
        model=model_config(),
        data=DataConfig(
            sources=(SourceConfig(path=nowhere),), tokenizer=tokenizer, pack_tokens=PACK_TOKENS, pack_patches=1024
        ),
        train=TrainConfig(
            steps=steps,
            packs_per_step=PACKS,
            precision="fp32",
            vision=every,
            projector=every,
            text=every,
            checkpoint=CheckpointConfig(every_steps=EVERY, mode=mode),
        ),
    )


def batches(model: ModelConfig) -> list[PackedBatch]:
    """Text of 1,000 tokens in every pack."""
    draw = np.random.default_rng(1)
    samples = [
        EncodedSample(f"sample-{number}", draw.integers(16, 4096, 1000), np.arange(1000) > 0, ())
        for number in range(PACKS)
    ]
    return [collate([sample], model, PACK_TOKENS) for sample in samples]


def timed_run(trainer: Trainer, packs: Sequence[PackedBatch], is_saving: bool) -> dict[str, Any]:
    """Stall and step times of one run; ``is_saving`` false gives the run without checkpoints."""
    config, folder = trainer.config, RunFolder(trainer.config.dir)
    stalls: list[float] = []
    alone: list[float] = []
    beside: list[float] = []
    published: list[int] = []
    began = time.perf_counter()
    saver = Saver(trainer, folder, dict, lambda _event, step, _detail: published.append(step))
    for step in range(1, config.train.steps + 1):
        mark = time.perf_counter()
        saver.check()
        is_writing = saver.is_writing
        stall = time.perf_counter() - mark
        mark = time.perf_counter()
        train_step(trainer, packs, step, 1.0)
        (beside if is_writing else alone).append(time.perf_counter() - mark)
        mark = time.perf_counter()
        if is_saving and step % EVERY == 0:
            saver.save(step)
            stalls.append(stall + time.perf_counter() - mark)
    mark = time.perf_counter()
    saver.finish()
    last = time.perf_counter() - mark
    whole = time.perf_counter() - began
    assert len(published) == len(stalls)
    return dict(
        step_seconds=round(statistics.median(alone), 3),
        slower_steps=round(statistics.median(beside) / statistics.median(alone), 2) if beside else None,
        stall_seconds=round(statistics.median(stalls), 3) if stalls else 0.0,
        last_wait_seconds=round(last, 3),
        stall_fraction=round(sum(stalls) / whole, 4),
        wall_seconds=round(whole, 1),
    )


def raw_write(folder: Path, pieces: Sequence[Any]) -> None:
    """The same records, without checksum and without reading back."""
    with (folder / "raw.distcp").open("wb") as file:
        for piece in pieces:
            torch.save(piece.data.clone() if isinstance(piece.data, torch.Tensor) else piece.data, file)
        file.flush()
        os.fsync(file.fileno())


def parts(trainer: Trainer, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Median MB/s of each part of a save and of a load."""
    config = trainer.config
    target, buffers = folder / "parts" / "saved", HostBuffers()
    seconds: dict[str, list[float]] = {}

    def clock(part: str, mark: float) -> None:
        seconds.setdefault(part, []).append(time.perf_counter() - mark)

    for _ in range(rounds):
        mark = time.perf_counter()
        checkpoint.stage(target, config.model, trainer.bare_chunks, trainer.optimizer)
        clock("plan and gather", mark)
        mark = time.perf_counter()
        staged = checkpoint.stage(target, config.model, trainer.bare_chunks, trainer.optimizer, buffers=buffers)
        clock("plan, gather and copy", mark)
        mark = time.perf_counter()
        raw_write(folder, staged.pieces)
        clock("write without checksum", mark)
        mark = time.perf_counter()
        write_part(folder, 0, staged.pieces)
        clock("write, checksum, read back", mark)
        mark = time.perf_counter()
        staged.publish()
        clock("publish", mark)
        mark = time.perf_counter()
        check_whole(target)
        clock("verify", mark)
        mark = time.perf_counter()
        checkpoint.load(target, config.model, trainer.bare_chunks, trainer.optimizer)
        clock("load, verified", mark)
    num_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return [
        dict(
            measured=part,
            megabytes=round(num_bytes / 1e6),
            seconds=round(statistics.median(times), 3),
            mb_per_second=round(num_bytes / 1e6 / statistics.median(times)),
        )
        for part, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of parts")
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        config = run_config("sync", Path(name), values.steps)
        with megatron(config.parallel, RankAddress(0, 1, 0, "")) as mesh:
            trainer = build_trainer(config, mesh)
            packs = batches(config.model)
            train_step(trainer, packs, 0, 1.0)
            rows += parts(trainer, Path(name), values.rounds)
            print(*rows, sep="\n", flush=True)
            for kind, mode in (("none", "sync"), ("sync", "sync"), ("async", "async")):
                settings = run_config(mode, Path(name) / kind, values.steps)
                one = Trainer(settings, mesh, trainer.device, trainer.chunks, trainer.optimizer)
                rows.append(dict(measured=f"run, {kind}", **timed_run(one, packs, kind != "none")))
                print(rows[-1], flush=True)
            print(f"the load of the machine was {os.getloadavg()[0]:.0f}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [{column: row.get(column) for column in columns} for row in rows]
    measured = ("mimo_megatron/mcore", "mimo_megatron/train", "mimo_megatron/config", "benchmarks")
    print(write_rows("checkpoint", table, measured, ("torch", "megatron-core"), values.out))


if __name__ == "__main__":
    main()
