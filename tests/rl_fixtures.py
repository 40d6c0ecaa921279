"""For tests of rollouts: weights by Hugging Face's names, engines that hold them, and prompts."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.rl.engine.embedded import EmbeddedEngine
from mimo_megatron.rl.engine.protocol import GenerationRequest, RolloutEngine
from mimo_megatron.rl.engine.several import SeveralEngines
from mimo_megatron.rl.sync.buckets import Manifest, entry_of, pack
from mimo_megatron.types import EncodedSample, Rollout
from tests.samples import random_media, random_sample, tiny_model

MODEL = tiny_model()


def random_weights(model: ModelConfig = MODEL, seed: int = 0, scale: float = 0.08) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {spec.name: spec.shape for rule in rules_for(model) for spec in rule.hf}
    return {
        name: torch.randn(shape, generator=draw) * scale + (len(shape) == 1 and "norm" in name)
        for name, shape in shapes.items()
    }


def update(engine: RolloutEngine, weights: Mapping[str, Tensor], version: int) -> None:
    """The whole transaction, as one bucket."""
    engine.begin_update(Manifest(version, tuple(entry_of(name, tensor) for name, tensor in weights.items())))
    engine.receive(pack(version, 0, list(weights.items())))
    engine.finish_update()
    engine.open_gate()


def empty_engine(model: ModelConfig = MODEL, max_sequences: int = 16, max_tokens: int = 256) -> EmbeddedEngine:
    return EmbeddedEngine(
        model, max_sequences=max_sequences, max_tokens=max_tokens, dtype=torch.float32, device=torch.device("cpu")
    )


def engine_with(weights: Mapping[str, Tensor], model: ModelConfig = MODEL, **sizes: int) -> EmbeddedEngine:
    engine = empty_engine(model, **sizes)
    update(engine, weights, version=1)
    return engine


def prompts() -> list[EncodedSample]:
    """Of text, of one picture, of two, of a clip."""
    return [
        random_sample(1, 12),
        random_sample(2, 7, [random_media((1, 6, 4), 1)]),
        random_sample(3, 9, [random_media((1, 4, 8), 2), random_media((1, 6, 4), 1)]),
        random_sample(4, 5, [random_media((3, 4, 4), 3, 1.5)]),
    ]


def ask(name: str, prompt: EncodedSample, num_responses: int = 1, most: int = 12, **fields: float) -> GenerationRequest:
    return GenerationRequest(name, prompt, num_responses, most, **fields)  # type: ignore[arg-type]


def finished(engine: RolloutEngine) -> dict[tuple[str, int], Rollout]:
    """Everything that runs, to its end."""
    found = {}
    while engine.num_running:
        found |= {(one.request_id, one.index): one for one in engine.poll(10.0)}
    return found


def with_response(prompt: EncodedSample, rollout: Rollout) -> EncodedSample:
    token_ids_T = np.concatenate([prompt.token_ids_T, rollout.token_ids_T])
    return EncodedSample(prompt.id, token_ids_T, np.ones(len(token_ids_T), np.bool_), prompt.media)


def no_other() -> RolloutEngine:
    raise AssertionError("no engine was lost")


def several_of(engines: Sequence[RolloutEngine], another: Callable[[], RolloutEngine]) -> SeveralEngines:
    """These as one, and ``another`` in the place of each that is lost."""
    ready = list(engines)
    return SeveralEngines(lambda _: ready.pop(0) if ready else another(), len(engines))
