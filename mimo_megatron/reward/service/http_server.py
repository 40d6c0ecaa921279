"""An application on one socket, in one process, stopped by a signal when the last answer has been given."""

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from mimo_megatron.errors import ConfigError
from mimo_megatron.reward.service.connection import Connection
from mimo_megatron.reward.service.gate import App

_STOP_SECONDS = 10


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: they end the process before the workers are ended in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def check_address(host: str, port: int, token: str | None) -> None:
    """``ConfigError`` where others could reach the port without a token."""
    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and there is no token. Give --token-file FILE, "
            "or bind 127.0.0.1 and use a tunnel"
        )
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port {port} is outside 0..65535")


async def serve_on(sock: socket.socket, app: App) -> None:
    """Until SIGTERM or SIGINT. One line of JSON on stdout gives the address, once it is served."""
    config = uvicorn.Config(
        app, http=Connection, ws="none", log_level="warning", lifespan="off", access_log=False, server_header=False,
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
    await serving


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one. ``ConfigError`` where it cannot be had."""
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


def _is_loopback(host: str) -> bool:
    """Every address that the name stands for is this machine's own; an empty host is every interface."""
    if not host:
        return False
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"--host {host} is not a name or address of this machine: {error}") from error
    return all(ipaddress.ip_address(address).is_loopback for address in found)
