"""Kill random parts of a run of reinforcement learning again and again, and see that it ends as if nobody had.

    python benchmarks/soak_rl.py --kills 10 --vllm-python .vllm-env/bin/python

A trainer of two ranks, two real vLLM engines and a reward service, each a process of its own on loopback. SIGKILL hits
a rank, the trainer as a whole, an engine, its keeper, the reward service or its keeper, at random moments; what ends
with an error is begun again, as SLURM does. In the end every step must stand in the metrics once, no token of another
policy may have been trained, engine and trainer must agree after every update, and no response may have been scored
that could not be judged. Prints what it found; exit code 1 where something is wrong.
"""

import argparse
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script that uses the tests, which are not installed

from tests.vllm.topology import Topology, write_run

_LONGEST_LIFE_SECONDS = 8.0
_STEPS_PER_KILL = 5
"""More than the kills leave time for, so that all of them happen; the rest is undisturbed."""


@dataclass(frozen=True)
class SoakResult:
    kills: int
    victims: tuple[tuple[str, int], ...]
    num_steps: int
    num_starts: int
    """Of the trainer."""
    seconds: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        found = "; ".join(self.problems) or "every step once, no stale token, no fault scored"
        killed = ", ".join(f"{name} {count}" for name, count in self.victims)
        return (
            f"{self.kills} kills ({killed}), {self.num_steps} steps in {self.num_starts} starts of the trainer, "
            f"{self.seconds:.0f} s: {found}"
        )


def soak(folder: Path, vllm_python: str, kills: int, seed: int) -> SoakResult:
    """Run, kill ``kills`` times, and look. Deterministic but for timing."""
    draw, steps, began = random.Random(seed), _STEPS_PER_KILL * kills, time.monotonic()
    killed: Counter[str] = Counter()
    with Topology(write_run(folder, vllm_python, steps)) as topology:
        parts = {
            "trainer": topology.trainer, "rewards": topology.rewards,
            **{f"engine {number}": one for number, one in enumerate(topology.engines)},
        }  # fmt: skip
        while killed.total() < kills and not topology.is_done:
            reached = len(topology.metrics)
            topology.wait(lambda reached=reached: len(topology.metrics) > reached or topology.is_done, 600)
            at = time.monotonic() + draw.uniform(0, _LONGEST_LIFE_SECONDS)
            topology.wait(lambda at=at: time.monotonic() > at, 60)
            name = draw.choice(list(parts))
            if processes := parts[name].processes():
                draw.choice(processes).send_signal(signal.SIGKILL)
                killed[name] += 1
        topology.wait(lambda: topology.is_done, 3600)
        problems = topology.problems(steps)
        starts = topology.trainer.num_starts
    seconds = time.monotonic() - began
    return SoakResult(killed.total(), tuple(sorted(killed.items())), steps, starts, seconds, tuple(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vllm-python", default=".vllm-env/bin/python", help="as `make vllm-env` makes it")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = soak(Path(folder), str(Path(options.vllm_python).absolute()), options.kills, options.seed)
    print(result)
    return int(bool(result.problems) or result.kills < options.kills)


if __name__ == "__main__":
    sys.exit(main())
