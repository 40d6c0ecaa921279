"""Distributed checkpoints: weights and optimizer state by their whole-tensor names, so that any layout loads them.

A checkpoint is written aside, read back, sealed with a manifest of its files and published by a rename: it is whole
under its name, or absent. Beside megatron's files it holds ``model.json`` (what model this is) and ``state.json``
(step, data position). Saving has two halves: ``stage`` uses megatron's collectives and ends with a copy; ``publish`` of
what it gives may run in a thread while training goes on. Nothing is forked (docs/checkpoints.md).
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from mimo_megatron.config.description import STATE_FILE, check_body, check_description, write_description
from mimo_megatron.config.manifest import damaged_files, read_manifest, refuse_damage, seal, share_of, sync
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.processor import write_processor
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.errors import CheckpointError, DamagedCheckpointError
from mimo_megatron.log import get_logger
from mimo_megatron.mcore import fp8
from mimo_megatron.mcore.module import MegatronModule
from mimo_megatron.mcore.optimizer import CONTENT, live_tensors, load_state, sharded_state
from mimo_megatron.mcore.shard_files import HostBuffers, Part, Piece, write_part

_FAULTS = (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError)
_STATE_OF = re.compile(r"optimizer\.state\.\w+\.(\w+)\.")
_HEAD = "text.output_layer.weight"
PARTIAL, REPLACED = ".partial", ".replaced"
"""Endings of what a killed save may leave behind: the new folder, and the old one of the same name."""


@dataclass(frozen=True)
class StagedCheckpoint:
    """This rank's share of a checkpoint that is ready to be written."""

    folder: Path
    model_config: ModelConfig
    encoding: EncodingConfig | None
    state: str
    pieces: list[Piece]
    plan: Metadata | None
    """On rank 0: which tensors there are."""

    def publish(self, group: dist.ProcessGroup | None = None) -> None:
        """Write this rank's part; when all ranks have, rank 0 seals the folder and renames it.

        A collective over ``group``, which holds all ranks, and over no other: with a gloo group of its own it may run
        in a thread. ``CheckpointError`` on every rank where any failed; earlier checkpoints are untouched then.
        """
        part, fault, cause = None, "", None
        try:
            part = write_part(self._partial, dist.get_rank(), self.pieces)
        except Exception as error:  # whatever it is, every rank must hear of it
            fault, cause = _last_line(error), error
        try:
            fault = self._agree(part, fault, group)
        except RuntimeError as error:
            fault, cause = f"another rank is gone: {_last_line(error)}", error
        if fault:
            raise CheckpointError(
                f"{self.folder}: the checkpoint could not be written ({fault}); earlier ones are untouched. "
                "Look at the disk's free space and rights, then start the run again"
            ) from cause

    @property
    def _partial(self) -> Path:
        return self.folder.with_name(self.folder.name + PARTIAL)

    def _agree(self, part: Part | None, fault: str, group: dist.ProcessGroup | None) -> str:
        """Publish where every rank has written; the same answer on all ranks, empty where it went well."""
        is_first, answer = dist.get_rank() == 0, [""]
        told: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object((part, fault), told, dst=0, group=group)
        if told is not None:
            answer[0] = "; ".join(f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(told) if fault)
            if not answer[0]:
                try:
                    self._seal_and_rename([part for part, _ in told])
                except Exception as error:  # as above
                    if not isinstance(error, OSError):  # a mistake of ours: its place is needed
                        get_logger().exception("%s was not published", self.folder)
                    answer[0] = f"rank 0: {_last_line(error)}"
        dist.broadcast_object_list(answer, src=0, group=group)
        return answer[0]

    def _seal_and_rename(self, parts: Sequence[Part]) -> None:
        partial, folder = self._partial, self.folder
        FileSystemWriterAsync(partial).finish(cast(Metadata, self.plan), [part.results for part in parts])
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        write_description(partial, self.model_config)
        (partial / STATE_FILE).write_text(self.state)
        if self.encoding is not None:
            write_processor(partial, self.encoding)
        seal(partial, {name: entry for part in parts for name, entry in part.entries.items()})
        replaced = folder.with_name(folder.name + REPLACED)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        sync(folder.parent)
        if replaced.exists():
            shutil.rmtree(replaced)


def stage(
    folder: Path,
    model_config: ModelConfig,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer | None = None,
    state: dict[str, Any] | None = None,
    *,
    encoding: EncodingConfig | None = None,
    buffers: HostBuffers | None = None,
) -> StagedCheckpoint:
    """All that is needed to publish a checkpoint under ``folder``. A collective over all ranks.

    With ``buffers`` the state is copied into them and training may go on; without, it must wait for ``publish``. With
    ``encoding``, the tokenizer and pixel limits go along, so that the checkpoint can be used alone.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    strategy = _Stager()
    fault = [""]
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            fault = [f"{error}"]
    dist.broadcast_object_list(fault, src=0)  # the others wait here: they must hear of it
    try:
        if fault[0]:
            raise OSError(fault[0])
        tensors = _sharded(chunks, optimizer, is_loading=False)
        dist_checkpointing.save(
            tensors, str(partial), strategy, async_sharded_save=True, content_metadata=dict(CONTENT)
        )
    except _FAULTS as error:
        raise CheckpointError(
            f"{folder}: the checkpoint could not be begun ({_last_line(error)}); earlier ones are untouched. "
            "Look at the disk's free space and rights, then start the run again"
        ) from error
    pieces = strategy.pieces
    if buffers is not None:
        live = {tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())}
        live |= set(live_tensors(optimizer)) if optimizer else set()
        pieces = buffers.copy(pieces, frozenset(tensor.untyped_storage().data_ptr() for tensor in live))
    return StagedCheckpoint(folder, model_config, encoding, json.dumps(state or {}, indent=1), pieces, strategy.plan)


def save(
    folder: Path,
    model_config: ModelConfig,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint and publish it under ``folder`` before returning. A collective over all ranks."""
    stage(folder, model_config, chunks, optimizer, state).publish()


def load(
    folder: Path,
    model_config: ModelConfig,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer | None = None,
    *,
    keeps_head: bool = False,
) -> dict[str, Any]:
    """Fill this rank's ``chunks`` (and ``optimizer``) from ``folder`` and give its state. A collective over all ranks.

    With ``keeps_head`` the head stays as it is, and the checkpoint may be that of a model with another one.
    ``DamagedCheckpointError`` names the files that are not what was written, ``CheckpointError`` what is missing or
    belongs to another model; nothing is loaded then.
    """
    check_whole_together(folder)
    (check_body if keeps_head else check_description)(folder, model_config)
    wanted = _sharded(chunks, optimizer, is_loading=True)
    _refuse_together([*_untrained(folder, wanted), *fp8.history_problems(chunks, folder)])
    if not fp8.is_saved(chunks, folder):
        wanted.pop("fp8", None)
    heads = [chunk.pop(_HEAD, None) for chunk in wanted["model"].values()] if keeps_head else []
    try:
        loaded = dist_checkpointing.load(wanted, str(folder))
    except _FAULTS as error:
        raise CheckpointError(
            f"{folder}: cannot be read as a checkpoint of {model_config.name}: {_last_line(error)}. "
            "Take an earlier checkpoint, or convert the weights again"
        ) from error
    for number, chunk in enumerate(chunks):
        tensors = loaded["model"][f"chunk{number}"]
        if heads and heads[number] is not None:
            tensors[_HEAD] = heads[number].data
        chunk.load_state_dict(tensors, strict=True)
    if "fp8" in wanted:
        fp8.load_state(chunks, loaded["fp8"])
    if optimizer is not None:
        load_state(optimizer, loaded)
    return json.loads((folder / STATE_FILE).read_text())


def check_whole_together(folder: Path) -> None:
    """As ``manifest.check_whole``, every rank reading its share of the files. The same error on all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    refusal, faults = "", []
    try:
        faults = damaged_files(folder, share_of(read_manifest(folder), rank, size))
    except DamagedCheckpointError as error:
        refusal = str(error)
    except OSError as error:  # on one rank alone, perhaps: the others wait in the next line
        refusal = f"{folder}: rank {rank} cannot read it ({error}); look at that machine's file system"
    found: list[Any] = [None] * size
    dist.all_gather_object(found, (refusal, faults))
    for refusal, _ in found:
        if refusal:
            raise DamagedCheckpointError(refusal)
    refuse_damage(folder, [fault for _, faults in found for fault in faults])


def _untrained(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """What to say where this rank trains parts of the model of which ``folder`` holds no optimizer state."""
    own = wanted.get("optimizer", {}).get("tensors", {})
    keys = {one.key for one in nested_values(own) if isinstance(one, ShardedBase)}
    missing = sorted(keys - dist_checkpointing.load_tensors_metadata(str(folder)).keys()) if keys else []
    parts = sorted({match[1] for key in missing if (match := _STATE_OF.match(key))})
    if not missing:
        return []
    frozen = " ".join(f"train.{part}.lr=null" for part in parts)
    return [
        f"{folder}: its run did not train {', '.join(parts)}, which this recipe trains: there is no optimizer state of "
        f"{len(missing)} tensors, {missing[0]} among them. Set {frozen} to go on, or begin a new run, in another dir, "
        f"with start_from={folder}"
    ]


def _refuse_together(problems: Sequence[str]) -> None:
    """The same ``CheckpointError`` on all ranks where any of them has a problem."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(problems))
    for problem in (one for of_rank in found for one in of_rank):
        raise CheckpointError(problem)


class _Stager(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the plan of who writes what; the writing is ours."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.pieces: list[Piece] = []
        self.plan: Metadata | None = None

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        """As megatron's (strategies/torch.py:652), with another writer."""
        sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        collector = _Collector(checkpoint_dir)
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        planned = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(sharded, False), collector, None, 0, planner=planner
        )
        self.pieces, self.plan = collector.pieces, planned[0][1]
        return AsyncRequest(None, (), [])


class _Collector(FileSystemWriterAsync):
    """Takes what the plan gives this rank to write. Megatron's own would start a manager process here."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.pieces = [Piece(item, planner.resolve_data(item)) for item in plan.items]


def _last_line(error: BaseException) -> str:
    """The cause in one line; torch's checkpoint errors carry a traceback of every rank."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _sharded(
    chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    weights = {f"chunk{number}": chunk.sharded_state_dict(metadata=CONTENT) for number, chunk in enumerate(chunks)}
    scales = fp8.sharded_state(chunks)
    return {
        "model": weights,
        **({"fp8": scales} if scales else {}),
        **(sharded_state(optimizer, weights, is_loading=is_loading) if optimizer else {}),
    }
