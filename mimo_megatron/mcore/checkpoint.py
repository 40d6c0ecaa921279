"""Distributed checkpoints: weights and optimizer state by their whole-tensor names, so that any layout loads them.

A checkpoint is a folder published by a rename: either it is whole, or it does not exist under its name. Beside
megatron's files it holds ``model.json`` (what model this is) and ``state.json`` (step, data position, loss history).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from mimo_megatron.config.description import STATE_FILE, check_description, write_description
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.processor import write_processor
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.errors import CheckpointError
from mimo_megatron.mcore.module import MegatronModule
from mimo_megatron.mcore.optimizer import CONTENT, load_state, sharded_state

_FAULTS = (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError)


def save(
    folder: Path,
    model_config: ModelConfig,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer | None = None,
    state: dict[str, Any] | None = None,
    *,
    encoding: EncodingConfig | None = None,
) -> None:
    """Write a checkpoint and publish it under ``folder``. A collective over all ranks.

    With ``encoding``, the tokenizer and pixel limits go along, so that it can be used alone. An existing checkpoint of
    that name is replaced only once the new one is whole.
    """
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    tensors = _sharded(chunks, optimizer, is_loading=False)
    try:
        dist_checkpointing.save(tensors, str(partial), content_metadata=CONTENT)
    except _FAULTS as error:
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written ({_last_line(error)}); earlier ones are untouched. "
            "Look at the disk's free space and rights, then start the run again"
        ) from error
    if dist.get_rank() == 0:
        write_description(partial, model_config)
        (partial / STATE_FILE).write_text(json.dumps(state or {}, indent=1))
        if encoding is not None:
            write_processor(partial, encoding)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    dist.barrier()


def load(
    folder: Path,
    model_config: ModelConfig,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer | None = None,
) -> dict[str, Any]:
    """Fill this rank's ``chunks`` (and ``optimizer``) from ``folder`` and give its state. A collective over all ranks.

    ``CheckpointError`` names what is missing or differs; nothing is loaded then.
    """
    check_description(folder, model_config)
    try:
        loaded = dist_checkpointing.load(_sharded(chunks, optimizer, is_loading=True), str(folder))
    except _FAULTS as error:
        raise CheckpointError(
            f"{folder}: cannot be read as a checkpoint of {model_config.name}: {_last_line(error)}. "
            "Take an earlier checkpoint, or convert the weights again"
        ) from error
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model"][f"chunk{number}"], strict=True)
    if optimizer is not None:
        load_state(optimizer, loaded)
    return json.loads((folder / STATE_FILE).read_text())


def _last_line(error: BaseException) -> str:
    """The cause in one line; torch's checkpoint errors carry a traceback of every rank."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _sharded(
    chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    weights = {f"chunk{number}": chunk.sharded_state_dict(metadata=CONTENT) for number, chunk in enumerate(chunks)}
    return {"model": weights, **(sharded_state(optimizer, weights, is_loading=is_loading) if optimizer else {})}
