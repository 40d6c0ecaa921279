"""Activations kept in host memory between forward and backward, layer by layer.

What a layer saves for its backward pass is copied to the host as it is saved, and given up on the device two layers
later; when the backward pass comes to a layer, what the layer before it had saved is on its way back already. On a GPU
copies run on streams of their own, out of and into pinned memory; on the CPU the same code makes ordinary copies.
Invariants:

* Every value comes back bit for bit, with the strides of a dense tensor: no number of a step changes.
* Parameters, what a pass names as kept, and tensors below ``SMALLEST_BYTES`` stay where they are.
* At most the layer at work and ``IN_FLIGHT`` before it are on the device twice; on a GPU the host waits for their
  copies, and for nothing else.

Source of the idea: vDNN (Rhu et al., 2016, arXiv:1602.08124).
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module

SMALLEST_BYTES = 2**13
"""Below it a copy costs more than it frees: row statistics, above all."""
IN_FLIGHT = 2
"""Layers that are finished, and still on the device."""


class _Copy:
    """One tensor on the host. Alive as long as the backward pass may ask for it."""

    def __init__(self, source: Tensor, host: Tensor, layer: "_Layer", offload: "ActivationOffload") -> None:
        self.source: Tensor | None = source
        """The tensor itself, until it is given up."""
        self.version = source._version
        self.host = host
        self.fetched: Tensor | None = None
        self.layer = layer
        self._offload = offload
        offload.copied_bytes += host.nbytes
        offload.host_bytes += host.nbytes
        offload.peak_host_bytes = max(offload.peak_host_bytes, offload.host_bytes)

    def __del__(self) -> None:
        self._offload.host_bytes -= self.host.nbytes


class _Layer:
    """What one layer of one pass saved."""

    def __init__(self, previous: "_Layer | None") -> None:
        self.previous = previous
        """In the order of the forward pass."""
        self.copies: list[weakref.ref[_Copy]] = []
        self.left: torch.cuda.Event | None = None
        """When all copies are on the host."""
        self.came: torch.cuda.Event | None = None
        """When all are back."""

    def alive(self) -> Iterator[_Copy]:
        return (copy for reference in self.copies if (copy := reference()) is not None)


@dataclass(frozen=True)
class _Saved:
    """What the graph holds in place of a tensor."""

    copy: _Copy
    shape: torch.Size
    is_flat: bool
    """The copy is of its elements in a row."""


class ActivationOffload:
    """Of the stages of one model on one rank. A microbatch's forward calls ``begin``; encoder and decoder run their
    layers inside ``over``, with ``next_layer`` before each."""

    def __init__(self) -> None:
        self.copied_bytes = self.host_bytes = self.peak_host_bytes = 0
        """Brought to the host so far; there now; there at most."""
        self._layer: _Layer | None = None
        self._is_over_layers = False
        self._known: dict[tuple[Any, ...], _Copy] = {}
        """Of the layer at work: one tensor may be saved several times."""
        self._kept: set[int] = set()
        self._device = torch.device("cpu")
        self._leaving: deque[_Layer] = deque()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def begin(self) -> None:
        """Another microbatch: the layers to come follow on no others."""
        self._layer = None

    @contextlib.contextmanager
    def over(self, module: Module, *kept: Tensor) -> Iterator[None]:
        """What is saved within the block leaves the device, but for ``module``'s parameters and ``kept``, which the
        caller holds in any case."""
        if not torch.is_grad_enabled():
            yield
            return
        stays = [*kept, *module.parameters()]
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in stays}
        self._device = stays[0].device
        self._is_over_layers = True
        self.next_layer()
        with saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._end_layer()
        self._is_over_layers = False

    def next_layer(self, *_: Any) -> None:
        """A forward pre-hook of layers. Nothing where a layer is computed again in the backward pass."""
        if not self._is_over_layers:
            return
        self._end_layer()
        last = self._layer
        self._layer = _Layer(last if last is None or last.copies else last.previous)

    def _end_layer(self) -> None:
        layer = self._layer
        self._known.clear()
        if layer is None or not layer.copies or layer in self._leaving:
            return
        if self._streams is not None:
            layer.left = self._streams[0].record_event()
        self._leaving.append(layer)
        while len(self._leaving) > IN_FLIGHT:
            _give_up(self._leaving.popleft())

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        is_other = type(tensor) is not Tensor or tensor.device != self._device or tensor.nbytes < SMALLEST_BYTES
        if is_other or tensor.untyped_storage().data_ptr() in self._kept:
            return tensor.detach()  # as below
        assert self._layer is not None
        is_flat = tensor.is_contiguous()
        source = tensor.detach()  # without its graph, which would hold itself through what it saved
        source = source.view(-1) if is_flat else source
        # Storages of the layer at work are all alive, so an address is one storage's.
        place = source.untyped_storage().data_ptr(), source.storage_offset(), tensor._version
        key = (*place, source.shape, source.stride(), source.dtype)
        if key not in self._known:
            self._known[key] = _Copy(source, self._to_host(source), self._layer, self)
            self._layer.copies.append(weakref.ref(self._known[key]))
        return _Saved(self._known[key], tensor.shape, is_flat)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        copy, layer = saved.copy, saved.copy.layer
        if copy.source is None and copy.fetched is None:
            self._fetch(layer)
        if layer.came is not None:
            torch.cuda.current_stream().wait_event(layer.came)
        if layer.previous is not None:
            self._fetch(layer.previous)
        assert copy.source is None or copy.source._version == copy.version, "a saved tensor was written to"
        found = copy.source if copy.source is not None else copy.fetched
        assert found is not None
        return found.view(saved.shape) if saved.is_flat else found

    def _to_host(self, source: Tensor) -> Tensor:
        host = _empty_on_host(source)
        if not source.is_cuda:
            return host.copy_(source)
        if self._streams is None:
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        out, _ = self._streams
        out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(out):
            # ``source`` is held until the copy is over (``_give_up``), so its memory is not used again meanwhile.
            return host.copy_(source, non_blocking=True)

    def _fetch(self, layer: _Layer) -> None:
        """Bring back what the layer gave up, if it is not on its way."""
        missing = [copy for copy in layer.alive() if copy.source is None and copy.fetched is None]
        if not missing:
            return
        if self._streams is None:
            for copy in missing:
                copy.fetched = _empty_as(copy.host, copy.host.device).copy_(copy.host)
            return
        _, back = self._streams
        compute = torch.cuda.current_stream()
        fetched = [_empty_as(copy.host, compute.device) for copy in missing]
        back.wait_stream(compute)  # whose earlier kernels may still use the memory that was just allocated
        with torch.cuda.stream(back):
            for copy, room in zip(missing, fetched, strict=True):
                copy.fetched = room.copy_(copy.host, non_blocking=True)
                room.record_stream(back)  # given up unread, it is not used again before the copy is over
        layer.came = back.record_event()


def _give_up(layer: _Layer) -> None:
    """The device's memory is free, once the host has everything."""
    if layer.left is not None:
        layer.left.synchronize()
    for copy in layer.alive():
        copy.source = None


def _empty_on_host(source: Tensor) -> Tensor:
    return torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)


def _empty_as(host: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(host, device=device, pin_memory=False)
