"""Which model a checkpoint folder holds, in its ``model.json``: written by training and by the converter, read by both.

Invariant: a checkpoint passes for a model's exactly when all fields that give weights a shape or a meaning agree.
"""

import json
from pathlib import Path
from typing import Any

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.errors import CheckpointError

FORMAT = 1
MODEL_FILE = "model.json"
STATE_FILE = "state.json"
"""Where training stood (step, data position); an empty object in a checkpoint that was never trained."""
_FREE_TO_DIFFER = {"name", "text.max_positions", "text.mtp_loss_weight"}
"""How far and with which weight a model is trained is the recipe's choice, not the weights'."""
_ENCODER_SIZES = tuple(
    f"  model.vision.{name}:" for name in ("depth", "width", "num_heads", "ffn_width", "full_attention_layers")
)


def write_description(folder: Path, model: ModelConfig) -> None:
    """Record which model the checkpoint in ``folder`` holds."""
    description = {"kind": "model", "format": FORMAT, "model": model.model_dump(mode="json")}
    (folder / MODEL_FILE).write_text(json.dumps(description, indent=1) + "\n")


def read_description(folder: Path) -> ModelConfig:
    """The model of the checkpoint in ``folder``. ``CheckpointError`` if there is none."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MODEL_FILE}; name {what_to_name(folder)}")
    try:
        description = json.loads(path.read_text())
        if description.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {description.get('format')!r}, this version reads {FORMAT}")
        return ModelConfig.model_validate(description["model"])
    except (ValueError, KeyError, AttributeError) as fault:
        raise CheckpointError(f"{path} does not describe a model ({fault}); take another checkpoint") from fault


def what_to_name(path: Path, otherwise: str = "a folder that training or the converter wrote") -> str:
    """For errors: the newest checkpoint of a run, where ``path`` is the run's folder or lies in it."""
    for latest in (path / "checkpoints" / "latest", path / "latest", path):
        if latest.name == "latest" and latest.is_file():
            return str(latest.parent / latest.read_text().strip())
    return otherwise


def check_description(folder: Path, wanted: ModelConfig) -> None:
    """Refuse a checkpoint whose weights are not those of ``wanted``, naming the fields that differ."""
    check_same_model(read_description(folder), wanted, str(folder))


def check_body(folder: Path, wanted: ModelConfig) -> None:
    """Refuse a checkpoint of which all but head and multi-token-prediction layers is not that of ``wanted``."""
    found = read_description(folder)
    parts = ("head", "tie_embeddings", "num_mtp_layers")
    head = {name: getattr(wanted.text, name) for name in parts}
    body = found.model_copy(update={"text": found.text.model_copy(update=head)})
    check_same_model(body, wanted, str(folder))


def check_same_model(found: ModelConfig, wanted: ModelConfig, where: str) -> None:
    """Nothing where both describe the same weights; else a ``CheckpointError`` with every field that differs."""
    there, here = _leaves(found.model_dump()), _leaves(wanted.model_dump())
    differing = [
        f"  model.{key}: found {there.get(key)!r}, wanted {here.get(key)!r}"
        for key in sorted(there.keys() | here.keys())
        if key not in _FREE_TO_DIFFER and there.get(key) != here.get(key)
    ]
    if differing:
        title = f"model {found.name!r}, not {wanted.name!r}" if found.name != wanted.name else "another model"
        remedy = (
            f"Name the weights of this model, or set the recipe's model to theirs: mimo-megatron config model {where}"
        )
        if all(line.startswith(_ENCODER_SIZES) for line in differing):
            remedy += "\nAnother encoder with this decoder is a new start: mimo-megatron convert assemble"
        lines = [f"{where} holds {title}:", *differing, remedy]
        raise CheckpointError("\n".join(lines))


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
