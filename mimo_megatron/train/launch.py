"""Run a rank function on N local ranks by forking, for one machine without torchrun; or on this rank of torchrun's."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.multiprocessing as mp

from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.run import RunConfig
from mimo_megatron.errors import EngineLostError, HungError, Interrupted, MimoError, NonFiniteError
from mimo_megatron.lifetime import end_with_parent
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.train.signals import SIGNALS

_GRACE_SECONDS = 5.0
"""For the other ranks to end by themselves after one has ended with an error; then SIGTERM, then SIGKILL."""
_BY_EXIT_CODE = {kind.exit_code: kind for kind in (MimoError, NonFiniteError, Interrupted, EngineLostError)}


def run_local(body: Callable[..., Any], num_ranks: int, *args: Any) -> None:
    """``body(address, *args)`` on ranks 0 to ``num_ranks - 1`` of this machine, each with its share of the cores.

    One rank runs in this process. A typed error of a rank is raised here by the same words; the other ranks are ended.
    SIGTERM and SIGUSR1 are passed on to the ranks, and waited for. SIGINT (Ctrl-C) ends all at once.
    """
    if num_ranks == 1:
        body(RankAddress(0, 1, 0, ""), *args)
        return
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _enter,
            args=(os.getpid(), num_ranks, Path(folder), threads, body, args),
            nprocs=num_ranks,
            join=False,
            start_method="fork",
        )
        assert ranks is not None
        with _passing_signals_on(ranks.pids()) as passed:
            try:
                while not ranks.join(timeout=1.0, grace_period=_GRACE_SECONDS):
                    pass
            except mp.ProcessExitedException as error:
                refusals = sorted(Path(folder).glob("refusal-*.txt"))
                if refusals:
                    code, text = refusals[0].read_text().split("\n", 1)
                    raise _BY_EXIT_CODE[int(code)](text) from None
                if passed and -error.exit_code in passed:  # before the rank took notice of signals
                    raise Interrupted(f"{signal.Signals(passed[0]).name} before the first step; start again") from None
                if error.exit_code == -signal.SIGINT:
                    raise KeyboardInterrupt from None
                if error.exit_code == HungError.exit_code:
                    raise HungError(
                        "the ranks stood still for train.collective_timeout_seconds; those that held the others up are "
                        "named above, and in faults/hang_step_*.txt of the run's folder"
                    ) from None
                raise
            except KeyboardInterrupt:  # of a terminal the ranks have had it too, of `kill` they have not
                for process in ranks.processes:
                    process.kill()
                raise


@contextlib.contextmanager
def _passing_signals_on(pids: list[int]) -> Iterator[list[int]]:
    """Signals that arrive inside the block go to ``pids`` and into the list."""
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.kill(pid, number)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield passed
        return
    before = {one: signal.signal(one, pass_on) for one in SIGNALS}
    try:
        yield passed
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _enter(
    rank: int, parent: int, num_ranks: int, folder: Path, threads: int, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    end_with_parent(parent, signal.SIGKILL)  # ranks that outlive a killed launcher would write beside the next start's
    # Ctrl-C ends a rank as a kill does, which loses nothing that was saved. As an exception, which Python may raise
    # anywhere, it would leave ranks that wait for each other on their way out.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a run that a shell has put into the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(
        threads
    )  # before anything computes: a forked child hangs in the parent's OpenMP pool otherwise
    try:
        body(RankAddress(rank, num_ranks, rank, f"file://{folder / 'rendezvous'}"), *args)
    except MimoError as error:
        code = error.exit_code
        (folder / f"refusal-{rank}.txt").write_text(
            f"{code if code in _BY_EXIT_CODE else MimoError.exit_code}\n{error}"
        )
        os._exit(code)  # no collective is issued after an error


def run_torchrun(body: Callable[[RankAddress, RunConfig], None], description: str | None) -> int:
    """The main function of a script under torchrun: ``body`` on this rank, with the recipe that the command line names.
    The exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    try:
        body(RankAddress.from_environment(), load_recipe(options.recipe, options.overrides))
    except MimoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
