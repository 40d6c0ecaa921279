"""Every `mimo-megatron` command that a page shows is understood: its verb, options, arguments and keys of recipes."""

import re
import shlex
from pathlib import Path

import pytest

from mimo_megatron.cli import parse
from mimo_megatron.config import keys
from tests.repository import files

PAGES = [path for path in files() if path.suffix in {".md", ".yaml", ".sbatch"}]
_FENCED = re.compile(r"```bash\n(.*?)```", re.DOTALL)
_REMARKS = re.compile(r"(?:^#.*\n)+", re.MULTILINE)
_COMMAND = re.compile(r"^(?:\$ +)?(?:\.venv/bin/)?mimo-megatron +(\S.*)$")


def shown(path: Path, text: str) -> list[str]:
    """What stands behind ``mimo-megatron`` on lines of their own; those with ``...`` or a choice are sketches."""
    blocks = _FENCED.findall(text) if path.suffix == ".md" else _REMARKS.findall(text)
    lines = [re.sub(r"^# +", "", line) for block in blocks for line in re.sub(r"\\\n[# ]*", "", block).splitlines()]
    found = [re.split(r" +#| > | *&&", match[1])[0] for line in lines if (match := _COMMAND.match(line))]
    return [command for command in found if "..." not in command and "|" not in command]


def is_understood(command: str) -> bool:
    try:
        values = parse(shlex.split(command))
    except SystemExit:
        return False
    paths = [one.partition("=")[0] for one in getattr(values, "overrides", [])]
    return all(path == "key" or keys.find(path) is not None for path in paths)


@pytest.mark.parametrize("path", [path for path in PAGES if "mimo-megatron " in path.read_text()], ids=lambda p: p.name)
def test_every_shown_command_is_understood(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [command for command in shown(path, path.read_text()) if not is_understood(command)]
    assert not wrong, (wrong, capsys.readouterr().err)


def test_commands_are_found_in_pages_and_in_the_remarks_of_recipes() -> None:
    page = "```bash\nmimo-megatron data stats R   # a page\n$ mimo-megatron prove\nsource x\n```\nmimo-megatron no\n"
    assert shown(Path("a.md"), page) == ["data stats R", "prove"]
    recipe = "# A recipe.\n#   mimo-megatron reward-model evaluate C \\\n#       --pairs P --calibrate\nname: x\n"
    assert shown(Path("a.yaml"), recipe) == ["reward-model evaluate C --pairs P --calibrate"]
    assert sum(len(shown(path, path.read_text())) for path in PAGES) > 80


@pytest.mark.parametrize(
    "command",
    ["data stat R", "data stats R --pages 3", "convert to-hf C", "serve-rewards --prt 1", "train R train.stps=3"],
)
def test_a_planted_wrong_command_is_found(command: str) -> None:
    assert not is_understood(command)
