"""Each verdict is worked out once: finished ones are remembered, unfinished ones are shared by all who ask.

A key is (id, SHA-256 of task, response, gold and meta, reward version). ``unknown`` is never remembered: asking again
tries again. Work that nobody waits for any more is cancelled.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from mimo_megatron.reward.verdict import Reason, Verdict, unknown
from mimo_megatron.reward.wire import ScoreItem

Key = tuple[str, bytes, str]


def item_key(item: ScoreItem, blob: bytes, version: str) -> Key:
    """``blob`` is the item as JSON without its id."""
    return item.id, hashlib.sha256(blob).digest(), version


@dataclass(eq=False)
class Ticket:
    """One asker's place at one verdict."""

    batch_id: str
    item_id: str
    verdict: asyncio.Future[Verdict]
    finished: float = 0.0
    """The loop's time."""

    def give(self, verdict: Verdict) -> None:
        if not self.verdict.done():
            self.finished = asyncio.get_running_loop().time()
            self.verdict.set_result(verdict)


@dataclass(eq=False)
class _Work:
    task: asyncio.Task[Verdict]
    tickets: set[Ticket] = field(default_factory=set)


class Ledger:
    def __init__(self, size: int) -> None:
        self._size = size
        self._done: OrderedDict[Key, Verdict] = OrderedDict()
        self._work: dict[Key, _Work] = {}
        self.num_hits = 0

    def knows(self, key: Key) -> bool:
        """Asking for it starts no work."""
        return key in self._done or key in self._work

    def ask(self, key: Key, batch_id: str, start: Callable[[], Coroutine[Any, Any, Verdict]]) -> Ticket:
        ticket = Ticket(batch_id, key[0], asyncio.get_running_loop().create_future())
        if (verdict := self._done.get(key)) is not None:
            self._done.move_to_end(key)
            self.num_hits += 1
            ticket.give(verdict)
            return ticket
        if (work := self._work.get(key)) is None:
            work = self._work[key] = _Work(asyncio.create_task(start()))
            work.task.add_done_callback(lambda task: self._finish(key, task))
        else:
            self.num_hits += 1
        work.tickets.add(ticket)
        return ticket

    def cancel(self, batch_id: str | None, ids: Iterable[str]) -> int:
        """The number of waiting items that now get ``unknown``, reason ``cancelled``: of the batch, and these ids."""
        wanted = set(ids)
        chosen = [
            (key, ticket)
            for key, work in self._work.items()
            for ticket in work.tickets
            if ticket.batch_id == batch_id or ticket.item_id in wanted
        ]
        for key, ticket in chosen:
            self.leave(key, ticket, Reason.CANCELLED)
        return len(chosen)

    def leave(self, key: Key, ticket: Ticket, reason: Reason) -> None:
        """This asker waits no longer."""
        ticket.give(unknown(reason))
        if work := self._work.get(key):
            work.tickets.discard(ticket)
            if not work.tickets:
                del self._work[key]
                work.task.cancel()

    def _finish(self, key: Key, task: asyncio.Task[Verdict]) -> None:
        if task.cancelled():
            return
        verdict = task.result()
        work = self._work.get(key)
        if work is None or work.task is not task:
            return
        del self._work[key]
        if verdict.status != "unknown":
            self._done[key] = verdict
            while len(self._done) > self._size:
                self._done.popitem(last=False)
        for ticket in work.tickets:
            ticket.give(verdict)
