"""Connections that are held and not used: each ends by a bound of its own, and the others are served."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mimo_megatron.reward.service import connection
from mimo_megatron.reward.service.gate import Receive, Scope, Send
from tests.reward_harness import served

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
LARGE = 16 << 20


class Application:
    """Answers ``size`` bytes; ``num_running`` requests are under way."""

    def __init__(self, size: int) -> None:
        self.size, self.num_running = size, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_running += 1
        try:
            headers = [(b"content-length", str(self.size).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"x" * self.size})
        finally:
            self.num_running -= 1


def with_server(
    work: Callable[[Application, Callable[[], Awaitable[Streams]]], Awaitable[None]], size: int = 2
) -> None:
    async def run() -> None:
        app = Application(size)
        async with served(app) as url:
            host, _, port = url.removeprefix("http://").partition(":")
            opened: list[asyncio.StreamWriter] = []

            async def connect() -> Streams:
                reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 10)
                opened.append(writer)
                return reader, writer

            try:
                await work(app, connect)
            finally:
                for writer in opened:
                    writer.transport.abort()

    asyncio.run(run())


async def ends(reader: asyncio.StreamReader, seconds: float = 3.0) -> bool:
    """The other side closes within this time, whatever it says before."""
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(1 << 20):
                pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nX: ", REQUEST + b"GET / HT"])
def test_a_head_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch, before: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)

    async def work(app: Application, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(before)
        trickle = asyncio.create_task(_trickle(writer))
        assert await ends(reader)
        trickle.cancel()

    with_server(work)


async def _trickle(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.2)
    while not writer.is_closing():
        writer.write(b"a")
        await asyncio.sleep(0.1)


def test_a_connection_that_asks_again_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)

    async def work(app: Application, connect: Any) -> None:
        reader, writer = await connect()
        for _ in range(3):
            writer.write(REQUEST)
            assert (await reader.readuntil(b"xx")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.5)

    with_server(work)


def test_one_connection_too_many_is_refused_and_the_next_is_served_when_one_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)

    async def work(app: Application, connect: Any) -> None:
        held = [await connect() for _ in range(3)]
        await asyncio.sleep(0.1)
        assert await ends((await connect())[0])
        held[0][1].close()
        await asyncio.sleep(0.1)
        reader, writer = await connect()
        writer.write(REQUEST)
        assert (await reader.readuntil(b"xx")).startswith(b"HTTP/1.1 200")

    with_server(work)


def test_answers_that_nobody_reads_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 0.5)

    async def work(app: Application, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(REQUEST * 3)  # the second waits for room, and would hold its body meanwhile
        await asyncio.sleep(0.3)
        assert app.num_running == 1
        await asyncio.sleep(0.8)
        assert app.num_running == 0 and await ends(reader)

    with_server(work, LARGE)
