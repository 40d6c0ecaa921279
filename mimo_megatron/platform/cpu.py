"""What megatron-core needs to run on a machine without CUDA. Installed only there, in rank processes, never undone.

Each stand-in names the place in megatron-core 0.16 that needs it. No mathematics changes: devices are renamed, streams
and memory pools do nothing, and a type name that megatron asserts on is answered as it expects.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "empty_like", "full", "ones", "randn", "tensor", "zeros", "zeros_like")
_is_installed = False


def install() -> None:
    """Install every stand-in of this module; calling it again changes nothing."""
    global _is_installed
    if _is_installed:
        return
    assert not torch.cuda.is_available(), "the CPU stand-ins would hide a CUDA device"
    _answer_device_queries()
    _map_cuda_factories()
    _keep_tensors_in_place()
    _name_cpu_types_as_cuda()
    _use_plain_rng_tracker()
    _is_installed = True


def _answer_device_queries() -> None:
    """``current_device`` (tensor_parallel/mappings.py, distributed/param_and_grad_buffer.py, p2p_communication.py),
    ``synchronize`` (p2p_communication.py:242), ``empty_cache`` (optimizer.py:362), ``nvtx`` (utils.py), streams."""
    cuda: Any = torch.cuda
    cuda.current_device = torch.get_default_device  # the CPU; meta where a model is only described
    cuda.synchronize = cuda.empty_cache = lambda *_, **__: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None


def _map_cuda_factories() -> None:
    """``torch.zeros(..., device="cuda")`` in optimizer/clip_grads.py:103 and pipeline_parallel/schedules.py:596."""

    def on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):  # embeddings/rope_utils.py:63
                kwargs["pin_memory"] = False
            return make(*args, **kwargs)

        return wrapped

    _device_constructors()  # ``torch.device("meta")`` knows the factories by identity: let it see the plain ones first
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _keep_tensors_in_place() -> None:
    """``.cuda()`` in embeddings/rope_utils.py:64, language_module.py:244 and optimizer.py:375; ``pin_memory``."""
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = lambda self, *_, **__: self
    module.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_, **__: self


def _name_cpu_types_as_cuda() -> None:
    """optimizer/distrib_optimizer.py:361, optimizer.py:671, clip_grads.py:167 sort parameters by ``tensor.type()``."""
    plain_type = torch.Tensor.type

    @functools.wraps(plain_type)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor: Any = torch.Tensor
    tensor.type = type_name


def _use_plain_rng_tracker() -> None:
    """tensor_parallel/random.py keeps one CUDA generator per parallel region; on the CPU there is one generator, whose
    state recomputation (``CheckpointFunction``) saves and restores by itself.

    No layer of ours draws random numbers in its forward (dropout is 0), and weights are drawn by name
    (``mcore/weights.py``), so forking the generator has nothing to protect.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    class PlainTracker(megatron_random.CudaRNGStatesTracker):
        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            yield

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda *_, **__: None
    megatron_random._CUDA_RNG_STATE_TRACKER = PlainTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
