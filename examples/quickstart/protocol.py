"""How the demo speaks and acts: parts with their times, commands as a user would type them, what was found."""

import contextlib
import importlib
import multiprocessing
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from examples.quickstart.sources import num_cores
from mimo_megatron import cli
from mimo_megatron.errors import MimoError

# Loaded once here, so that a forked command finds them: 4.6 s of CPU time each otherwise.
for _module in ("convert.verbs", "evaluation.answer", "train.launch", "train.loop"):
    importlib.import_module(f"mimo_megatron.{_module}")


class Protocol:
    """Prints as things happen; ``seconds`` has the time of every part so far."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # a process that has started its OpenMP pool must not fork
        self.console = Console(highlight=False)
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, title: str) -> Iterator[None]:
        self.console.rule(f"[bold]{title}", align="left")
        began = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - began
        self.console.print(f"[dim]{self.seconds[title]:.0f} s\n")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def found(self, text: str) -> None:
        """Something that had to hold, and does."""
        self.say(f"[green]✓[/] {text}")

    def command(self, *words: object) -> None:
        """Run a verb of ``mimo-megatron``. ``MimoError`` where it fails; it has said why by then."""
        arguments = _arguments("mimo-megatron", words, self)
        if torch.cuda.is_available():  # CUDA does not survive a fork
            code = subprocess.run([sys.executable, "-m", "mimo_megatron.cli", *arguments], check=False).returncode
        else:
            child = multiprocessing.get_context("fork").Process(target=_run_verb, args=(arguments,))
            child.start()
            child.join()
            code = child.exitcode or 0
        if code:
            raise MimoError(f"mimo-megatron {arguments[0]} ended with code {code}, see above")

    def python(self, module: str, *words: object) -> None:
        """Run a module in an interpreter of its own."""
        arguments = ["-m", module, *_arguments(f"python -m {module}", words, self)]
        code = subprocess.run([sys.executable, "-W", "ignore", *arguments], check=False).returncode
        if code:
            raise MimoError(f"python -m {module} ended with code {code}, see above")


def _arguments(program: str, words: tuple[object, ...], protocol: Protocol) -> list[str]:
    """The words as strings, paths from here where they can be, after showing them."""
    here = Path.cwd()
    short = [word.relative_to(here) if isinstance(word, Path) and word.is_relative_to(here) else word for word in words]
    arguments = list(map(str, short))
    protocol.say(f"[cyan]$ {program} {' '.join(arguments)}")
    return arguments


def _run_verb(arguments: list[str]) -> None:
    # megatron's checkpoint writer spawns a helper process, which would import the main module: the whole demo again.
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.exit(cli.main(arguments))


def layout(packs_per_step: int) -> tuple[int, list[str]]:
    """How many ranks this machine runs well, and the overrides that lay them out.

    TP 2 x PP 2 from four cores (or GPUs) on; fewer are data-parallel.
    """
    if _places() >= 4:
        return 4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]
    flat = ["parallel.tp=1", "parallel.pp=1", "parallel.sequence_parallel=false"]
    return data_parallel_ranks(packs_per_step), flat


def data_parallel_ranks(packs_per_step: int) -> int:
    """The most ranks, up to the cores or GPUs of this machine, among which a step's packs divide."""
    return max(ranks for ranks in range(1, _places() + 1) if packs_per_step % ranks == 0)


def _places() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else num_cores()
