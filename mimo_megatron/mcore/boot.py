"""Start and end megatron-core in one rank process: collectives, parallel groups, the mesh."""

import contextlib
import datetime
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mimo_megatron import platform
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.parallel.mesh import Axis, Mesh, data_parallel_size

DEFAULT_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class RankAddress:
    """Where one rank stands in the job. ``init_method`` is a rendezvous URL, ``env://`` under torchrun."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str = "env://"

    @classmethod
    def from_environment(cls) -> "RankAddress":
        """This process's address as torchrun states it; one rank of one where it was not started by torchrun."""
        if "RANK" not in os.environ:
            return cls(0, 1, 0, "")
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def megatron(
    parallel: ParallelConfig, address: RankAddress, seed: int = 1, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
) -> Iterator[Mesh]:
    """The mesh of a started job; groups are destroyed on the way out. A collective fails after ``timeout_seconds``.

    After an exception no collective is issued: the process group is left to the process's end.
    """
    data_parallel_size(address.world_size, parallel.tp, parallel.pp, parallel.cp)
    here = platform.current()
    platform.prepare_megatron()
    if not here.is_cpu:
        torch.cuda.set_device(address.local_rank)
    _start_collectives(here, address, datetime.timedelta(seconds=timeout_seconds))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    if not here.is_cpu:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    yield current_mesh()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def side_store(name: str) -> dist.Store:
    """A key-value store shared by all ranks, on a connection of its own: it answers while a collective hangs."""
    # The default group's own store; torch has no public name for it.
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]


def _start_collectives(here: platform.Platform, address: RankAddress, timeout: datetime.timedelta) -> None:
    if dist.is_initialized():
        return
    if address.init_method:
        dist.init_process_group(
            here.backend,
            init_method=address.init_method,
            rank=address.rank,
            world_size=address.world_size,
            timeout=timeout,
        )
        return
    assert address.world_size == 1
    dist.init_process_group(here.backend, store=dist.HashStore(), rank=0, world_size=1)


def current_mesh() -> Mesh:
    """The mesh of megatron's parallel state."""
    state = parallel_state
    return Mesh(
        tp=Axis(
            state.get_tensor_model_parallel_rank(),
            state.get_tensor_model_parallel_world_size(),
            state.get_tensor_model_parallel_group(),
        ),
        cp=Axis(
            state.get_context_parallel_rank(),
            state.get_context_parallel_world_size(),
            state.get_context_parallel_group(),
        ),
        dp=Axis(state.get_data_parallel_rank(), state.get_data_parallel_world_size(), state.get_data_parallel_group()),
        pp=Axis(
            state.get_pipeline_model_parallel_rank(),
            state.get_pipeline_model_parallel_world_size(),
            state.get_pipeline_model_parallel_group(),
        ),
        tp_cp=Axis(
            state.get_tensor_and_context_parallel_rank(),
            state.get_tensor_and_context_parallel_world_size(),
            state.get_tensor_and_context_parallel_group(),
        ),
    )


def world() -> Axis:
    """All ranks of the job as one axis."""
    return Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
