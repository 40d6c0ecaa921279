"""vLLM's engine, used offline in this process: token ids and pixels in, tokens and log-probabilities out.

Runs in vLLM's environment. Invariants: while the gate is closed no response is sampled; what ``submit`` reports of a
prompt (its expanded ids, its patches) is what vLLM will run on; after an update no cache knows the old weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind

from mimo_megatron.errors import EngineError, SyncError
from mimo_megatron.rl.engine.vllm_wire import EngineSettings, ids_hash, pixels_hash
from mimo_megatron.rl.engine.vllm_worker import AWAITED, BANNED_KEY, BannedTokens, WorkerParts
from mimo_megatron.rl.sync.buckets import Bucket, Manifest, checksum
from mimo_megatron.rl.sync.receiver import Receiver
from mimo_megatron.rl.sync.shared_memory import SlotReader

_SEED_BITS = 63


@dataclass(frozen=True)
class Finished:
    """A response."""

    request_id: str
    index: int
    token_ids_T: NDArray[np.int64]
    logprobs_T: NDArray[np.float32]
    version: int
    reason: str


@dataclass(frozen=True)
class Medium:
    """A picture as it came from the trainer: already resized."""

    kind: str
    frames_FHW3: NDArray[np.uint8]
    seconds_per_grid: float


class OfflineEngine:
    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._vllm = LLMEngine.from_engine_args(_arguments(settings))
        self._vllm.collective_rpc("mimo_prepare", args=(settings.trained_model,))
        entries = Manifest.from_json(Path(settings.tensors).read_bytes()).tensors
        self._expected = {entry.name: entry for entry in entries}
        self._receiver = Receiver(self._expected)
        self._checksums: dict[str, int] = {}
        self._coming = self._held = -1
        self._is_updating = self._is_open = False
        self.memory: SlotReader | None = None
        """Where buckets of this machine's trainer lie; None where they come as bytes."""
        self._media: dict[str, Medium] = {}
        self._running: dict[str, tuple[str, int]] = {}
        """vLLM's request -> (request of the trainer, index of the response)."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add_medium(self, key: str, medium: Medium) -> None:
        self._media[key] = medium

    def forget_media(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._media.pop(key, None)

    def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        media: Sequence[str],
        num_responses: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> dict[str, Any]:
        """Begin a group; what vLLM has made of its prompt. Its responses share the prefill by the prefix cache."""
        if not self._is_open:
            raise EngineError("the gate is closed: no weights that were compared with the trainer's")
        if any(running == request_id for running, _ in self._running.values()):
            raise EngineError(f"request {request_id!r} runs already; give each an id of its own")
        prompt, report = self._render(token_ids, media)
        for index in range(num_responses):
            parameters = SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=_seed(seed, index),
                logprobs=0,
                stop_token_ids=self._settings.ends,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            name = f"{index}/{request_id}"
            self._running[name] = (request_id, index)
            try:
                self._vllm.add_request(name, prompt, parameters)
            except ValueError:  # the group is refused as a whole
                self.abort([request_id])
                raise
        return report

    def abort(self, request_ids: Sequence[str]) -> None:
        """vLLM runs in this thread, so nothing of them runs on return."""
        ended = [name for name, (request_id, _) in self._running.items() if request_id in set(request_ids)]
        self._vllm.abort_request(ended)
        for name in ended:
            del self._running[name]

    def abort_all(self) -> None:
        self.abort([request_id for request_id, _ in self._running.values()])

    def step(self) -> list[Finished]:
        """One pass of the model over what runs; the responses that it completed."""
        finished = []
        for output in self._vllm.step():
            if output.finished and output.request_id in self._running:
                finished.append(self._response(output))
        return finished

    def logprobs(self, token_ids: Sequence[int], media: Sequence[str]) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """What vLLM has made of the prompt, and log p of each of its tokens after the first, by its prefill.

        Neither banned tokens nor the prefix cache play a part. Only where nothing else runs.
        """
        if self._running or self._is_updating:
            raise EngineError("log-probabilities of a prompt are computed only where nothing runs and no update does")
        prompt, report = self._render(token_ids, media)
        parameters = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._vllm.add_request("logprobs", prompt, parameters)
        outputs: list[RequestOutput] = []
        while self._vllm.has_unfinished_requests():
            outputs += self._vllm.step()
        (output,) = outputs
        assert output.prompt_token_ids is not None and output.prompt_logprobs is not None
        later = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return report, np.array([found[token].logprob for token, found in later], np.float32)

    def begin_update(self, manifest: Manifest) -> None:
        self._is_open = False
        if self._running:
            raise SyncError(f"{self.num_running} responses are being sampled; abort them before an update")
        self._checksums, self._coming = {}, manifest.version  # so a refused manifest does not let the old weights pass
        self._receiver.begin(manifest)
        self._vllm.collective_rpc("mimo_begin_update")
        self._is_updating = True

    def receive(self, bucket: Bucket) -> None:
        tensors = list(self._receiver.take(bucket))  # all of the bucket is checked before vLLM sees any of it
        self._checksums |= {one.entry.name: one.checksum for one in bucket.tensors}
        self._vllm.collective_rpc("mimo_load", args=(tensors,))

    def finish_update(self) -> dict[str, int]:
        """How many tensors could be read back and compared; the others vLLM has rearranged."""
        self._receiver.finish()
        self._receiver, earlier = Receiver(self._expected), self._receiver  # what fails below may be sent again
        (missing,) = self._vllm.collective_rpc("mimo_finish_update")
        self._is_updating = False
        if missing:
            raise SyncError(f"{len(missing)} parameters of vLLM's were reached by no tensor, such as {missing[0]}")
        num_read_back = sum(self._is_held(name, sent) for name, sent in self._checksums.items())
        if not self._vllm.reset_prefix_cache():
            raise SyncError("vLLM did not reset its prefix cache: something still holds its blocks")
        self._vllm.reset_mm_cache()
        self._vllm.reset_encoder_cache()
        self._receiver, self._held = earlier, self._coming
        return {"num_tensors": len(self._checksums), "num_read_back": num_read_back}

    def open_gate(self) -> None:
        if self._is_updating or self._held != self._coming or self._held < 0:
            raise EngineError(f"no complete weights: version {self._coming} did not arrive; send them again")
        self._is_open = True

    def forget_trainer(self) -> None:
        """Its connection has ended: nothing is sampled until another sends weights, of whatever version."""
        self._is_open, self._coming, self._held = False, -1, -1
        self._receiver = Receiver(self._expected)

    def status(self) -> dict[str, Any]:
        return {
            "num_running": self.num_running,
            "num_unfinished": self._vllm.get_num_unfinished_requests(),
            "version": self._held if self._is_open else None,
            "media": len(self._media),
        }

    def _is_held(self, name: str, sent: int) -> bool:
        (held,) = self._vllm.collective_rpc("mimo_held", args=(name,))
        if held is None:
            return False
        if (found := checksum(held.contiguous().cpu())) != sent:
            raise SyncError(f"{name}: the model holds bytes of checksum {found:016x}, {sent:016x} were sent")
        return True

    def _response(self, output: RequestOutput) -> Finished:
        request_id, index = self._running.pop(output.request_id)
        (one,) = output.outputs
        assert one.logprobs is not None and one.finish_reason is not None
        logprobs = [found[token].logprob for token, found in zip(one.token_ids, one.logprobs, strict=True)]
        return Finished(
            request_id,
            index,
            np.array(one.token_ids, np.int64),
            np.array(logprobs, np.float32),
            self._held,
            one.finish_reason,
        )

    def _render(self, token_ids: Sequence[int], media: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """The prompt after vLLM's own processor, and what the trainer compares: ids and patches."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        if unknown := [key for key in media if key not in self._media]:
            raise EngineError(f"the pixels of {unknown[0]} never came")
        if media:
            chosen = [(key, self._media[key]) for key in media]
            data: dict[str, list[Any]] = {}
            keys: dict[str, list[str]] = {}
            for key, one in chosen:
                data.setdefault(one.kind, []).append(_vllm_medium(one))
                keys.setdefault(one.kind, []).append(key)
            # the pictures have their size already; without this a very flat one would be resized again
            prompt |= {"multi_modal_data": data, "multi_modal_uuids": keys, "mm_processor_kwargs": {"do_resize": False}}
        parsed = parse_model_prompt(self._vllm.model_config, prompt)
        (rendered,) = self._vllm.renderer.render_cmpl([parsed])
        expanded = np.array(rendered["prompt_token_ids"], np.int64)
        videos = rendered.get("mm_kwargs", {}).get("video", ())
        report = {
            "num_tokens": len(expanded),
            "ids_hash": ids_hash(expanded),
            "pixels": _patches(rendered),
            "seconds": [one["second_per_grid_ts"].data.item() for one in videos],
        }
        return rendered, report


def _arguments(settings: EngineSettings) -> EngineArgs:
    return EngineArgs(
        model=settings.model,
        load_format=AWAITED,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_sequences,
        kv_cache_memory_bytes=settings.kv_cache_bytes,
        enforce_eager=True,
        enable_prefix_caching=True,
        async_scheduling=False,  # a step in flight could not be aborted
        mm_processor_cache_gb=0,
        mm_device_do_normalize=True,  # its processor then hands over raw pixels, which can be compared
        generation_config="vllm",  # no sampling defaults from files
        logprobs_mode="processed_logprobs",
        logits_processors=[BannedTokens],
        additional_config={BANNED_KEY: settings.banned},
        worker_extension_cls=f"{WorkerParts.__module__}.{WorkerParts.__qualname__}",
        disable_log_stats=True,
    )


def _vllm_medium(one: Medium) -> Any:
    if one.kind == "image":
        return Image.fromarray(one.frames_FHW3[0])
    num_frames = len(one.frames_FHW3)
    fps = 2 / one.seconds_per_grid  # a temporal grid step is two frames
    metadata = {"fps": fps, "total_num_frames": num_frames, "frames_indices": list(range(num_frames))}
    return one.frames_FHW3, {**metadata, "duration": num_frames / fps, "do_sample_frames": False}


def _patches(rendered: Any) -> dict[str, list[str]]:
    """Hashes of the patches that vLLM's encoder gets, by kind, in the order of the prompt."""
    found: dict[str, list[str]] = {}
    for kind, items in rendered.get("mm_kwargs", {}).items():
        name = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
        for item in items:
            found.setdefault(kind, []).append(pixels_hash(_raw_pixels(item[name].data)))
    return found


def _raw_pixels(values: torch.Tensor) -> NDArray[np.uint8]:
    """vLLM normalises on its device, so its processor hands over raw patches, in merge-block order."""
    if values.dtype != torch.uint8:
        raise EngineError(f"vLLM's processor made {values.dtype} patches; raw uint8 pixels are needed to compare them")
    return values.numpy()


def _seed(seed: int, index: int) -> int:
    """Far apart for each response, whatever the requests' seeds."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{index}".encode()) >> (64 - _SEED_BITS)
