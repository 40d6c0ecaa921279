"""Proof that a recipe's stream of packs survives a kill: the same global batches on other numbers of ranks and workers.

The stream is read three ways: by one rank without a break; by the first number of ranks in a process of its own that is
killed (SIGKILL) after some step, while packs are made ahead; and, from the state that it left, on each number of ranks
with each number of workers. Every pack is compared by a hash of all that it holds, at its place in its step. No
``torch.distributed`` takes part: a rank of the loader is two integers.

    python -m mimo_megatron.data.verify_resume < settings.json    # the process that is killed
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig, RunConfig
from mimo_megatron.data.loader import PackLoader, open_maker
from mimo_megatron.data.making import PackMaker
from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.types import PackedBatch

MOST_STATE_BYTES = 4096


@dataclass(frozen=True)
class Pack:
    """What is compared, and what is said about it."""

    digest: str
    sample_ids: tuple[str, ...]


Steps = list[list[Pack]]
"""Packs by step and place in the step."""


@dataclass(frozen=True)
class Stream:
    """What one set of ranks read: from the step after ``first`` on. ``difference`` from the unbroken one, or empty."""

    name: str
    num_ranks: int
    num_workers: int
    first: int
    steps: Steps
    difference: str = ""

    def row(self) -> str:
        """A line of the table that the command prints."""
        last = self.first + len(self.steps)
        num_packs = sum(map(len, self.steps))
        num_samples = sum(len(one.sample_ids) for step in self.steps for one in step)
        name = "differs" if self.difference else self.name
        return (
            f"{self.num_ranks:>5}  {self.num_workers:>7}  {f'{self.first + 1}-{last}':>7}  {num_packs:>7,}  "
            f"{num_samples:>9,}  {name}"
        )


@dataclass(frozen=True)
class Request:
    """``kill_at`` and ``steps`` count steps of ``packs_per_step`` packs from the beginning of the data."""

    data: DataConfig
    model: ModelConfig
    seed: int
    packs_per_step: int
    steps: int
    kill_at: int
    ranks: tuple[int, ...]
    """The first is the number that is killed."""
    workers: tuple[int, ...]


def request_of(config: RunConfig, *, steps: int, kill_at: int, ranks: Sequence[int], workers: Sequence[int]) -> Request:
    """The check of this recipe. Its steps have the recipe's packs where all ``ranks`` share them evenly, else as few as
    they do."""
    if config.rl is not None:
        raise ConfigError("verify-resume reads the packs of training; a recipe with the section rl has none")
    if not 0 < kill_at < steps:
        raise ConfigError(f"--kill-at {kill_at} must be at least 1 and below --steps {steps}")
    fewest = math.lcm(*ranks)
    packs = config.train.packs_per_step
    return Request(
        config.data,
        config.model,
        config.seed,
        fewest if packs % fewest else packs,
        steps,
        kill_at,
        tuple(ranks),
        tuple(workers),
    )


def verify_resume(request: Request) -> Iterator[Stream]:
    """The unbroken stream, the killed one, then every resumed one. What differs is said in each."""
    with_thread = _with_workers(request, 0)
    maker = open_maker(with_thread, request.model)
    try:
        whole, _ = read_steps(maker, request, 1, request.steps)
    finally:
        maker.close()
    yield Stream("unbroken", 1, 0, 0, whole)
    first, most_workers = request.ranks[0], max(request.workers)
    killed, state = _killed(request, first, most_workers)
    name = "equal, then killed while packs were made ahead"
    yield Stream(name, first, most_workers, 0, killed, difference(killed, whole[: request.kill_at], 0))
    for num_workers in request.workers:
        maker = open_maker(_with_workers(request, num_workers), request.model)
        try:
            for num_ranks in request.ranks:
                found, _ = read_steps(maker, request, num_ranks, request.steps - request.kill_at, state)
                other = difference(found, whole[request.kill_at :], request.kill_at)
                yield Stream("resumed: equal", num_ranks, num_workers, request.kill_at, found, other)
        finally:
            maker.close()


def read_steps(
    maker: PackMaker, request: Request, num_ranks: int, num_steps: int, state: Mapping[str, Any] | None = None
) -> tuple[Steps, dict[str, Any]]:
    """The next steps after ``state`` (None: the beginning) as so many ranks read them, one after another, and the state
    after them."""
    steps: list[dict[int, Pack]] = [{} for _ in range(num_steps)]
    states = []
    for rank in range(num_ranks):
        loader = _loader(maker, request, rank, num_ranks)
        loader.steps_to_come = num_steps
        if state is not None:
            loader.load_state(state)
        for step in steps:
            batches = loader.next_step()
            step.update(zip(loader.places, map(_pack, batches), strict=True))
        states.append(loader.state())
        loader.close()
    assert all(one == states[0] for one in states), "ranks disagree on where the stream stands"
    return [[step[place] for place in sorted(step)] for step in steps], states[0]


def difference(found: Steps, expected: Steps, first: int) -> str:
    """The first pack that differs, by step (counted from 1, after ``first``) and place; empty where none does."""
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=first + 1):
        if len(ours) != len(theirs):
            return f"step {step} has {len(ours)} packs, not {len(theirs)}"
        for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            if our.sample_ids != their.sample_ids:
                return f"step {step}, pack {place} holds {_listed(our)}, not {_listed(their)}"
            if our.digest != their.digest:
                return f"step {step}, pack {place} holds the right samples ({_listed(our)}) with other contents"
    return ""


def _killed(request: Request, num_ranks: int, num_workers: int) -> tuple[Steps, dict[str, Any]]:
    """The steps up to ``kill_at`` of a process that is killed after them, and the state it had said then."""
    settings = {
        "data": _with_workers(request, num_workers).model_dump(mode="json"),
        "model": request.model.model_dump(mode="json"),
        "numbers": [request.seed, request.packs_per_step, request.steps, num_ranks],
    }
    places = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "mimo_megatron.data.verify_resume"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        with child.stdin as stdin:
            stdin.write(json.dumps(settings).encode())
        steps: Steps = []
        for line in child.stdout:
            said = json.loads(line)
            steps.append([Pack(digest, tuple(names)) for digest, names in said["packs"]])
            if len(steps) == request.kill_at:
                break
        else:
            raise DataError(f"the process that was to be killed ended by itself after step {len(steps)}; see above why")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    text = json.dumps(said["state"])
    if len(text) > MOST_STATE_BYTES:
        raise DataError(f"the state has {len(text)} bytes, more than {MOST_STATE_BYTES}")
    return steps, json.loads(text)


def _run_until_killed() -> None:
    """All ranks in one process, step by step, each said as a line of JSON when every rank has it."""
    settings = json.load(sys.stdin)
    seed, packs_per_step, num_steps, num_ranks = settings["numbers"]
    data, model = DataConfig.model_validate(settings["data"]), ModelConfig.model_validate(settings["model"])
    request = Request(data, model, seed, packs_per_step, num_steps, num_steps, (num_ranks,), (data.workers,))
    maker = open_maker(data, model)
    loaders = [_loader(maker, request, rank, num_ranks) for rank in range(num_ranks)]
    for _ in range(num_steps):
        packs: dict[int, Pack] = {}
        for loader in loaders:
            batches = loader.next_step()
            packs.update(zip(loader.places, map(_pack, batches), strict=True))
        said = [(packs[place].digest, packs[place].sample_ids) for place in sorted(packs)]
        print(json.dumps({"packs": said, "state": loaders[0].state()}), flush=True)


def _loader(maker: PackMaker, request: Request, rank: int, num_ranks: int) -> PackLoader:
    return PackLoader(
        maker.corpus.data,
        request.model,
        packs_per_step=request.packs_per_step,
        seed=request.seed,
        dp_rank=rank,
        dp_size=num_ranks,
        maker=maker,
    )


def _with_workers(request: Request, num_workers: int) -> DataConfig:
    """The recipe's data with memory for a full pack of each worker and one more: what is made ahead is thrown away."""
    data = request.data
    needed = (num_workers + 1) * data.making_bytes(request.model, data.pack_patches)
    return data.model_copy(update={"workers": num_workers, "prefetch_mib": -(-needed >> 20)})


def _pack(batch: PackedBatch) -> Pack:
    content = hashlib.sha256(repr((batch.segment_bounds, batch.vision and batch.vision.grids_I3)).encode())
    columns = [batch.columns[name] for name in sorted(batch.columns)]
    for tensor in (
        batch.token_ids_S,
        batch.labels_S,
        batch.loss_weights_S,
        batch.positions_3S,
        batch.pixels_Y,
        batch.splice_M,
        batch.splice_rows_M,
        *columns,
    ):
        content.update(tensor.contiguous().numpy().data)
    return Pack(content.hexdigest(), batch.sample_ids)


def _listed(pack: Pack) -> str:
    names = ", ".join(pack.sample_ids[:3])
    return f"{names} and {len(pack.sample_ids) - 3} more" if len(pack.sample_ids) > 3 else names or "no sample"


if __name__ == "__main__":
    _run_until_killed()
