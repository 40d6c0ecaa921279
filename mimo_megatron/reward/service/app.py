"""The HTTP face: paths, the OpenAPI page, typed errors. What is sent is checked by the models of ``wire`` alone."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from mimo_megatron import __version__
from mimo_megatron.reward.service.gate import App, Gate, error_body
from mimo_megatron.reward.service.lanes import Overloaded
from mimo_megatron.reward.service.scorer import Refused, Scorer
from mimo_megatron.reward.wire import CancelRequest, CancelResponse, ScoreRequest, ScoreResponse, Wire

Model = TypeVar("Model", bound=BaseModel)
_SCHEMA_PATH = "#/components/schemas/{model}"
_MAX_PROBLEMS = 5


class ErrorText(Wire):
    code: str
    message: str


class ErrorBody(Wire):
    error: ErrorText


class Health(Wire):
    ok: bool


class Readiness(Wire):
    ready: bool
    waiting_for: list[str]
    degraded: list[str]
    """Protections that this machine does not offer."""
    reward_version: str
    tasks: list[str]


def build_app(scorer: Scorer) -> App:
    """The whole service; ``scorer`` is started and closed by the caller."""
    app = FastAPI(title="mimo-megatron rewards", version=__version__, docs_url="/docs", redoc_url=None)
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody, "description": text} for code, text in _ERRORS.items()
    }

    @app.post("/v1/score", response_model=ScoreResponse, responses=errors, openapi_extra=_takes("ScoreRequest"))
    async def score(request: Request) -> Response:
        """A verdict for every item, in their order, by the deadline."""
        return _json(await scorer.score(await _parsed(request, ScoreRequest)))

    @app.post("/v1/cancel", response_model=CancelResponse, responses=errors, openapi_extra=_takes("CancelRequest"))
    async def cancel(request: Request) -> Response:
        """Waiting items of a batch, or with these ids, are answered ``unknown``, reason ``cancelled``."""
        return _json(scorer.cancel(await _parsed(request, CancelRequest)))

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """This process answers."""
        return Health(ok=True)

    @app.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> Response:
        """Workers are warm and every reward model answers; 503 until then."""
        readiness = Readiness(**scorer.readiness())
        return _json(readiness, 200 if readiness.ready else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(scorer.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_errors(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    paths = {route.path for route in app.routes if hasattr(route, "path")}

    def answered(path: str, code: int) -> None:
        scorer.metrics.requests.labels(path if path in paths else "other", str(code)).inc()

    settings = scorer.settings
    return Gate(app, settings.token, settings.held_bytes, settings.body_seconds, answered)


_ERRORS = {
    401: "No token, or a wrong one.",
    408: "The body did not arrive in time.",
    413: "The body or an item is too large.",
    415: "The body is not declared as application/json.",
    422: "The body is not what the models say.",
    429: "A queue is full; Retry-After says when to come back.",
}


async def _parsed(request: Request, model: type[Model]) -> Model:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "not_json", "send application/json")
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_PROBLEMS]
        texts = [f"{'.'.join(str(step)[:80] for step in one['loc']) or 'body'}: {one['msg'][:300]}" for one in problems]
        raise Refused(422, "invalid", "; ".join(texts)) from error


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status_code=status, media_type="application/json")


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(error_body(code, message), status, headers, "application/json")


def _add_errors(app: FastAPI) -> None:
    def handles(kind: type[Exception]) -> Callable[[Callable[[Any], Response]], None]:
        def register(answer: Callable[[Any], Response]) -> None:
            async def handler(_: Request, error: Exception) -> Response:
                return answer(error)

            app.add_exception_handler(kind, handler)

        return register

    @handles(Refused)
    def _(error: Refused) -> Response:
        return _error(error.status, error.code, str(error))

    @handles(Overloaded)
    def _(error: Overloaded) -> Response:
        return _error(429, "queue_full", str(error), {"retry-after": str(error.retry_after)})

    @handles(HTTPException)
    def _(error: HTTPException) -> Response:
        return _error(error.status_code, "http", str(error.detail), dict(error.headers or {}))


def _takes(name: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _SCHEMA_PATH.format(model=name)}}}
    return {"requestBody": {"required": True, "content": content}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's page, with the request models that it does not see because bodies are parsed in one pass here."""
    if app.openapi_schema is None:
        page = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, models = models_json_schema(
            [(ScoreRequest, "validation"), (CancelRequest, "validation")], ref_template=_SCHEMA_PATH
        )
        page["components"]["schemas"].update(json.loads(json.dumps(models["$defs"])))
        page["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        page["security"] = [{"bearer": []}]
        app.openapi_schema = page
    return app.openapi_schema
