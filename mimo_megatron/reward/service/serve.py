"""The running service: one process, one port, stopped by a signal when the last answer has been given."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from mimo_megatron.errors import ConfigError
from mimo_megatron.log import get_logger
from mimo_megatron.reward.service.app import build_app
from mimo_megatron.reward.service.scorer import Scorer
from mimo_megatron.reward.service.settings import ServiceSettings

_STOP_SECONDS = 10


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: they end the process before the workers are ended in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: ServiceSettings) -> None:
    """Until SIGTERM or SIGINT. One line of JSON on stdout gives the address, after the self-test has passed."""
    settings.check()
    asyncio.run(_serve(settings))


async def _serve(settings: ServiceSettings) -> None:
    sock = _bound(settings.host, settings.port)
    scorer = Scorer(settings)
    try:
        await scorer.start()
        config = uvicorn.Config(
            build_app(scorer), log_level="warning", lifespan="off", access_log=False, server_header=False,
            timeout_keep_alive=60, timeout_graceful_shutdown=_STOP_SECONDS, backlog=1024,
        )  # fmt: skip
        server = _Server(config)
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, lambda: setattr(server, "should_exit", True))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            print(json.dumps({"event": "ready", "url": _url(sock), "pid": os.getpid()}), flush=True)
            if degraded := scorer.readiness()["degraded"]:
                get_logger().warning("degraded: %s", "; ".join(degraded))
        await serving
    finally:
        await scorer.close()
        sock.close()


def _bound(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # The protocol must be named: asyncio turns Nagle's delay off (40 ms an answer) only for sockets that say TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{host} port {port} cannot be bound: {error}; choose another, or 0 for a free one"
        ) from error
    return sock


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
