"""Answers of a model to chat prompts with images and videos: greedy or sampled, with cached keys and values.

All prompts go through the model as one pack; then every unfinished and finished sequence takes one token a step until
all have ended. Dims: Q sequences, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.attention.cache import KVCache
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore.schedule import run_forward
from mimo_megatron.model.local_pack import LocalPack, local_pack
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.parallel.collectives import gather_last_dim
from mimo_megatron.parallel.mesh import Axis, Mesh
from mimo_megatron.types import EncodedSample


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most likely one. ``ConfigError`` for what chooses none."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        limits = {"max_new_tokens": (1, math.inf), "temperature": (0, 1e6), "top_p": (1e-6, 1)}
        for name, (least, most) in limits.items():
            if not least <= (value := getattr(self, name)) <= most:  # nor is not-a-number
                raise ConfigError(f"generate: {name} is {value:g}, must be from {least:g} to {most:g}")


@torch.no_grad()
def generate(
    model: VisionLanguageModel, prompts: Sequence[EncodedSample], sampling: Sampling, mesh: Mesh
) -> list[list[int]]:
    """The new token ids of every prompt, up to and without the end of turn. A collective over tp and pp.

    Prompts end in an open assistant turn. ``ConfigError`` under context or sequence parallelism: a step has one token
    per sequence.
    """
    if mesh.cp.size > 1 or model.config.sequence_parallel:
        raise ConfigError(
            f"generate: parallel.cp is {mesh.cp.size} and sequence_parallel {model.config.sequence_parallel}; a step "
            "has one token per sequence and nothing to share out: set cp=1 and sequence_parallel=false"
        )
    if not prompts:
        return []
    device = next(model.parameters()).device
    ends = model.model_config.tokens.ends
    pack, next_positions_Q = _prompt_pack(prompts, model.model_config, sampling, device)
    draw = torch.Generator(device).manual_seed(sampling.seed)
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for step in range(sampling.max_new_tokens):
        token_ids_Q = _next_tokens(model, pack, sampling, draw, mesh)
        if step:
            pack.cache.advance()  # type: ignore[union-attr]
        for row, token in enumerate(token_ids_Q.tolist()):
            is_open[row] = is_open[row] and token not in ends
            if is_open[row]:
                answers[row].append(token)
        if not any(is_open):
            break
        pack = _step_pack(pack, token_ids_Q, next_positions_Q)
        next_positions_Q = next_positions_Q + 1
    return answers


def _prompt_pack(
    prompts: Sequence[EncodedSample], model: ModelConfig, sampling: Sampling, device: torch.device
) -> tuple[LocalPack, Tensor]:
    """All prompts as one pack that asks for the logits after each one's last token; and the positions that follow."""
    batch = collate(prompts, model, sum(prompt.num_tokens for prompt in prompts))
    last_Q = torch.tensor(batch.segment_bounds[1:]) - 1
    pack = local_pack(batch, Axis(0, 1))
    pack = replace(pack, lanes=(replace(pack.lanes[0], rows_R=last_Q),))
    cache = KVCache(batch.segment_bounds, sampling.max_new_tokens, device)
    return replace(pack.to(device), cache=cache), (batch.positions_3S[0, last_Q] + 1).to(device)


def _step_pack(before: LocalPack, token_ids_Q: Tensor, positions_Q: Tensor) -> LocalPack:
    """One new token for each sequence, without images, on the same cache."""
    rows_Q = torch.arange(len(token_ids_Q), device=token_ids_Q.device)
    lane = replace(before.lanes[0], token_ids_S=token_ids_Q, rows_R=rows_Q)
    return replace(before, lanes=(lane,), positions_3S=positions_Q.expand(3, -1), pieces=(), vision=None)


def _next_tokens(
    model: VisionLanguageModel, pack: LocalPack, sampling: Sampling, draw: torch.Generator, mesh: Mesh
) -> Tensor:
    """int64 [Q], the same on every rank: chosen on the last stage, told to the others."""
    lane = pack.lanes[0]
    num_slots = len(lane.token_ids_S)
    found = run_forward([model], [pack], num_slots, lambda logits_QV, _: _choose(logits_QV, sampling, draw, mesh.tp))
    token_ids_Q = found[0] if found else lane.token_ids_S.new_empty(len(lane.rows_R))
    if mesh.pp.size > 1:
        dist.broadcast(token_ids_Q, group=mesh.pp.group, group_src=mesh.pp.size - 1)
    return token_ids_Q


def _choose(logits_QV: Tensor, sampling: Sampling, draw: torch.Generator, tp: Axis) -> Tensor:
    """int64 [Q]; every tp rank draws the same, from the same generator state."""
    logits_QV = gather_last_dim(logits_QV, tp).float()
    if sampling.temperature == 0:
        return logits_QV.argmax(-1)
    probs_QV, order_QV = (logits_QV / sampling.temperature).softmax(-1).sort(-1, descending=True)
    is_outside_QV = probs_QV.cumsum(-1) - probs_QV >= sampling.top_p  # the token that crosses top_p is kept
    chosen_Q1 = torch.multinomial(probs_QV.masked_fill(is_outside_QV, 0.0), 1, generator=draw)
    return order_QV.gather(-1, chosen_Q1).squeeze(-1)
