"""The embedded engine: continuous batching in the trainer's own process, on one device.

A group's prompt goes through the model once and its keys and values into a row for each response; then all open rows
take one token a step. A row that ends makes room for the next group. Pictures are encoded once for each policy version,
as far as a gibibyte of their features reaches. Its limits are its simplicity: the cache has a full row for every
sequence, and the model is whole on its device.

Dims: Q open rows, V vocabulary, T tokens of a response, M merged vision tokens.
"""

import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.data.collate import collate, joined_pixels, layout_of_media, media_of
from mimo_megatron.errors import EngineError
from mimo_megatron.rl.engine.inference_model import InferenceModel
from mimo_megatron.rl.engine.protocol import GenerationRequest
from mimo_megatron.rl.sync.buckets import Bucket, Manifest, entry_of
from mimo_megatron.rl.sync.receiver import Receiver
from mimo_megatron.types import EncodedMedia, EncodedSample, Rollout

_FEATURE_BYTES = 1 << 30
"""Of pictures kept for other questions about them."""


@dataclass
class _Row:
    """One response under way. Its draws are fixed when it begins, so they do not depend on what runs beside it."""

    request: GenerationRequest
    index: int
    draws_T: NDArray[np.float64]
    """Uniform in [0, 1), one for each token it may take."""
    position: int
    """Of the next token."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one."""
        return self.request.prompt.num_tokens + len(self.token_ids) - 1


class EmbeddedEngine:
    """A ``RolloutEngine``. ``max_sequences`` responses are decoded at once; ``max_tokens`` is the longest prompt with
    its response."""

    def __init__(
        self, model: ModelConfig, *, max_sequences: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = InferenceModel(model, dtype, device)
        self._config, self._device = model, device
        self._max_sequences, self._max_tokens = max_sequences, max_tokens
        self._cache = self._model.cache(max_sequences)
        self._banned = torch.tensor(model.tokens.never_sampled, device=device)
        self._ends = model.tokens.ends
        self._waiting: list[GenerationRequest] = []
        self._rows: list[_Row] = []
        self._last_Q = torch.zeros(0, dtype=torch.int64)
        self._finished: list[Rollout] = []
        self._features: dict[bytes, Tensor] = {}
        self._receiver = Receiver({name: entry_of(name, held) for name, held in self._model.weights.items()})
        self._version: int | None = None
        self._next_version: int | None = None
        self.num_encoded = 0
        """Pictures and videos that went through the encoder since the engine began."""

    @property
    def policy_version(self) -> int | None:
        return self._version

    @property
    def num_running(self) -> int:
        return sum(request.num_responses for request in self._waiting) + len(self._rows) + len(self._finished)

    def submit(self, request: GenerationRequest) -> None:
        if self._version is None:
            raise EngineError(f"request {request.id!r}: the gate is closed; finish the update of the weights first")
        if request.temperature not in (0.0, 1.0):
            raise EngineError(
                f"request {request.id!r}: temperature {request.temperature:g} would sample another policy than the one "
                "whose log-probabilities are reported; only 1 and, for evaluation, 0 are taken"
            )
        num_tokens = request.prompt.num_tokens + request.max_new_tokens
        if num_tokens > self._max_tokens or request.num_responses > self._max_sequences:
            raise EngineError(
                f"request {request.id!r}: {request.num_responses} responses of up to {num_tokens} tokens with their "
                f"prompt; this engine takes {self._max_sequences} of {self._max_tokens}: lower rollout.max_new_tokens "
                "or group_size, raise max_sequences, or leave the question out"
            )
        self._waiting.append(request)

    def abort(self, request_ids: Collection[str]) -> None:
        ids = set(request_ids)
        self._waiting = [one for one in self._waiting if one.id not in ids]
        self._finished = [one for one in self._finished if one.request_id not in ids]
        for number in reversed(range(len(self._rows))):
            if self._rows[number].request.id in ids:
                self._drop(number)

    def poll(self, seconds: float) -> list[Rollout]:
        until = time.monotonic() + seconds
        while not self._finished and (self._rows or self._waiting):
            self.advance()
            if time.monotonic() >= until:
                break
        finished, self._finished = self._finished, []
        return finished

    def advance(self) -> None:
        """One token for every open row, new groups among them."""
        self._admit()
        if not self._rows:
            return
        lengths = [row.num_cached for row in self._rows]
        positions_Q = torch.tensor([row.position for row in self._rows], device=self._device)
        lengths_Q = torch.tensor(lengths, device=self._device)
        logits_QV = self._model.step(self._last_Q, positions_Q, lengths_Q, self._cache, max(lengths))
        for row in self._rows:
            row.position += 1
        self._take(logits_QV, 0)

    def logprobs(self, samples: list[EncodedSample]) -> list[NDArray[np.float32]]:
        batch = collate(samples, self._config, sum(sample.num_tokens for sample in samples))
        logits_TV = self._model.prefill(batch, self._encoded(samples), torch.arange(batch.num_slots))
        next_S = torch.cat([batch.token_ids_S[1:], batch.token_ids_S[:1]]).to(self._device)
        found_S = logits_TV.log_softmax(-1).gather(-1, next_S[:, None]).squeeze(-1).float().cpu().numpy()
        bounds = batch.segment_bounds
        return [found_S[bounds[place] : bounds[place + 1] - 1] for place in range(len(samples))]

    def begin_update(self, manifest: Manifest) -> None:
        if self.num_running:
            raise EngineError(f"{self.num_running} responses run; abort or await them before the weights change")
        self._version = None
        self._receiver.begin(manifest)
        self._next_version = manifest.version

    def receive(self, bucket: Bucket) -> None:
        if self._device.type == "cpu":  # copied and hashed in one pass
            self._receiver.copy(bucket, self._model.weights.__getitem__)
            return
        for name, tensor in self._receiver.take(bucket):
            self._model.weights[name].copy_(tensor)

    def finish_update(self) -> None:
        self._receiver.finish(lambda name: self._model.weights[name].cpu())
        self._features.clear()

    def open_gate(self) -> None:
        assert self._receiver.version == self._next_version, "open_gate comes after finish_update"
        self._version = self._next_version

    def close(self) -> None:
        self.abort([row.request.id for row in self._rows] + [one.id for one in self._waiting])

    def _admit(self) -> None:
        """Groups for which there are rows, all their prompts as one pack; those of long responses first, and of equal
        ones those that came first."""
        groups: list[GenerationRequest] = []
        num_free = self._max_sequences - len(self._rows)
        self._waiting.sort(key=lambda one: -one.expected_tokens)
        while self._waiting and self._waiting[0].num_responses <= num_free:
            num_free -= self._waiting[0].num_responses
            groups.append(self._waiting.pop(0))
        if not groups:
            return
        prompts = [group.prompt for group in groups]
        self._cache.reserve(max(group.prompt.num_tokens + group.max_new_tokens for group in groups))
        batch = collate(prompts, self._config, sum(prompt.num_tokens for prompt in prompts))
        ends = torch.tensor(batch.segment_bounds[1:]) - 1
        first, into, which = len(self._rows), [], []
        for place, group in enumerate(groups):
            into.append((self._cache, slice(len(self._rows), len(self._rows) + group.num_responses)))
            which += [place] * group.num_responses
            position = int(batch.positions_3S[0, ends[place]]) + 1
            self._rows += [_Row(group, index, _draws(group, index), position) for index in range(group.num_responses)]
        logits_PV = self._model.prefill(batch, self._encoded(prompts), ends, into)
        self._last_Q = torch.cat([self._last_Q, self._last_Q.new_zeros(len(which))])
        self._take(logits_PV[torch.tensor(which, device=self._device)], first)

    def _take(self, logits_QV: Tensor, first: int) -> None:
        """The next token of the rows from ``first`` on; rows that end are handed over."""
        rows = self._rows[first:]
        logprobs_QV = logits_QV.index_fill(-1, self._banned, -torch.inf).log_softmax(-1)
        draws_Q = torch.tensor([row.draws_T[len(row.token_ids)] for row in rows], device=self._device)
        chosen_Q = _choose(logprobs_QV, draws_Q)
        greedy = [number for number, row in enumerate(rows) if row.request.temperature == 0]
        chosen_Q[greedy] = logprobs_QV[greedy].argmax(-1)
        self._last_Q[first:] = chosen_Q
        found_Q = logprobs_QV.gather(-1, chosen_Q[:, None]).squeeze(-1)
        for row, token, logprob in zip(rows, chosen_Q.tolist(), found_Q.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
        for number in reversed(range(first, len(self._rows))):
            row = self._rows[number]
            if row.token_ids[-1] in self._ends or len(row.token_ids) == row.request.max_new_tokens:
                self._finished.append(self._rollout(row))
                self._drop(number)

    def _rollout(self, row: _Row) -> Rollout:
        assert self._version is not None
        return Rollout(
            request_id=row.request.id,
            index=row.index,
            token_ids_T=np.array(row.token_ids, np.int64),
            logprobs_T=np.array(row.logprobs, np.float32),
            versions_T=np.full(len(row.token_ids), self._version, np.int64),
            finish_reason="stop" if row.token_ids[-1] in self._ends else "length",
        )

    def _drop(self, number: int) -> None:
        """The last open row takes the place of this one."""
        last = self._rows.pop()
        if number < len(self._rows):
            self._cache.move(len(self._rows), number, last.num_cached)
            self._rows[number], self._last_Q[number] = last, self._last_Q[-1]
        self._last_Q = self._last_Q[:-1]

    def _encoded(self, samples: Sequence[EncodedSample]) -> Tensor | None:
        """The features of a pack of these samples; each picture is encoded once for a version."""
        media = media_of(samples)
        if not media:
            return None
        keys = [_key(one) for one in media]
        new = {key: one for key, one in zip(keys, media, strict=True) if key not in self._features}
        if new:
            assert self._config.vision is not None
            layout = layout_of_media(list(new.values()), self._config.vision)
            features_MD = self._model.encode(joined_pixels(list(new.values())), layout)
            merge = self._config.vision.merge_factor
            parts = features_MD.split([one.num_patches // merge for one in new.values()])
            self._features.update(zip(new, parts, strict=True))
            self.num_encoded += len(new)
        found = torch.cat([self._features[key] for key in keys])
        while sum(one.nbytes for one in self._features.values()) > _FEATURE_BYTES:
            del self._features[next(iter(self._features))]  # the oldest
        return found


def _draws(request: GenerationRequest, index: int) -> NDArray[np.float64]:
    return np.random.default_rng((request.seed, index)).random(request.max_new_tokens)


def _choose(logprobs_QV: Tensor, draws_Q: Tensor) -> Tensor:
    """int64 [Q]: the token in whose part of the unit interval the draw falls."""
    ends_QV = logprobs_QV.double().exp().cumsum(-1)
    points_Q = draws_Q * ends_QV[:, -1] * (1 - 2**-50)  # rounding never reaches the end, past the last token
    return torch.searchsorted(ends_QV, points_Q[:, None], right=True).squeeze(-1)


def _key(one: EncodedMedia) -> bytes:
    return hashlib.sha256(repr(one.grid).encode() + one.pixels_PZ.tobytes()).digest()
