"""The tiny base that the demo starts from: a vision encoder and a language model, trained here from nothing.

The report's model starts from a trained encoder and a trained language model. These two are trained as one model on
the training share of the demo's digits and photographs, phase by phase, and are then kept without the projector that
stood between them: two Hugging Face folders, ``vision/`` and ``text/``, and a manifest of how they came about.

    python -m examples.quickstart.base [--out FOLDER]     # hours on two cores; goes on where it was stopped
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import save_file

from examples.quickstart.protocol import Protocol, data_parallel_ranks
from examples.quickstart.sources import build_sources
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.processor import read_processor
from mimo_megatron.convert.checkpoint_io import CheckpointReader
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import write_hf_companions
from mimo_megatron.convert.hf_io import SINGLE_FILE
from mimo_megatron.convert.storage import new_folder
from mimo_megatron.report.run_data import RunData, load_run
from mimo_megatron.train.run_folder import RunFolder

RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"
SHIPPED = Path(__file__).parent / "base"
TRAINED = Path("runs/tiny/base")
MANIFEST = "MANIFEST.json"
_COMMAND = "python -m examples.quickstart.base"
_STEPS_PER_LOSS = 100


def base_recipes() -> list[Path]:
    """The phases in their order; each but the first starts from the one before."""
    return [RECIPES / "base.yaml", *sorted(RECIPES.glob("base[0-9]*.yaml"))]


def train_base(
    protocol: Protocol, out: Path, recipes: Sequence[Path] | None = None, num_samples: Mapping[str, int] | None = None
) -> None:
    """Build the data, run every phase, write the two folders and the manifest into ``out``. What was begun goes on."""
    recipes = recipes or base_recipes()
    configs = [load_recipe(recipe) for recipe in recipes]
    with protocol.part("Base: data"):
        build_sources(configs, num_samples)
    for recipe, config in zip(recipes, configs, strict=True):
        with protocol.part(f"Base: {config.name}"):
            protocol.command("train", recipe, "--ranks", data_parallel_ranks(config.train.packs_per_step))
    checkpoint = RunFolder(configs[-1].dir).newest_checkpoint()
    assert checkpoint is not None, "a complete run leaves a checkpoint"
    split_base(checkpoint, out)
    write_manifest(out, [config.dir for config in configs])


def split_base(checkpoint: Path, out: Path) -> None:
    """Write the checkpoint's language model and its encoder, in bf16, as ``out/text`` and ``out/vision``.

    The projector is left out. ``convert assemble`` takes both folders; plain transformers loads ``text``.
    """
    reader = CheckpointReader(checkpoint)
    models = {"text": reader.model.model_copy(update={"vision": None}), "vision": reader.model}
    for part, model in models.items():
        shutil.rmtree(out / part, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        with new_folder(out / part) as folder:
            write_hf_companions(folder, model, torch.bfloat16, read_processor(checkpoint) if part == "text" else None)
            tensors = {
                spec.name: tensor.to(torch.bfloat16, copy=True).contiguous()
                for rule in rules_for(reader.model)
                if rule.ours.name.startswith(f"{part}.")
                for spec, tensor in zip(rule.hf, rule.to_hf(reader.read(rule.ours.name)), strict=True)
            }
            save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def write_manifest(out: Path, run_dirs: Sequence[Path]) -> Path:
    """``out/MANIFEST.json``: the command, every phase with its sizes and losses, and hashes of the weights."""
    runs = [load_run(run_dir) for run_dir in run_dirs]
    weights = sorted(out.glob(f"*/{SINGLE_FILE}"))
    manifest = {
        "command": _COMMAND,
        "recipes": [recipe.relative_to(RECIPES.parents[2]).as_posix() for recipe in base_recipes()],
        "phases": [_phase(run) for run in runs],
        "sha256": {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
    }
    path = out / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def _phase(run: RunData) -> dict[str, Any]:
    start = next(event["detail"] for event in run.events if event["event"] == "start")
    losses = run.column("loss").tolist()
    rows = range(0, len(losses), _STEPS_PER_LOSS)
    return {
        "name": run.name,
        "seed": run.setting("seed"),
        "sources": [Path(source["path"]).name for source in run.setting("data.sources")],
        "steps": len(losses),
        "samples": int(run.total("num_samples")),
        "tokens": int(run.total("num_tokens")),
        "seconds": round(run.total("seconds")),
        "loss_of_every_100_steps": [round(fmean(losses[row : row + _STEPS_PER_LOSS]), 4) for row in rows],
        **start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's tiny base: a vision encoder and a language model.")
    parser.add_argument("--out", type=Path, default=TRAINED, help=f"default {TRAINED}; the shipped one is {SHIPPED}")
    out = parser.parse_args().out
    train_base(Protocol(), out)
    print(f"{out}: text/, vision/ and {MANIFEST}")


if __name__ == "__main__":
    main()
