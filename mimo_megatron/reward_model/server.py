"""``serve-reward-model``: one reward model behind HTTP, as the reward service asks for it (``reward/wire.py``).

Requests that wait while the model is busy are scored together in the next packs; what is in a pack does not change a
score.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError

from mimo_megatron import __version__
from mimo_megatron.config.calibration import read_calibration
from mimo_megatron.config.run import EncodingConfig, ParallelConfig, Precision
from mimo_megatron.evaluation.opened import opened
from mimo_megatron.log import get_logger
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.reward.service.gate import Gate, error_body
from mimo_megatron.reward.service.http_server import bound, check_address, serve_on
from mimo_megatron.reward.wire import ModelItem, ModelRequest, ModelResponse, ModelResult
from mimo_megatron.reward_model.judge import Judge, version_of

MAX_WAITING_ITEMS = 2048
MAX_ITEMS_AT_ONCE = 64
_HELD_BYTES, _BODY_SECONDS = 128 << 20, 30.0
Result = TypeVar("Result")
_Waiting = tuple[list[ModelItem], "asyncio.Future[list[ModelResult]]"]


def serve_reward_model(
    source: Path,
    encoding: EncodingConfig,
    scratch: Path,
    *,
    host: str,
    port: int,
    token: str | None = None,
    image_root: Path | None = None,
    precision: Precision = "fp32",
    pack_tokens: int = 8192,
) -> None:
    """Until SIGTERM or SIGINT. One line of JSON on stdout says the address, once the model is loaded.

    ``CheckpointError`` where the model has no calibration, ``ConfigError`` where others could reach it without a token.
    """
    check_address(host, port, token)
    calibration, version = read_calibration(source), version_of(source)
    alone = RankAddress(0, 1, 0, "")
    with opened(source, ParallelConfig(), encoding, alone, scratch, head="reward", precision=precision) as model:
        judge = Judge(model, calibration, image_root, version, pack_tokens)
        with bound(host, port) as sock:
            asyncio.run(serve_on(sock, build_app(judge, token)))


def build_app(judge: Judge, token: str | None = None) -> Gate:
    app = FastAPI(title="mimo-megatron reward model", version=__version__, docs_url="/docs", redoc_url=None)
    batcher = _Batcher(judge)

    @app.post("/v1/rewards", response_model=ModelResponse)
    async def rewards(request: Request) -> Response:
        """Score and reward of every item, in order."""
        try:
            asked = ModelRequest.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            return _error(422, "invalid", f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        if batcher.num_waiting + len(asked.items) > MAX_WAITING_ITEMS:
            return _error(429, "too_busy", f"{batcher.num_waiting} items are waiting", {"retry-after": "1"})
        try:
            results = await _while_connected(request, batcher.ask(asked.items))
        except ModelFailed as failed:
            return _error(500, "model_failed", str(failed))
        if results is None:
            return Response(status_code=499)  # nobody reads it
        body = ModelResponse(model_version=judge.version, results=results)
        return Response(body.model_dump_json(), media_type="application/json")

    @app.get("/healthz")
    async def healthz() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/readyz")
    async def readyz() -> dict[str, str | bool]:
        return {"ready": True, "kind": judge.kind, "model_version": judge.version}

    return Gate(app, token, _HELD_BYTES, _BODY_SECONDS, lambda path, status: None)


class ModelFailed(Exception):
    """The model raised on these items; the log holds the traceback."""


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result; None where the client has gone, whose ``work`` is then cancelled: the service asks two replicas and
    takes the first answer, and nobody should score what nobody reads."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body has been read: what comes next is the disconnect
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


class _Batcher:
    """One batch at a time through the model, in the order of arrival."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        return sum(len(items) for items, _ in self._waiting)

    async def ask(self, items: list[ModelItem]) -> list[ModelResult]:
        answer: asyncio.Future[list[ModelResult]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            requests: list[_Waiting] = []
            num_items = 0
            while self._waiting and (not requests or num_items + len(self._waiting[0][0]) <= MAX_ITEMS_AT_ONCE):
                one = self._waiting.popleft()
                if not one[1].done():  # the others have gone
                    requests.append(one)
                    num_items += len(one[0])
            if not await self._score(requests) and len(requests) > 1:
                for one in requests:  # one request's fault is no other's: each alone
                    await self._score([one])

    async def _score(self, requests: list[_Waiting]) -> bool:
        """Whether all are answered: with results or, where it is one request that failed, with ``ModelFailed``."""
        items = [item for some, _ in requests for item in some]
        try:
            results = iter(await asyncio.to_thread(self._judge.results, items))
        except Exception as error:  # a fault of ours: the caller hears of it, and the next batch is tried
            get_logger().exception("a batch of %d items was not scored", len(items))
            if len(requests) == 1 and not requests[0][1].done():
                requests[0][1].set_exception(ModelFailed(f"{type(error).__name__}: {str(error)[:200]}"))
            return False
        for some, answer in requests:
            own = [next(results) for _ in some]
            if not answer.done():
                answer.set_result(own)
        return True


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(error_body(code, message), status, headers, "application/json")
