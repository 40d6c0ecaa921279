"""What is put into vLLM's own worker: weights that come in buckets after the start, a ban on tokens, positions.

Runs inside vLLM.

vLLM rearranges many weights when it has loaded them (on the CPU all linears become oneDNN's), so a tensor cannot be
copied into a running model. Its layer-wise reload (what its own NCCL and IPC transfers use) takes tensors in the
checkpoint's form: a layer's tensors are kept until the layer is complete, then rearranged and copied over the old ones.
So an update needs room for its buckets and the incomplete layers, never for a second model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from mimo_megatron.config.model import ModelConfig as TrainedModel
from mimo_megatron.data.positions import mrope_positions
from mimo_megatron.types import EncodedMedia

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


def trainer_positions(
    trained: TrainedModel, token_ids: Sequence[int], features: Sequence[MultiModalFeatureSpec]
) -> tuple[Tensor, int]:
    """What vLLM's ``get_mrope_input_positions`` returns, by the trainer's rule: [3, T] positions of a prompt, and the
    position of a later token less its place. vLLM has one of the two rules for what comes after a video."""
    media = [_grid_alone(one) for one in sorted(features, key=lambda one: one.mm_position.offset)]
    positions_3T = mrope_positions(np.array(token_ids, np.int64), media, trained)
    return torch.from_numpy(positions_3T), int(positions_3T[:, -1].max()) + 1 - len(token_ids)


def _grid_alone(feature: MultiModalFeatureSpec) -> EncodedMedia:
    data = feature.data
    assert data is not None
    frames, rows, columns = data[f"{feature.modality}_grid_thw"].data.tolist()
    seconds = data["second_per_grid_ts"].data.item() if feature.modality == "video" else 0.0
    return EncodedMedia(feature.modality, np.zeros((0, 0), np.uint8), (frames, rows, columns), seconds)


class WorkerParts:
    """vLLM mixes this class into its worker (``worker_extension_cls``); called by ``collective_rpc``."""

    vllm_config: VllmConfig
    model_runner: Any
    _mimo_loaded: set[str] | None = None
    """vLLM's names of what the running update has brought; None while there is none."""

    def mimo_prepare(self, trained: dict[str, Any]) -> None:
        """From now on prompts with media are counted as in the trainer, and a pass may end inside a prompt."""
        runner = self.model_runner
        model = runner.get_model()
        if hasattr(model, "get_mrope_input_positions"):
            model.get_mrope_input_positions = partial(trainer_positions, TrainedModel.model_validate(trained))
        if runner.device.type == "cpu":
            runner._bookkeeping_sync = partial(_without_rewinding, runner, runner._bookkeeping_sync)

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


def _without_rewinding(runner: Any, book: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """After a pass that ends inside a prompt vLLM takes back what the response's generator drew, which those of the
    CPU cannot do (``CPU Generator does not use offset``). Left as it is, later draws are as random."""
    generators, runner.input_batch.generators = runner.input_batch.generators, {}
    try:
        return book(*args, **kwargs)
    finally:
        runner.input_batch.generators = generators


def _slice_of_packed(model: nn.Module, module: str, parameter: str, part: int) -> Tensor | None:
    """Rows of a linear that vLLM has made of several."""
    linear = model.get_submodule(module)
    held = getattr(linear, parameter)
    if not held.numel():
        return None
    sizes = linear.output_sizes
    return held.detach().split(sizes)[part]
