"""The ``processor/`` folder of a checkpoint: its tokenizer and how media are resized, so that it can be used alone.

Written by training and by the converter from a Hugging Face folder; read by scoring, generation and the export.
"""

import json
import shutil
from pathlib import Path

from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.errors import CheckpointError

FOLDER = "processor"
_ENCODING_FILE = "encoding.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and the chat template. ``CheckpointError`` where there is no tokenizer."""
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if "tokenizer.json" not in present and "vocab.json" not in present:
        raise CheckpointError(f"{source} holds no tokenizer: neither tokenizer.json nor vocab.json is there")
    for name in present:
        shutil.copyfile(source / name, folder / name)


def write_processor(checkpoint: Path, encoding: EncodingConfig) -> None:
    """Put the tokenizer and the encoding's settings into the checkpoint. The system prompt stays with the recipe."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    copy_tokenizer(encoding.tokenizer, folder)
    kept = {"min_pixels", "max_pixels", "video"}
    (folder / _ENCODING_FILE).write_text(encoding.model_dump_json(indent=1, include=kept) + "\n")


def has_processor(checkpoint: Path) -> bool:
    return (checkpoint / FOLDER / _ENCODING_FILE).is_file()


def read_processor(checkpoint: Path) -> EncodingConfig:
    """How the checkpoint's model reads its input. ``CheckpointError`` where it does not say."""
    folder = checkpoint / FOLDER
    if not has_processor(checkpoint):
        raise CheckpointError(
            f"{checkpoint} has no {FOLDER}/ with a tokenizer; convert it again from a folder that has one, or name a "
            "tokenizer with --tokenizer"
        )
    settings = json.loads((folder / _ENCODING_FILE).read_text())
    return EncodingConfig.model_validate({**settings, "tokenizer": folder})
