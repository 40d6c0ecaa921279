"""Bytes of live tensor storages, counted as torch operations make and free them: exact; process memory is noise."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMeter(TorchDispatchMode):
    """``live`` and ``peak`` bytes of the storages that operations inside the block returned, views counted once.

    What an operation takes and frees inside itself is not seen. Backward passes on the CPU run in the same thread, so
    they are counted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def reset_peak(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(*tree_leaves(result))
        return result

    def count(self, *things: Any) -> None:
        """Take note of the tensors among ``things`` that come from no operation, such as those over numpy arrays."""
        for one in things:
            if isinstance(one, torch.Tensor) and one.device.type != "meta":
                self._count(one.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if (known := self._known.get(key)) is not None and known[0]() is storage:
            self._known[key] = (known[0], num_bytes)
            self._add(num_bytes - known[1])  # it was resized
            return
        self._known[key] = (weakref.ref(storage, lambda _ref, key=key: self._forget(key)), num_bytes)
        self._add(num_bytes)

    def _forget(self, key: int) -> None:
        self._add(-self._known.pop(key)[1])

    def _add(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
