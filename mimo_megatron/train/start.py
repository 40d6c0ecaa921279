"""Weights from a checkpoint of ours or from a Hugging Face folder, which is converted on the way."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from mimo_megatron.config.description import MODEL_FILE, read_description, what_to_name
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.processor import has_processor, read_processor
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.convert.hf_config import encoding_of, model_of
from mimo_megatron.convert.verbs import from_hf
from mimo_megatron.errors import CheckpointError
from mimo_megatron.mcore import checkpoint
from mimo_megatron.model.vlm import VisionLanguageModel


def model_in(source: Path) -> ModelConfig:
    """Which model lies in ``source``."""
    return model_of(source) if _is_hugging_face(source) else read_description(source)


def read_encoding(source: Path, tokenizer: Path | None = None) -> EncodingConfig:
    """How the model in ``source`` reads its input; by another tokenizer where one is named."""
    if _is_hugging_face(source):
        encoding = encoding_of(source)
    elif tokenizer is None or has_processor(source):
        encoding = read_processor(source)
    else:
        encoding = EncodingConfig(tokenizer=tokenizer)
    return encoding if tokenizer is None else encoding.model_copy(update={"tokenizer": tokenizer})


def load_weights(source: Path, model_config: ModelConfig, chunks: Sequence[VisionLanguageModel], scratch: Path) -> None:
    """Fill ``chunks`` from ``source``. A collective over all ranks; a conversion passes through ``scratch``.

    A reward model may begin with a model that predicts tokens: its own head stays as it was drawn.
    """
    keeps_head = model_config.text.head == "reward" and model_in(source).text.head == "vocabulary"
    if not _is_hugging_face(source):
        checkpoint.load(source, model_config, chunks, keeps_head=keeps_head)
        return
    converted = scratch / "converted"
    if dist.get_rank() == 0:
        shutil.rmtree(converted, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        from_hf(source, converted)
    dist.barrier()
    checkpoint.load(converted, model_config, chunks, keeps_head=keeps_head)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(converted)


def _is_hugging_face(source: Path) -> bool:
    if (source / MODEL_FILE).is_file():
        return False
    if (source / "config.json").is_file():
        return True
    raise CheckpointError(
        f"{source} holds neither {MODEL_FILE} (a checkpoint of ours) nor config.json (a Hugging Face folder); "
        f"name {what_to_name(source, 'one of these folders')}"
    )
