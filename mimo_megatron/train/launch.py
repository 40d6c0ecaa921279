"""Run a rank function on N local ranks by forking, for one machine without torchrun."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mimo_megatron.errors import MimoError
from mimo_megatron.mcore.boot import RankAddress

_REFUSED = 2


def run_local(body: Callable[..., Any], num_ranks: int, *args: Any) -> None:
    """``body(address, *args)`` on ranks 0 to ``num_ranks - 1`` of this machine, each with its share of the cores.

    One rank runs in this process. A typed error of a rank is raised here by the same words; the other ranks are ended.
    """
    if num_ranks == 1:
        body(RankAddress(0, 1, 0, ""), *args)
        return
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(
                _enter, args=(num_ranks, Path(folder), threads, body, args), nprocs=num_ranks, start_method="fork"
            )
        except mp.ProcessExitedException:
            refusals = sorted(Path(folder).glob("refusal-*.txt"))
            if not refusals:
                raise
            raise MimoError(refusals[0].read_text()) from None


def _enter(
    rank: int, num_ranks: int, folder: Path, threads: int, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)  # first: a forked child hangs in the parent's OpenMP pool otherwise
    try:
        body(RankAddress(rank, num_ranks, rank, f"file://{folder / 'rendezvous'}"), *args)
    except MimoError as error:
        (folder / f"refusal-{rank}.txt").write_text(str(error))
        os._exit(_REFUSED)  # no collective is issued after an error
