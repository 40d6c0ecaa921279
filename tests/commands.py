"""``python -m MODULE WORDS`` in a process that is forked from the tests' own.

A fresh interpreter spends 5 to 8 s of processor time on the import of torch and megatron-core before it does anything.
What a module says, its exit code, its signals and its death are here a process's own all the same; that the commands
start from nothing is asked by ``tests/e2e/test_readme.py`` and ``test_torchrun.py``.
"""

import atexit
import importlib
import logging
import multiprocessing
import os
import runpy
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from mimo_megatron import log
from tests.repository import ROOT

for _module in ("convert.verbs", "data.index", "evaluation.answer", "reward_model.evaluate", "rl.start", "train.loop"):
    importlib.import_module(f"mimo_megatron.{_module}")  # what verbs import when they run


@atexit.register
def _end_what_failed_tests_left() -> None:
    """Python would wait for them."""
    for process in multiprocessing.active_children():
        process.kill()


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def start(module: str, *words: object, folder: Path = ROOT, said: Path = Path(os.devnull)) -> ForkProcess:
    """The process. Its stdout goes to the file ``said`` and its stderr beside it, with ``.err`` behind the name."""
    arguments = module, list(map(str, words)), folder, said
    process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
    process.start()
    return process


def finish(module: str, *words: object, folder: Path, said: Path, seconds: float = 240) -> Done:
    """What the process said, once it has ended; it is killed after ``seconds``."""
    process = start(module, *words, folder=folder, said=said)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{module} {' '.join(map(str, words))}: not done after {seconds:.0f} s")
    return Done(process.exitcode, said.read_text(), _beside(said).read_text())


def _beside(said: Path) -> Path:
    return said if said == Path(os.devnull) else said.with_name(said.name + ".err")


def _run(module: str, words: list[str], folder: Path, said: Path) -> None:
    torch.set_num_threads(1)  # first: a forked child hangs in the parent's OpenMP pool otherwise
    for number, path in ((1, said), (2, _beside(said))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # What pytest has put there writes into its own files, the logger's too.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    log.get_logger().handlers.clear()
    logging.getLogger().handlers.clear()
    warnings.simplefilter("ignore")
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
