"""Data-parallel communication beside computation: gradients are reduced while the backward pass goes on, parameters
gathered while the next forward pass has not come to them.

Buckets and collectives are megatron's; when they start is decided here. Megatron's own wrapper starts a reduction once
every parameter of a bucket got its gradient, as often as in the first step, and a gather where a forward pass comes to
it. Packs without pictures give encoder and projector neither gradient nor forward pass, on some data-parallel ranks and
not on others: a reduction would never start, and ranks would issue collectives in different orders. Hence:

* All ranks start reductions in one order, that of the backward pass. Gradients that are ready wait for those before
  them; what the backward pass left over starts at its end.
* A gradient that comes to parameters whose reduction has started is an error, never a wrong sum.
* All gathers start after the update, in the order of the forward pass. They are waited for where a module uses its
  parameters, and by name (``gathered``, ``finish_param_gather``) where somebody else reads them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module, Parameter

from mimo_megatron.config.run import TrainConfig


@dataclass(frozen=True)
class Overlap:
    """``bucket_size`` is in parameters; None is megatron's default, which grows with the data-parallel ranks."""

    grad_reduce: bool = False
    param_gather: bool = False
    bucket_size: int | None = None

    @classmethod
    def of(cls, train: TrainConfig) -> "Overlap":
        return cls(train.overlap_grad_reduce, train.overlap_param_gather, train.ddp_bucket_size)

    def wrap(self, chunks: Sequence[Any], *, grad_reduce_in_fp32: bool) -> list[DistributedDataParallel]:
        """The chunks of one rank in megatron's wrapper. Of an interleaved schedule's chunks the first alone is cut into
        buckets, as megatron's trainer does: the others' communication has the first one's computation beside it."""
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=grad_reduce_in_fp32,
            use_distributed_optimizer=True,
            overlap_grad_reduce=self.grad_reduce,
            overlap_param_gather=self.param_gather,
            bucket_size=self.bucket_size,
        )
        wrapped = [
            DistributedDataParallel(
                config=chunk.config,
                ddp_config=ddp,
                module=chunk,
                disable_bucketing=self.grad_reduce and number > 0,
            )
            for number, chunk in enumerate(chunks)
        ]
        if self.param_gather:
            for chunk in wrapped:
                _wait_where_parameters_are_used(chunk)
        return wrapped


NO_OVERLAP = Overlap()


class GradReduction:
    """Starts the reductions of one rank's chunks while their gradients come; see the module's invariants.

    ``no_sync`` is what megatron's schedules enter for all microbatches of a chunk but the last one.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._order = [(chunk, group) for chunk in reversed(chunks) for group in chunk.bucket_groups]
        for place, (_, group) in enumerate(self._order):
            for param in group.params:
                # Behind megatron's hook, which adds the gradient to the buffer: a node's hooks run as registered.
                get_gradient_edge(param).node.register_hook(partial(self._arrived, place, param))
        self.reset()

    def reset(self) -> None:
        """For the next step."""
        self._is_last_microbatch = False
        self._num_started = 0
        self._missing = [set(group.params) for _, group in self._order]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block gradients are added up on this rank alone; after it they are a step's last ones."""
        self._is_last_microbatch = False
        yield
        self._is_last_microbatch = True

    def start_rest(self) -> None:
        """What the backward pass did not start: all of it where nothing came last, such as a pack without pictures."""
        while self._num_started < len(self._order):
            self._start_next()

    def _arrived(self, place: int, param: Parameter, *_: Any) -> None:
        if not self._is_last_microbatch:
            return
        assert place >= self._num_started, "a gradient came to parameters whose reduction has started"
        self._missing[place].discard(param)
        while self._num_started < len(self._order) and not self._missing[self._num_started]:
            self._start_next()

    def _start_next(self) -> None:
        chunk, group = self._order[self._num_started]
        self._num_started += 1
        group.start_grad_sync(force_all_reduce=chunk.force_all_reduce)


def start_param_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """After an update: every rank's shards on their way to all, in the order of the forward pass. Nothing where
    parameters are gathered by the update itself."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in reversed(chunk.bucket_groups):
                group.start_param_sync()


def finish_param_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Every parameter is whole. Not a collective: it waits for those that ``start_param_gather`` issued."""
    for chunk in chunks:
        for group in reversed(chunk.bucket_groups):
            _finish(group)


def gathered(param: Parameter) -> Parameter:
    """``param``, once it is whole: for what reads it outside its own module's forward."""
    finish = getattr(param, "finish_gather", None)
    if finish is not None:
        finish()
    return param


def _wait_where_parameters_are_used(chunk: DistributedDataParallel) -> None:
    chunk.disable_forward_pre_hook(param_sync=False)  # megatron's, which would start gathers as well
    groups = chunk.param_to_bucket_group
    for param, group in groups.items():
        param.finish_gather = partial(_finish, group)
    for module in chunk.module.modules():
        own = [param for param in module.parameters(recurse=False) if param in groups]
        if own:
            module.register_forward_pre_hook(partial(_wait_for, own))


def _wait_for(params: Sequence[Parameter], _module: Module, _inputs: Any) -> None:
    for param in params:
        gathered(param)


def _finish(group: Any) -> None:
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)
