"""A tiny run that tests start, stop, kill and compare, in a process group of its own."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mimo_megatron import log
from mimo_megatron.config.run import DataConfig, RunConfig
from mimo_megatron.convert.checkpoint_io import CheckpointReader
from mimo_megatron.convert.families import rules_for
from mimo_megatron.errors import MimoError
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.loop import pretrain
from tests.data_fixtures import TINY, mixed_samples, recipe, write_source, write_tokenizer
from tests.samples import run_config


def write_data(folder: Path, name: str = "source", count: int = 24) -> DataConfig:
    tokenizer = write_tokenizer(folder / "tokenizer")
    limits = {"max_pixels": 100_000, "video": {"max_total_tokens": 128}}
    settings = recipe(folder / name, tokenizer, pack_patches=1024, window_samples=8, **limits)
    write_source(folder / name, mixed_samples(count), settings)
    return settings


def run_of(data: DataConfig, folder: Path, steps: int = 6, **fields: Any) -> RunConfig:
    checkpoint = {"every_steps": 1, "keep": 10} | fields.pop("checkpoint", {})
    config = run_config(TINY, steps=steps, packs_per_step=2, checkpoint=checkpoint, **fields)
    return config.model_copy(update={"dir": folder, "data": data})


def start(
    config: RunConfig, num_ranks: int, body: Callable[..., Any] = pretrain, out: Path | None = None
) -> multiprocessing.Process:
    """The run as the command would start it, in a process group of its own; what it says goes to ``out``."""

    def run() -> None:
        os.setpgrp()
        if out is not None:
            os.dup2(os.open(out, os.O_CREAT | os.O_WRONLY), 2)
        torch.set_num_threads(1)
        log.set_up()
        try:
            run_local(body, num_ranks, config)
        except MimoError as error:
            print(error, file=sys.stderr, flush=True)
            sys.exit(error.exit_code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finish(config: RunConfig, num_ranks: int, seconds: float = 120) -> None:
    process = start(config, num_ranks)
    process.join(seconds)
    assert process.exitcode == 0


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    path = config.dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events_of(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.dir / "events.jsonl").read_text().splitlines()]


def losses_of(config: RunConfig) -> dict[int, float]:
    """Loss by step; every step of the run stands in the metrics once, in order."""
    rows = rows_of(config)
    assert [row["step"] for row in rows] == list(range(1, config.train.steps + 1))
    return {row["step"]: row["loss"] for row in rows}


def weights_of(config: RunConfig, step: int | None = None) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, the last step's where none is named."""
    reader = CheckpointReader(config.dir / "checkpoints" / f"step_{step or config.train.steps:06d}")
    return {rule.ours.name: reader.read(rule.ours.name).clone() for rule in rules_for(config.model)}


def assert_same_run(ours: RunConfig, theirs: RunConfig) -> None:
    assert losses_of(ours) == losses_of(theirs)
    mine, other = weights_of(ours), weights_of(theirs)
    assert all(torch.equal(mine[name], other[name]) for name in other)
