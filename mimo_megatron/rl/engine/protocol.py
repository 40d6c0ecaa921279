"""What every rollout engine does: the embedded one, and vLLM's.

An engine samples responses to groups of equal requests from one policy version. Invariants:

* While the gate is closed (no weights yet, an update under way or failed) nothing is sampled, and ``submit`` raises
  ``EngineError``.
* Every token says the version that sampled it; an update begins only where nothing runs.
* Prompts are never truncated: one that does not fit is refused by ``submit``.
* Placeholders of images and videos, and all tokens that only a prompt may hold, are never sampled.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.rl.sync.buckets import Bucket, Manifest
from mimo_megatron.types import EncodedSample, Rollout

ReadPrompt = Callable[[str], EncodedSample]
"""The prompt of a question, by its id. ``SampleError`` where it cannot be read, or does not fit."""


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how many responses are wanted to it: a group."""

    id: str
    """Unique among the requests that an engine holds."""
    prompt: EncodedSample
    """As the trainer reads it: one placeholder per merged vision token, pixels as patches; ends in an open assistant
    turn."""
    num_responses: int
    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token (for evaluation); a policy is trained on samples at 1 only."""
    seed: int = 0
    """Response i of equal requests with equal seeds is the same on one engine; other engines draw by other means."""
    expected_tokens: float = 0.0
    """Of its longest response. Of the requests that wait, the engine begins the longest first: a batch ends with its
    stragglers, which had better begin early (docs/rollout-scheduler.md)."""


class SamplingEngine(Protocol):
    """What a scheduler needs of an engine, or of several that act as one."""

    @property
    def num_running(self) -> int:
        """Responses that were asked for and are not yet finished, aborted or returned by ``poll``."""

    def submit(self, request: GenerationRequest) -> None:
        """Begin a group. ``EngineError`` while the gate is closed, or where the prompt and ``max_new_tokens`` do not
        fit."""

    def abort(self, request_ids: Collection[str]) -> None:
        """End these requests. On return nothing of them runs, and ``poll`` will not return any of their responses."""

    def poll(self, seconds: float) -> list[Rollout]:
        """Responses that finished since the last call; waits, or computes, for about ``seconds`` where there are none.
        ``EngineError`` where the engine is lost."""


class RolloutEngine(SamplingEngine, Protocol):
    @property
    def policy_version(self) -> int | None:
        """Of the weights held; None while the gate is closed."""

    def logprobs(self, samples: list[EncodedSample]) -> list[NDArray[np.float32]]:
        """[T - 1] of each sample: log p(token i + 1 | tokens up to i), as the engine computes it. For comparison with
        the trainer after an update (``sync/canary.py``), so it is the one thing allowed while the gate is closed."""

    def begin_update(self, manifest: Manifest) -> None:
        """Close the gate and take ``manifest`` as what will come. ``SyncError`` where it does not name exactly the
        engine's tensors, shapes and dtypes, or where something runs."""

    def receive(self, bucket: Bucket) -> None:
        """Put a bucket's tensors in place. ``SyncError`` where it is not what was announced, or its bytes are not."""

    def finish_update(self) -> None:
        """All tensors are there, every checksum is right: forget every cache of the old weights (prefixes, pictures,
        encoder outputs). The gate stays closed until ``open_gate``. ``SyncError`` else."""

    def open_gate(self) -> None:
        """The update has been compared with the trainer: sample from it."""

    def close(self) -> None:
        """End the engine; what runs is lost."""
