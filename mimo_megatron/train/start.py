"""The weights a run begins with: a checkpoint of ours, or a Hugging Face folder converted on the way."""

import shutil
from pathlib import Path

import torch.distributed as dist

from mimo_megatron.convert.verbs import from_hf
from mimo_megatron.errors import CheckpointError
from mimo_megatron.mcore import checkpoint
from mimo_megatron.train.step import Trainer


def load_start(source: Path, trainer: Trainer, run_dir: Path) -> None:
    """Load the model's weights from ``source``; the optimizer starts fresh from them. A collective over all ranks."""
    if (source / checkpoint.MODEL_FILE).is_file():
        checkpoint.load(source, trainer.config.model, trainer.bare_model)
    elif (source / "config.json").is_file():
        converted = run_dir / "start"
        if dist.get_rank() == 0:
            shutil.rmtree(converted, ignore_errors=True)
            from_hf(source, converted)
        dist.barrier()
        checkpoint.load(converted, trainer.config.model, trainer.bare_model)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(converted)
    else:
        raise CheckpointError(
            f"start_from: {source} holds neither {checkpoint.MODEL_FILE} (a checkpoint of ours) nor config.json "
            "(a Hugging Face folder); name one of these folders"
        )
    trainer.optimizer.reload_model_params()
