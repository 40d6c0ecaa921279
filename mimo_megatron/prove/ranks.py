"""Run a function on N gloo ranks of this machine and bring back what each returned.

Ranks are forked, so a 4-rank case costs seconds where starting four interpreters costs a minute: import what the ranks
need before calling.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mimo_megatron.mcore.boot import RankAddress


def run_ranks(body: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """``[body(address, *args) of rank 0, 1, ...]``; the first failure is raised again; the time limit is kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = mp.start_processes(
            _enter, args=(world_size, folder, body, args), nprocs=world_size, join=False, start_method="fork"
        )
        deadline = time.monotonic() + timeout_seconds
        while not ranks.join(timeout=0.2):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{body.__name__}: {world_size} ranks not done after {timeout_seconds:.0f} s")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _enter(rank: int, world_size: int, folder: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # first: a forked child hangs in the parent's OpenMP pool otherwise
    result = body(RankAddress(rank, world_size, rank, f"file://{folder / 'rendezvous'}"), *args)
    torch.save(result, folder / f"{rank}.pt")
