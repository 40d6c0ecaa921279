"""The command line: verbs, overrides, errors and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from mimo_megatron import __version__
from mimo_megatron.cli import VERBS, build_parser, main, parse
from mimo_megatron.cli.verb import Verb
from mimo_megatron.config.description import write_description
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.presets import preset
from tests.convert_fixtures import small_model

RECIPE = Path(__file__).parents[2] / "examples/recipes/tiny/stage1.yaml"


def test_help_loads_no_heavy_package() -> None:
    code = (
        "import sys; from mimo_megatron.cli import build_parser; build_parser().format_help(); "
        "print([name for name in ('torch', 'pydantic', 'rich', 'numpy', 'megatron') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=RECIPE.parents[3]
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_help(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parse([*verb.name.split(), "--help"])
    assert exited.value.code == 0
    assert verb.help.split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--version"])
    assert capsys.readouterr().out.strip() == f"mimo-megatron {__version__}"


def test_verbs_of_one_group_share_a_parser() -> None:
    names = [Verb(name, name, lambda parser: None, lambda values: 0) for name in ("config a", "config b", "c")]
    assert build_parser(names).parse_args(["config", "b"]).verb.name == "config b"
    assert build_parser(names).parse_args(["c"]).verb.name == "c"


def test_overrides_may_stand_around_options() -> None:
    values = parse(["config", "show", "r.yaml", "a=1", "--ranks", "2", "b.c=[1, 2]"])
    assert (values.overrides, values.ranks, str(values.recipe)) == (["a=1", "b.c=[1, 2]"], 2, "r.yaml")


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "show", "r.yaml", "--rnks", "2"],
        ["config", "show", "r.yaml", "--ranks", "2", "x"],
        ["doctor", "a=1"],
        ["train", "r.yaml", "--ranks", "0"],
        ["nope"],
        [],
    ],
)
def test_what_is_not_understood_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parse(arguments)
    assert exited.value.code == 2 and "error:" in capsys.readouterr().err


def test_config_show_prints_a_recipe_that_loads_back_equal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "show", str(RECIPE), "train.steps=7"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(shown)
    assert main(["config", "show", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == shown and "steps: 7" in shown


def test_a_mistake_is_a_panel_of_one_screen_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(RECIPE), "train.stps=7", "parallel.tp=0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    assert "ConfigError" in shown.err and "did you mean train.steps?" in shown.err and "parallel.tp = 0" in shown.err
    assert len(shown.err.splitlines()) < 24


def test_config_show_checks_the_layout_where_ranks_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(RECIPE), "--ranks", "3"]) == 2
    assert "ranks (3) % (parallel.tp 2" in capsys.readouterr().err


def test_config_explain_prints_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", "train.schedule"]) == 0
    assert "train.schedule.warmup_steps: int = 0. Steps over which" in capsys.readouterr().out


def test_config_model_names_the_preset_or_writes_a_section_that_a_recipe_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, model in (("preset", preset("mimo-vl-7b")), ("own", small_model())):
        (tmp_path / name).mkdir()
        write_description(tmp_path / name, model.model_copy(update={"name": name}))
    assert main(["config", "model", str(tmp_path / "preset")]) == 0
    assert capsys.readouterr().out == "model:\n  preset: mimo-vl-7b\n"
    assert main(["config", "model", str(tmp_path / "own")]) == 0
    other = "name: a\ndir: a\ndata: {tokenizer: a, pack_tokens: 32768, pack_patches: 65536}\ntrain: {steps: 1}\n"
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out + other)
    assert load_recipe(tmp_path / "recipe.yaml").model == small_model().model_copy(update={"name": "own"})


def test_a_runs_folder_in_place_of_a_checkpoint_is_answered_with_its_newest_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/latest").write_text("step_000020\n")
    for verb in (["config", "model"], ["convert", "to-hf"]):
        for named in ("run", "run/checkpoints", "run/checkpoints/latest"):
            assert main([*verb, named, *(["out"] if verb[0] == "convert" else [])]) == 2
            said = " ".join(capsys.readouterr().err.replace("│", "").split())
            assert "name run/checkpoints/step_000020" in said
    assert main(["config", "model", "."]) == 2 and "one of these folders" in capsys.readouterr().err


def test_the_module_runs_as_a_program_and_returns_the_exit_code() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "mimo_megatron.cli", "config", "show", "nowhere.yaml"],
        capture_output=True, text=True, cwd=RECIPE.parents[3], check=False,
    )  # fmt: skip
    assert child.returncode == 2 and "cannot read the recipe nowhere.yaml" in child.stderr
