"""The client where the service fails it; the service itself is in ``tests/e2e/test_reward_service*.py``."""

import asyncio

import pytest

from mimo_megatron.errors import RewardError
from mimo_megatron.reward.client import RewardClient, SyncRewardClient
from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import ScoreItem


@pytest.mark.parametrize("url", ["127.0.0.1:8100", "", "unix:/tmp/socket"])
def test_an_address_that_is_none_is_said_at_once(url: str) -> None:
    with pytest.raises(RewardError, match="http://"), SyncRewardClient(url):
        pass


def test_batches_put_back_while_the_rest_is_given_up_are_given_up_too() -> None:
    """A slow caller holds a late result while a lost connection puts its batch back."""
    items = [ScoreItem(id=f"i{number}", task="count", response="1", gold=1) for number in range(300)]

    async def run() -> list[tuple[str, Reason]]:
        released = asyncio.Event()

        async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await released.wait()
            writer.transport.abort()

        found = []
        server = await asyncio.start_server(drop, "127.0.0.1", 0)
        async with server, RewardClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            async for result in client.score(items, deadline_seconds=0.5):
                found.append((result.id, result.reason))
                released.set()
                await asyncio.sleep(0.01)
        return found

    found = asyncio.run(run())
    assert sorted(found) == sorted((item.id, Reason.DEADLINE) for item in items)
