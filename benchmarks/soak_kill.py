"""Kill random ranks of a tiny run again and again, and see that nothing of it is lost.

    python benchmarks/soak_kill.py --kills 50

A two-rank run under ``examples/torchrun.py --max-restarts`` is hit by SIGKILL at random moments: while it starts, while
it trains, while it saves (``--launcher fork`` restarts forked ranks instead, which skips the import of torch). In the
end every step must stand in its metrics once, every checkpoint must be readable, and weights and losses must equal, bit
for bit, those of a run that was left alone. Prints what it found; exit code 1 where something was lost.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script that uses the tests, which are not installed

import psutil
import torch

from mimo_megatron.config.load import dump_resolved
from mimo_megatron.config.run import RunConfig
from mimo_megatron.train.run_folder import RunFolder
from tests.e2e.faults_run import finish, losses_of, run_of, start, weights_of, write_data

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
_STARTUP_SHARE = 0.15
"""Of the kills that come before the ranks have begun to train again."""


@dataclass(frozen=True)
class SoakResult:
    kills: int
    kills_while_saving: int
    num_steps: int
    seconds: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        found = "; ".join(self.problems) or "0 lost steps, 0 unreadable checkpoints, same bits as the uninterrupted run"
        times = f"{self.kills_while_saving} of them while a checkpoint was being written"
        return f"{self.kills} kills ({times}), {self.num_steps} steps, {self.seconds:.0f} s: {found}"


class Job:
    """The run under one launcher. ``ranks`` are the processes that train at this moment."""

    def __init__(self, config: RunConfig, launcher: str, kills: int, scratch: Path) -> None:
        self._config, self._launcher, self._log = config, launcher, scratch / "log"
        if launcher == "fork":
            self._forked = start(config, RANKS, out=self._log)
            return
        dump_resolved(config, scratch / "recipe.yaml")
        command = [sys.executable, str(ROOT / "examples" / "torchrun.py"), "--standalone", f"--nproc-per-node={RANKS}"]
        command += [f"--max-restarts={kills + 1}", "--monitor-interval=0.1"]
        command += [str(ROOT / "examples" / "pretrain_vlm.py"), str(scratch / "recipe.yaml")]
        with self._log.open("w") as log:
            self._torchrun = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    @property
    def ranks(self) -> list[psutil.Process]:
        try:
            children = psutil.Process(self._pid).children()
            if self._launcher == "fork":
                return children
            return [one for one in children if any("pretrain_vlm.py" in word for word in one.cmdline())]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return []

    def is_running(self) -> bool:
        """Whether it goes on; forked ranks that were killed are started again here."""
        if self._launcher == "torchrun":
            return self._torchrun.poll() is None
        if self._forked.is_alive() or self._forked.exitcode == 0:
            return self._forked.is_alive()
        self._forked = start(self._config, RANKS, out=self._log)
        return True

    def end(self) -> None:
        """Leave no process behind."""
        if self.is_running():
            ranks = self.ranks
            psutil.Process(self._pid).terminate()
            psutil.wait_procs(ranks, timeout=60)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    @property
    def _pid(self) -> int:
        return int(self._forked.pid or 0) if self._launcher == "fork" else self._torchrun.pid


def left_alone(scratch: Path, steps: int) -> RunConfig:
    """A run of ``steps`` that nothing disturbed. More than the kills leave time for, so that all of them happen."""
    whole = run_of(write_data(scratch), scratch / "whole", steps, checkpoint={"every_steps": 3, "keep": 3})
    finish(whole, RANKS, seconds=3600)
    return whole


def soak(
    scratch: Path, whole: RunConfig, kills: int, launcher: str, seed: int, longest_life_seconds: float, quiet: bool
) -> SoakResult:
    """Run what ``whole`` ran, kill ``kills`` times, and compare. Deterministic but for timing."""
    draw = random.Random(seed)
    killed = whole.model_copy(update={"dir": scratch / "killed"})
    began = time.monotonic()
    job = Job(killed, launcher, kills, scratch)
    done = while_saving = 0
    try:
        before: set[int] = set()
        while done < kills and _wait(job, lambda before=before: _are_new(job, before)):
            starts = _num_starts(killed)
            if draw.random() > _STARTUP_SHARE:
                _wait(job, lambda starts=starts: _num_starts(killed) > starts)
            time.sleep(draw.uniform(0, longest_life_seconds))
            ranks = job.ranks
            if len(ranks) < RANKS or not job.is_running():
                continue
            before = {one.pid for one in ranks}
            victim = draw.randrange(RANKS)
            while_saving += any(killed.dir.glob("checkpoints/*.partial"))
            ranks[victim].kill()
            done += 1
            if not quiet:
                seconds = time.monotonic() - began
                print(f"{seconds:5.0f} s: kill {done}, rank {victim}, {_num_rows(killed)} steps logged", flush=True)
        _wait(job, lambda: False)
        problems = _problems(killed, whole)
        if problems:
            problems.append(job.output)
    finally:
        job.end()
    return SoakResult(done, while_saving, whole.train.steps, time.monotonic() - began, tuple(problems))


def _wait(job: Job, condition: Callable[[], bool]) -> bool:
    """True once ``condition`` holds; False where the job ended before."""
    while not condition():
        if not job.is_running():
            return False
        time.sleep(0.02)
    return True


def _are_new(job: Job, before: set[int]) -> bool:
    pids = {one.pid for one in job.ranks}
    return len(pids) == RANKS and not pids & before


def _num_starts(config: RunConfig) -> int:
    path = config.dir / "events.jsonl"
    text = path.read_text() if path.exists() else ""
    return text.count('"event": "start"') + text.count('"event": "resume"')


def _num_rows(config: RunConfig) -> int:
    path = config.dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _problems(killed: RunConfig, whole: RunConfig) -> list[str]:
    found = []
    try:
        if losses_of(killed) != losses_of(whole):
            found.append("losses differ from the uninterrupted run's")
    except AssertionError:
        found.append("metrics.jsonl does not hold every step once")
    expected = weights_of(whole)
    kept = RunFolder(killed.dir).checkpoint_steps()
    if len(kept) != killed.train.checkpoint.keep or kept[-1] != killed.train.steps:
        found.append(f"checkpoints of steps {kept}")
    for step in kept:
        try:
            weights = weights_of(killed, step)
        except Exception as error:
            found.append(f"checkpoint of step {step} cannot be read: {error}")
            continue
        if step == killed.train.steps and not all(torch.equal(weights[name], expected[name]) for name in expected):
            found.append("the final weights differ from the uninterrupted run's")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--launcher", choices=("torchrun", "fork"), default="torchrun")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest-life", type=float, default=8.0, help="seconds that ranks may train at most")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        whole = left_alone(Path(scratch), max(12 * options.kills, 80))
        result = soak(Path(scratch), whole, options.kills, options.launcher, options.seed, options.longest_life, False)
    print(result)
    return int(bool(result.problems))


if __name__ == "__main__":
    sys.exit(main())
