"""Before any request is understood: who sends it, how large it is, how long it takes to arrive.

Bodies are read here, with every byte counted, whatever the headers say; what is too large is read on for a while and
thrown away, so that the sender hears 413 and not a broken connection.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mimo_megatron.reward.wire import MAX_BODY_BYTES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Answered = Callable[[str, int], None]

OPEN_PATHS = {"/healthz", "/readyz"}
"""What a load balancer asks, without a token."""
_DRAIN_BYTES, _DRAIN_SECONDS = 64 << 20, 2.0


class Rejected(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Disconnected(Exception):
    """The client has gone; nobody waits for an answer."""


def matches(given: bytes, token: str) -> bool:
    """Whether the header's value is ``Bearer TOKEN``, in a time that does not depend on where it differs."""
    return hmac.compare_digest(given, b"Bearer " + token.encode())


class Gate:
    """An ASGI middleware. ``answered`` hears the path and status of every answer."""

    def __init__(self, app: App, token: str | None, held_bytes: int, body_seconds: float, answered: Answered) -> None:
        self._app, self._token, self._answered = app, token, answered
        self._max_held, self._body_seconds = held_bytes, body_seconds
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        body = bytearray()
        try:
            self._check_token(scope)
            await self._read(scope, receive, body)
            await self._app(scope, _replay(bytes(body), receive), counted)
        except Rejected as rejected:
            await _answer(counted, rejected)
        except Disconnected:
            pass
        finally:
            self.held_bytes -= len(body)
            self._answered(scope["path"], status)

    def _check_token(self, scope: Scope) -> None:
        if self._token is None or scope["path"] in OPEN_PATHS:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not matches(given, self._token):
            raise Rejected(401, "unauthorized", "give the header Authorization: Bearer TOKEN", **_BEARER)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        try:
            async with asyncio.timeout(self._body_seconds):
                too_large = declared.isdigit() and int(declared[:20]) > MAX_BODY_BYTES
                more = True
                while more and not too_large:
                    chunk, more = await _chunk(receive)
                    body += chunk
                    self.held_bytes += len(chunk)
                    too_large = len(body) > MAX_BODY_BYTES
                    if self.held_bytes > self._max_held:
                        raise Rejected(429, "too_busy", "too many requests are being held; try again", **_SOON)
        except TimeoutError:
            raise Rejected(408, "body_too_slow", f"the body did not arrive in {self._body_seconds:.0f} s") from None
        if too_large:
            await _drain(receive, more)
            raise Rejected(413, "body_too_large", f"a body has at most {MAX_BODY_BYTES} bytes; send smaller batches")


_BEARER = {"www-authenticate": "Bearer"}
_SOON = {"retry-after": "1"}


async def _chunk(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message.get("body", b""), message.get("more_body", False)


async def _drain(receive: Receive, more: bool) -> None:
    num_bytes = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while more and num_bytes < _DRAIN_BYTES:
                chunk, more = await _chunk(receive)
                num_bytes += len(chunk)
    except TimeoutError:
        pass


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, rejected: Rejected) -> None:
    body = error_body(rejected.code, str(rejected))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **rejected.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": rejected.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def error_body(code: str, message: str) -> bytes:
    """Every error of this service. Plain ASCII, so that nothing that was sent can fail to be quoted."""
    return json.dumps({"error": {"code": code, "message": message}}).encode()
