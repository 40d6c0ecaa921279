"""One reward model behind HTTP, in two dialects.

``native`` is ours: ``POST /v1/rewards`` with a batch, calibrated by the model's own manifest. ``vllm`` is vLLM's
``POST /classify``, one conversation a request; ``use_activation`` false gives the raw score of a model with one label,
which is calibrated here. Nothing a replica says is believed before it is checked.
"""

import asyncio
import json
import math
from typing import Any

import httpx
from pydantic import ValidationError

from mimo_megatron.config.calibration import Calibration
from mimo_megatron.reward.images import data_url
from mimo_megatron.reward.service.breaker import Breaker
from mimo_megatron.reward.service.settings import ModelSpec
from mimo_megatron.reward.verdict import Reason, Verdict, invalid, unknown
from mimo_megatron.reward.wire import Message, ModelItem, ModelRequest, ModelResponse, ModelResult

ATTEMPT_SECONDS = 30.0
CONNECT_SECONDS = 2.0
MAX_ANSWER_BYTES = 4 << 20
_FAULTS_OF_THE_ANSWER = {Reason.TOO_LARGE, Reason.NO_ANSWER, Reason.TRUNCATED, Reason.UNREADABLE}


class ReplicaFailed(Exception):
    """It could not be reached, was too slow, or answered what it should not."""


class _Http:
    def __init__(self, spec: ModelSpec, attempt_seconds: float) -> None:
        self.url = spec.url
        self.breaker = Breaker()
        self.in_flight = 0
        self.version: str | None = None
        """Of the model, known after the first answer."""
        timeout = httpx.Timeout(attempt_seconds, connect=CONNECT_SECONDS)
        self._seconds = attempt_seconds
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=32)
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {spec.token}"} if spec.token else {})
        self._http = httpx.AsyncClient(
            headers=headers, timeout=timeout, limits=limits, trust_env=False, follow_redirects=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def _get(self, path: str) -> bytes:
        """As ``_post``, within the time that a connection may take."""
        return await self._ask("GET", path, None, CONNECT_SECONDS)

    async def _post(self, path: str, content: str | bytes) -> bytes:
        """The body of an answer 200. ``ReplicaFailed``."""
        return await self._ask("POST", path, content, self._seconds)

    async def _ask(self, method: str, path: str, content: str | bytes | None, seconds: float) -> bytes:
        """A trickle of bytes does not prolong the time, which counts from the start; nothing is decompressed."""
        body = bytearray()
        headers = {"content-type": "application/json"}
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream(method, self.url + path, content=content, headers=headers) as answer,
            ):
                if answer.status_code != 200:
                    raise ReplicaFailed(f"{self.url}{path} answered {answer.status_code}")
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise ReplicaFailed(f"{self.url}{path} answered more than {MAX_ANSWER_BYTES} bytes")
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL) as error:
            raise ReplicaFailed(f"{self.url}{path}: {error!r}") from error
        return bytes(body)


class NativeReplica(_Http):
    async def is_ready(self) -> bool:
        """Ready replicas may name their ``model_version`` before the first item is asked."""
        try:
            tree = _json(await self._get("/readyz") or b"{}")
        except ReplicaFailed:
            return False
        if self.version is None and isinstance(tree, dict) and isinstance(tree.get("model_version"), str):
            self.version = tree["model_version"]
        return True

    async def rewards(self, items: list[ModelItem], images: dict[str, bytes]) -> list[Verdict]:
        """One verdict an item, in order. ``ReplicaFailed`` where it gives none."""
        body = await self._post("/v1/rewards", ModelRequest(items=items).model_dump_json())
        try:
            answer = ModelResponse.model_validate_json(body)
        except ValidationError as error:
            raise ReplicaFailed(
                f"{self.url} answered what is no ModelResponse: {error.error_count()} errors"
            ) from error
        if [one.id for one in answer.results] != [item.id for item in items]:
            raise ReplicaFailed(f"{self.url} answered other items than it was asked for")
        self.version = answer.model_version
        return [_native_verdict(one) for one in answer.results]


class VllmReplica(_Http):
    def __init__(self, spec: ModelSpec, attempt_seconds: float) -> None:
        super().__init__(spec, attempt_seconds)
        assert spec.calibration is not None
        self._calibration: Calibration = spec.calibration

    async def is_ready(self) -> bool:
        try:
            if self.version is None:
                self.version = f"vllm:{_json(await self._get('/v1/models'))['data'][0]['id']}"
            await self._get("/health")
        except (ReplicaFailed, LookupError, TypeError):
            return False
        return True

    async def rewards(self, items: list[ModelItem], images: dict[str, bytes]) -> list[Verdict]:
        asked = [asyncio.ensure_future(self._one(item, images)) for item in items]
        try:
            return list(await asyncio.gather(*asked))
        finally:
            for one in asked:
                one.cancel()

    async def _one(self, item: ModelItem, images: dict[str, bytes]) -> Verdict:
        messages = [_openai(message, images) for message in item.messages]
        messages.append({"role": "assistant", "content": item.response})
        request = httpx.Request("POST", self.url, json={"messages": messages, "use_activation": False})
        body = await self._post("/classify", request.content)
        try:
            (row,) = _json(body)["data"]
            (score,) = row["probs"]
            score = float(score)
        except (ValueError, LookupError, TypeError) as error:
            raise ReplicaFailed(f"{self.url} did not answer one score: {error!r}") from error
        if not math.isfinite(score):
            raise ReplicaFailed(f"{self.url} answered the score {score}")
        return Verdict("ok", self._calibration.reward(score), Reason.PARTIAL, {"score": score})


def make_replica(spec: ModelSpec, attempt_seconds: float = ATTEMPT_SECONDS) -> "NativeReplica | VllmReplica":
    return (NativeReplica if spec.calibration is None else VllmReplica)(spec, attempt_seconds)


def _native_verdict(one: ModelResult) -> Verdict:
    if one.reward is not None:
        parts = {} if one.score is None else {"score": one.score}
        return Verdict("ok", one.reward, Reason.PARTIAL, parts)
    return invalid(one.reason) if one.reason in _FAULTS_OF_THE_ANSWER else unknown(one.reason)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ReplicaFailed(f"an answer of {len(body)} bytes is no JSON") from error


def _openai(message: Message, images: dict[str, bytes]) -> dict[str, Any]:
    """The message as vLLM takes it; pictures travel inside, so that vLLM fetches nothing."""
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(images[part["image"]])}}
        if part["type"] == "image"
        else part
        for part in message.content
    ]
    return {"role": message.role, "content": parts}
