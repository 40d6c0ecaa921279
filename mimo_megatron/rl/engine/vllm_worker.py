"""What is put into vLLM's own worker: weights that come in buckets after the start, and a ban on tokens.

Runs inside vLLM.

vLLM rearranges many weights when it has loaded them (on the CPU all linears become oneDNN's), so a tensor cannot be
copied into a running model. Its layer-wise reload (what its own NCCL and IPC transfers use) takes tensors in the
checkpoint's form: a layer's tensors are kept until the layer is complete, then rearranged and copied over the old ones.
So an update needs room for its buckets and the incomplete layers, never for a second model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

BANNED_KEY = "mimo_megatron_banned"
AWAITED = "mimo_megatron_awaited"


@register_model_loader(AWAITED)
class AwaitedWeights(BaseModelLoader):
    """A ``load_format`` for weights that come with the first update.

    vLLM's own ``dummy`` would draw buffers as well, among them the pictures' mean and standard deviation, which no
    update brings: log-probabilities after a picture were then wrong by more than 1.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to fetch."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()


class BannedTokens(LogitsProcessor):
    """Takes the banned tokens out of the distribution before sampling, and so out of the reported log-probabilities."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.banned = torch.tensor(vllm_config.additional_config[BANNED_KEY], dtype=torch.long, device=device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing: all requests are treated alike."""

    def apply(self, logits: Tensor) -> Tensor:
        return logits.index_fill_(-1, self.banned, float("-inf"))


class WeightUpdates:
    """vLLM mixes this class into its worker (``worker_extension_cls``); called by ``collective_rpc``."""

    vllm_config: VllmConfig
    model_runner: Any
    _mimo_loaded: set[str] | None = None
    """vLLM's names of what the running update has brought; None while there is none."""

    def mimo_begin_update(self) -> None:
        """Begin, also where an update was broken off: what that one left is put aside."""
        with self._mimo_context() as model:
            if self._mimo_loaded is not None:
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            self._mimo_loaded = set()
            initialize_layerwise_reload(model)

    def mimo_load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Tensors by their Hugging Face names; vLLM may keep them until their layer is complete."""
        assert self._mimo_loaded is not None, "no update was begun"
        with self._mimo_context() as model:
            self._mimo_loaded |= model.load_weights(tensors)

    def mimo_finish_update(self) -> list[str]:
        """Parameters of vLLM's that no tensor has reached."""
        assert self._mimo_loaded is not None, "no update was begun"
        with self._mimo_context() as model:
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            missing = {name for name, _ in model.named_parameters()} - self._mimo_loaded
        self._mimo_loaded = None
        return sorted(missing)

    def mimo_held(self, name: str) -> Tensor | None:
        """What the model holds of a tensor; None where it has been rearranged and cannot be read back."""
        model = self.model_runner.get_model()
        mapped = model.hf_to_vllm_mapper.map_name(name) if hasattr(model, "hf_to_vllm_mapper") else name
        module, _, parameter = mapped.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        for packed, parts in model.packed_modules_mapping.items():
            if leaf in parts and leaf != packed:
                return _slice_of_packed(model, f"{parent}.{packed}", parameter, parts.index(leaf))
        found = dict(model.named_parameters()).get(mapped)
        return found.detach() if found is not None and found.numel() else None

    @contextmanager
    def _mimo_context(self) -> Iterator[Any]:
        with set_current_vllm_config(self.vllm_config), torch.inference_mode():
            yield self.model_runner.get_model()


def _slice_of_packed(model: nn.Module, module: str, parameter: str, part: int) -> Tensor | None:
    """Rows of a linear that vLLM has made of several."""
    linear = model.get_submodule(module)
    held = getattr(linear, parameter)
    if not held.numel():
        return None
    sizes = linear.output_sizes
    return held.detach().split(sizes)[part]
