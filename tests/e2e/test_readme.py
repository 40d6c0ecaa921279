"""The README's first commands run as written, from the root of a clone, and end as it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
README = (ROOT / "README.md").read_text()


def first_commands() -> list[str]:
    block = re.search(r"```bash\nmake install\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def as_here(command: str) -> list[str]:
    """The command with this interpreter in the place of the one in ``.venv``.

    Word by word: the interpreter's own path may hold ``.venv/bin/python``.
    """
    here = {
        ".venv/bin/mimo-megatron": [sys.executable, "-W", "ignore", "-m", "mimo_megatron.cli"],
        ".venv/bin/python": [sys.executable],
    }
    return [word for name in command.split() for word in here.get(name, [name])]


@pytest.mark.slow
def test_the_first_commands_of_the_readme_train_a_model_that_transformers_loads(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said = ""
    for command in first_commands():
        done = subprocess.run(
            as_here(command), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said += done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+/60 · loss ([\d.]+)", said)]
    assert losses[0] > 5.5 and losses[-1] < 2.6, losses
    assert "runs/tiny/first/hf: tiny-vl" in said
    load = "from transformers import AutoModelForImageTextToText as A; A.from_pretrained('runs/tiny/first/hf')"
    subprocess.run([sys.executable, "-c", load], cwd=tmp_path, check=True, timeout=120)


def test_every_file_that_the_readme_names_exists() -> None:
    names = re.findall(r"`((?:tests|docs|examples|benchmarks|mimo_megatron)/[\w/.]+)`", README)
    names += re.findall(r"\]\(([\w/.]+)\)", README)
    missing = [name for name in names if not (ROOT / name).exists()]
    assert names and not missing
