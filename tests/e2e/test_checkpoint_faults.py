"""Checkpoints cannot lie: whatever happens to their files or to the process that writes, a load is right or refused.

Faults are real: bytes are changed on disk, a limit on file sizes makes the write fail, ``kill -9`` ends the process.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mimo_megatron.config.description import STATE_FILE
from mimo_megatron.config.manifest import MANIFEST_FILE, check_whole
from mimo_megatron.config.run import CheckpointConfig, ParallelConfig, RunConfig
from mimo_megatron.errors import CheckpointError
from mimo_megatron.mcore import checkpoint
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.optimizer import live_tensors
from mimo_megatron.train.run_folder import RunFolder
from mimo_megatron.train.saving import Saver, resume_newest
from mimo_megatron.train.step import Trainer, build_trainer
from tests.data_fixtures import recipe, write_tokenizer
from tests.harness import run_ranks
from tests.samples import run_config, tiny_model

TRIES = 100
KILLS = 20
Damage = Callable[[random.Random, Path, Path], str]


def small_run(root: Path, **settings) -> RunConfig:
    """A model of 0.8 M parameters, saved with its tokenizer into ``root``."""
    model = tiny_model(num_layers=1, width=64, ffn_width=64, num_heads=2, num_kv_heads=2)
    config = run_config(model, checkpoint=CheckpointConfig(**settings))
    tokenizer = write_tokenizer(root / "tokenizer")
    return config.model_copy(update={"dir": root, "data": recipe(root / "nowhere", tokenizer)})


def fill(trainer: Trainer, value: float) -> None:
    """Every weight and moment becomes ``value``."""
    with torch.no_grad():
        for tensor in (*live_tensors(trainer.optimizer), *trainer.bare_chunks[0].parameters()):
            tensor.fill_(value)


def first_weight(trainer: Trainer) -> float:
    return next(trainer.bare_chunks[0].parameters()).flatten()[0].item()


def saved_twice(address: RankAddress, config: RunConfig) -> list[tuple[str, int]]:
    """Steps 1 and 2, filled with 1 and 2; training goes on, with 9, before the writes have ended."""
    announced = []
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        position = lambda: {"loader": {"consumed": round(first_weight(trainer))}}  # noqa: E731
        with Saver(trainer, RunFolder(config.dir), position, lambda *event: announced.append(event[:2])) as saver:
            for step in (1, 2):
                fill(trainer, step)
                saver.save(step)
                fill(trainer, 9)
                saver.check()
    return announced


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    """A run folder with two good checkpoints, of two shards each; the run goes on with any number of ranks."""
    config = small_run(tmp_path_factory.mktemp("run"))
    halves = config.model_copy(update={"parallel": ParallelConfig(tp=2)})
    assert run_ranks(saved_twice, 2, halves)[0] == [("checkpoint", 1), ("checkpoint", 2)]
    return config


def copied(run: RunConfig, to: Path) -> RunConfig:
    """The run folder again; files are links until ``own`` makes one a copy."""
    shutil.copytree(run.dir / "checkpoints", to / "checkpoints", copy_function=os.link)
    return run.model_copy(update={"dir": to})


def own(path: Path) -> bytes:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return data


def some_file(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))


def truncate(draw: random.Random, folder: Path, other: Path) -> str:
    path = some_file(draw, folder)
    data = own(path)
    path.write_bytes(data[: draw.randrange(len(data))])
    return path.name


def empty(draw: random.Random, folder: Path, other: Path) -> str:
    path = some_file(draw, folder)
    own(path)
    path.write_bytes(b"")
    return path.name


def flip_a_bit(draw: random.Random, folder: Path, other: Path) -> str:
    path = some_file(draw, folder)
    data = bytearray(own(path))
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path.name


def delete(draw: random.Random, folder: Path, other: Path) -> str:
    path = some_file(draw, folder)
    path.unlink()
    return path.name


def lengthen(draw: random.Random, folder: Path, other: Path) -> str:
    path = some_file(draw, folder)
    path.write_bytes(own(path) + b"\0")
    return path.name


def swap_two_files(draw: random.Random, folder: Path, other: Path) -> str:
    first, second = draw.sample(sorted(path for path in folder.glob("__*.distcp")), 2)
    one, two = own(first), own(second)
    first.write_bytes(two)
    second.write_bytes(one)
    return first.name


def swap_the_states(draw: random.Random, folder: Path, other: Path) -> str:
    one, two = own(folder / STATE_FILE), own(other / STATE_FILE)
    (folder / STATE_FILE).write_bytes(two)
    (other / STATE_FILE).write_bytes(one)
    return STATE_FILE


def take_a_shard_of_the_other(draw: random.Random, folder: Path, other: Path) -> str:
    shard = draw.choice(sorted(folder.glob("__*.distcp")))
    own(shard)
    shutil.copyfile(other / shard.name, shard)
    return shard.name


def edit_the_manifest(draw: random.Random, folder: Path, other: Path) -> str:
    path = folder / MANIFEST_FILE
    own(path)
    manifest = json.loads(path.read_text())
    name = draw.choice(sorted(manifest["files"]))
    if draw.random() < 0.5:
        del manifest["files"][name]
    else:
        manifest["files"][name]["xxh128"] = "0" * 32
    path.write_text(json.dumps(manifest))
    return MANIFEST_FILE


FAULTS: tuple[Damage, ...] = (
    truncate,
    empty,
    flip_a_bit,
    delete,
    lengthen,
    swap_two_files,
    swap_the_states,
    take_a_shard_of_the_other,
    edit_the_manifest,
)


def loads_of_damaged_copies(address: RankAddress, run: RunConfig, scratch: Path) -> list[str]:
    """What went wrong in ``TRIES`` loads of the newest checkpoint, each after a fault; every tenth is a resume too."""
    wrong = []
    with megatron(run.parallel, address) as mesh:
        trainer = build_trainer(run, mesh)
        for number in range(TRIES):
            draw = random.Random(number)
            folder = RunFolder(copied(run, scratch / str(number)).dir)
            fault = FAULTS[number % len(FAULTS)]
            name = fault(draw, folder.checkpoint(2), folder.checkpoint(1))
            fill(trainer, 9)
            try:
                checkpoint.load(folder.checkpoint(2), run.model, trainer.bare_chunks, trainer.optimizer)
                wrong.append(f"{number} {fault.__name__} of {name}: loaded")
            except CheckpointError as error:
                if name not in str(error) or first_weight(trainer) != 9:
                    wrong.append(f"{number} {fault.__name__} of {name}: {error}")
            if number % 10 == 0 and fault is not swap_the_states:
                resumed = resume_newest(trainer, folder)
                assert resumed is not None and resumed.state == {"step": 1, "loader": {"consumed": 1}}
                assert first_weight(trainer) == 1 and folder.latest_step() == 1
                assert [step for step, _ in resumed.refused] == [2] and name in resumed.refused[0][1]
                assert folder.checkpoint_steps() == [1] and (folder.checkpoints / "step_000002.damaged").is_dir()
            shutil.rmtree(folder.root)
    return wrong


@pytest.mark.slow
def test_a_hundred_damaged_checkpoints_are_each_refused_by_the_name_of_the_file(run, tmp_path):
    assert run_ranks(loads_of_damaged_copies, 1, run, tmp_path, timeout_seconds=300)[0] == []


def resume(address: RankAddress, run: RunConfig) -> tuple[int | None, str]:
    """(step resumed from, error)."""
    with megatron(run.parallel, address) as mesh:
        trainer = build_trainer(run, mesh)
        try:
            resumed = resume_newest(trainer, RunFolder(run.dir))
        except CheckpointError as error:
            return None, str(error)
        return (resumed.state["step"] if resumed else None), ""


def test_where_no_checkpoint_is_good_a_run_is_refused_and_does_not_start_anew(run, tmp_path):
    config = copied(run, tmp_path)
    for step in (1, 2):
        (RunFolder(config.dir).checkpoint(step) / "model.json").unlink()
    for step, error in run_ranks(resume, 2, config):
        assert step is None and "no good checkpoint left" in error and "model.json is missing" in error
    for step in (1, 2):
        shutil.rmtree(RunFolder(config.dir).checkpoint(step))
    assert "`latest` names it" in run_ranks(resume, 1, config)[0][1]


def test_exchanged_folders_are_noticed_by_their_step(run, tmp_path):
    config = copied(run, tmp_path)
    one, two = (RunFolder(config.dir).checkpoint(step) for step in (1, 2))
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    assert "holds step 1" in run_ranks(resume, 1, config)[0][1]


def test_a_checkpoint_without_a_manifest_is_refused_with_the_remedy(run, tmp_path):
    config = copied(run, tmp_path)
    for step in (1, 2):
        (RunFolder(config.dir).checkpoint(step) / MANIFEST_FILE).unlink()
    assert "mimo-megatron convert seal" in run_ranks(resume, 1, config)[0][1]


def save_within_a_limit(address: RankAddress, config: RunConfig, num_bytes: int) -> tuple[str, list[int], bool]:
    """Step 1 without a limit, then step 2 while rank 1 may not write files beyond ``num_bytes``."""
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        folder = RunFolder(config.dir)
        saver = Saver(trainer, folder, dict, lambda *_: None)
        saver.save(1, wait=True)
        if address.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
        saver.save(2)
        try:
            saver.finish()
            error = ""
        except CheckpointError as fault:
            error = str(fault)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return error, folder.checkpoint_steps(), folder.latest_step() == folder.checkpoint_steps()[-1]


def test_a_failing_background_write_of_one_rank_is_an_error_on_all_and_publishes_nothing(tmp_path):
    config = small_run(tmp_path).model_copy(
        update={"parallel": run_config(tiny_model()).parallel.model_copy(update={"tp": 2})}
    )
    for error, steps, latest_is_right in run_ranks(save_within_a_limit, 2, config, 10_000):
        assert "could not be written (rank 1: " in error and "File too large" in error, error
        assert steps == [1] and latest_is_right
    check_whole(RunFolder(config.dir).checkpoint(1))


def save_forever(config: RunConfig) -> None:
    torch.set_num_threads(1)
    with megatron(config.parallel, RankAddress(0, 1, 0, "")) as mesh:
        trainer = build_trainer(config, mesh)
        resume_newest(trainer, folder := RunFolder(config.dir))
        with Saver(trainer, folder, dict, lambda *_: None) as saver:
            for step in range((folder.latest_step() or 0) + 1, 1_000_000):
                saver.save(step)


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_good_newest_checkpoint(tmp_path):
    """One run, killed and resumed again and again; its checkpoints are saved without pause."""
    config = small_run(tmp_path)
    folder, draw, num_torn, before = RunFolder(config.dir), random.Random(1), 0, 0
    for _ in range(KILLS):
        process = multiprocessing.get_context("fork").Process(target=save_forever, args=(config,))
        process.start()
        deadline = time.monotonic() + 60
        while (folder.latest_step() or 0) <= before:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_torn += any(folder.checkpoints.glob(f"*{checkpoint.PARTIAL}"))
        steps, latest = folder.checkpoint_steps(), folder.latest_step()
        assert latest is not None and steps[-1] in (latest, latest + 1) and latest in steps
        for step in steps:
            check_whole(folder.checkpoint(step))
        before = steps[-1]
    assert num_torn, "no kill fell into a save"
