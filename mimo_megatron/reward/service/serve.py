"""The running reward service."""

import asyncio

from mimo_megatron.log import get_logger
from mimo_megatron.reward.service.app import build_app
from mimo_megatron.reward.service.http_server import bound, serve_on
from mimo_megatron.reward.service.scorer import Scorer
from mimo_megatron.reward.service.settings import ServiceSettings


def serve(settings: ServiceSettings) -> None:
    """Until SIGTERM or SIGINT. One line of JSON on stdout gives the address, after the self-test has passed."""
    settings.check()
    asyncio.run(_serve(settings))


async def _serve(settings: ServiceSettings) -> None:
    sock = bound(settings.host, settings.port)
    scorer = Scorer(settings)
    try:
        await scorer.start()
        if degraded := scorer.readiness()["degraded"]:
            get_logger().warning("degraded: %s", "; ".join(degraded))
        await serve_on(sock, build_app(scorer))
    finally:
        await scorer.close()
        sock.close()
