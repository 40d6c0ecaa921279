"""``reward_model.json`` beside a reward model: how its scores become rewards in [0, 1], sigmoid((score - mu) / tau).

mu and tau are the mean and the standard deviation of the scores of held-out responses, chosen and rejected alike, so
that rewards spread around one half. They are fixed before a run: rewards estimated anew on the way would drift with it.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from mimo_megatron.config.manifest import MANIFEST_FILE, read_manifest, seal
from mimo_megatron.errors import CheckpointError

CALIBRATION_FILE = "reward_model.json"


@dataclass(frozen=True)
class Calibration:
    mu: float
    tau: float
    accuracy: float | None = None
    """Share of the held-out pairs whose chosen response has the higher score."""
    num_pairs: int = 0
    pairs_sha256: str = ""
    """Of the file of held-out pairs."""

    def __post_init__(self) -> None:
        if not (all(type(one) in (int, float) and math.isfinite(one) for one in (self.mu, self.tau)) and self.tau > 0):
            raise ValueError(f"mu {self.mu!r} and tau {self.tau!r} must be finite numbers, and tau above 0")

    def reward(self, score: float) -> float:
        """In [0, 1]; rises with the score."""
        x = (score - self.mu) / self.tau
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def read_calibration(path: Path) -> Calibration:
    """From a folder, or from the file itself. ``CheckpointError`` where there is none, or not a whole one."""
    path = path / CALIBRATION_FILE if path.is_dir() else path
    remedy = "run `mimo-megatron reward-model evaluate CHECKPOINT --pairs FILE --calibrate`"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, so scores cannot become rewards in [0, 1]; {remedy}")
    try:
        return Calibration(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no calibration, JSON with mu and tau ({error}); {remedy}") from error


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Into a checkpoint or a Hugging Face folder; a sealed one is sealed again."""
    known = dict(read_manifest(folder)) if (folder / MANIFEST_FILE).is_file() else None
    part = folder / (CALIBRATION_FILE + ".part")
    part.write_text(json.dumps(asdict(calibration), indent=1) + "\n")
    part.rename(folder / CALIBRATION_FILE)
    if known is not None:
        known.pop(CALIBRATION_FILE, None)
        seal(folder, known)


def copy_calibration(source: Path, folder: Path) -> None:
    """Where ``source`` has one."""
    if (source / CALIBRATION_FILE).is_file():
        shutil.copyfile(source / CALIBRATION_FILE, folder / CALIBRATION_FILE)
