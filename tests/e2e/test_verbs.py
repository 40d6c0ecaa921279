"""The command's verbs on real files, one after another as a user would: index, look, pack, train, convert, report."""

from pathlib import Path

import pytest

from mimo_megatron.cli import main
from mimo_megatron.data.shards import write_shards
from tests.commands import finish
from tests.data_fixtures import mixed_samples, write_tokenizer

pytestmark = pytest.mark.slow
RECIPE = """
name: verbs
dir: run
model: {preset: tiny-vl, text: {num_layers: 2}, vision: {depth: 2, full_attention_layers: [1]}}
data:
  sources: [{path: source}]
  tokenizer: tokenizer
  pack_tokens: 256
  pack_patches: 512
  max_pixels: 50176
  video: {max_total_tokens: 64}
train:
  steps: 1
  packs_per_step: 1
  precision: fp32
  vision: {lr: 1e-4}
  projector: {lr: 1e-3}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a recipe, a tokenizer and shards lie, and what ``mimo-megatron train`` made of them."""
    folder = tmp_path_factory.mktemp("verbs")
    write_shards(mixed_samples(6), folder / "source", 6)
    write_tokenizer(folder / "tokenizer")
    (folder / "recipe.yaml").write_text(RECIPE)
    for command in (["data", "index", "recipe.yaml"], ["train", "recipe.yaml", "--ranks", "1"]):
        done = finish("mimo_megatron.cli", *command, folder=folder, said=folder / "said")
        assert done.code == 0, done.err  # the CPU stand-ins of a training process are never undone: not in this one
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_index_and_train_leave_an_index_a_checkpoint_and_a_report(folder: Path) -> None:
    for path in (
        "source/index.parquet",
        "run/checkpoints/step_000001/model.json",
        "run/config.yaml",
        "run/report.html",
    ):
        assert (folder / path).is_file(), path


def test_preview_writes_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", "recipe.yaml", "--packs", "1"]) == 0
    assert capsys.readouterr().out.strip() == "preview.html" and "data:image/" in Path("preview.html").read_text()


def test_pack_prints_and_draws(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "source", "--capacity", "256", "--patch-capacity", "512", "--plot", "plot.png"]) == 0
    assert "lower bound" in capsys.readouterr().out and Path("plot.png").stat().st_size > 0


def test_a_checkpoint_goes_to_hugging_face_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = "run/checkpoints/step_000001"
    assert main(["convert", "to-hf", checkpoint, "hf", "--tokenizer-from", "tokenizer"]) == 0
    assert main(["convert", "from-hf", "hf", "back"]) == main(["convert", "verify", "back", "hf"]) == 0
    assert "all equal, bit for bit" in capsys.readouterr().out
    assert main(["convert", "from-hf", "hf", "rounded", "--dtype", "bf16"]) == 0
    assert main(["convert", "verify", "rounded", "hf"]) == 1
    assert main(["convert", "assemble", "hf", "hf", "start", "--seed", "2", "--name", "joined"]) == 0
    assert "start: joined" in capsys.readouterr().out and Path("start/model.json").is_file()


def test_report_writes_pages_for_one_run_and_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run"]) == 0
    assert main(["report", "run", "run", "--out", "journey.html"]) == 0
    assert "journey.html" in capsys.readouterr().out and Path("journey.html").is_file()


def test_files_that_are_not_there_are_one_screen_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["convert", "to-hf", "nowhere", "x"],
        ["convert", "from-hf", "nowhere", "x"],
        ["pack", "nowhere", "--capacity", "8"],
        ["data", "index", "recipe.yaml", "data.sources=[{path: nowhere}]"],
        ["data", "preview", "recipe.yaml", "data.tokenizer=nowhere"],
    ):
        assert main(command) == 2, command
        shown = capsys.readouterr().err
        assert "nowhere" in shown and "Traceback" not in shown and len(shown.splitlines()) < 24
