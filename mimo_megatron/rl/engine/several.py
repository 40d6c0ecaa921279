"""Several engines on one rank as one: a group goes to the engine with the fewest responses running.

An engine that is lost loses nothing: what it owed is asked of the others, by the same requests, and what it had
returned already stays. Another one takes its place before the next weights go out; until then it is missed only in
speed. Where the last one is lost while it samples, ``EngineLostError``.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from mimo_megatron.errors import EngineLostError
from mimo_megatron.log import get_logger
from mimo_megatron.rl.engine.protocol import GenerationRequest, RolloutEngine
from mimo_megatron.types import Rollout

_PATIENCE_SECONDS = 600.0
"""For the engines of a start, and for the first where all were lost."""


@dataclass
class _Placed:
    request: GenerationRequest
    engine: RolloutEngine | None = None
    returned: set[int] = field(default_factory=set)

    @property
    def num_missing(self) -> int:
        return self.request.num_responses - len(self.returned)


class SeveralEngines:
    """A ``SamplingEngine``. Weights go to each of ``engines`` on its own, those that ``mend`` leaves."""

    def __init__(self, begin: Callable[[float], RolloutEngine], num_wanted: int) -> None:
        """``begin(seconds)`` gives another engine, waited for as long, or raises ``EngineLostError``; so does this
        where there are fewer than wanted."""
        assert num_wanted > 0
        self.engines = [begin(_PATIENCE_SECONDS) for _ in range(num_wanted)]
        self._begin, self._num_wanted = begin, num_wanted
        self._placed: dict[str, _Placed] = {}

    @property
    def num_running(self) -> int:
        return sum(one.num_missing for one in self._placed.values())

    def submit(self, request: GenerationRequest) -> None:
        self._place(_Placed(request))

    def abort(self, request_ids: Collection[str]) -> None:
        for engine in list(self.engines):
            own = [name for name in request_ids if name in self._placed and self._placed[name].engine is engine]
            try:
                engine.abort(own)
            except EngineLostError as fault:
                self.lose(engine, fault, spared=set(request_ids))
        for name in request_ids:
            self._placed.pop(name, None)

    def poll(self, seconds: float) -> list[Rollout]:
        """Waits at the engine that has most to do, and looks at the others."""
        found: list[Rollout] = []
        for engine in sorted(self.engines, key=self._load, reverse=True):
            try:
                found += self._new(engine.poll(0.0 if found else seconds / len(self.engines)))
            except EngineLostError as fault:
                self.lose(engine, fault)
        return found

    def mend(self) -> None:
        """Begin an engine for each that was lost. Its gate opens with the next weights, as all do. One that cannot be
        had at once is waited for only where there is no other: then ``EngineLostError``."""
        while len(self.engines) < self._num_wanted:
            try:
                self.engines.append(self._begin(0.0 if self.engines else _PATIENCE_SECONDS))
            except EngineLostError as fault:
                if not self.engines:
                    raise
                get_logger().warning("%d of %d engines: %s", len(self.engines), self._num_wanted, fault)
                return
            get_logger().info("engine %d of %d has been replaced", len(self.engines), self._num_wanted)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def _load(self, engine: RolloutEngine) -> int:
        return sum(one.num_missing for one in self._placed.values() if one.engine is engine)

    def _place(self, placed: _Placed) -> None:
        while self.engines:
            engine = min(self.engines, key=self._load)  # of equal ones the first
            try:
                engine.submit(placed.request)
            except EngineLostError as fault:
                self.lose(engine, fault)
            else:
                placed.engine = engine
                self._placed[placed.request.id] = placed
                return
        raise EngineLostError("all engines are lost; start the run again, and look at their logs")

    def lose(self, engine: RolloutEngine, fault: EngineLostError, spared: Collection[str] = ()) -> None:
        """Do without it: ask the others for what it owed, but for the requests that nobody wants any more. ``fault``
        itself where it owed something and there are no others."""
        self.engines.remove(engine)
        engine.close()
        owed = [one for one in self._placed.values() if one.engine is engine and one.request.id not in spared]
        if owed and not self.engines:
            raise fault
        get_logger().warning("an engine is lost (%s); the others take over %d groups", fault, len(owed))
        for placed in owed:
            self._place(placed)

    def _new(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Those that were asked for and have not been returned before."""
        fresh = []
        for one in rollouts:
            placed = self._placed.get(one.request_id)
            if placed is not None and one.index not in placed.returned:
                placed.returned.add(one.index)
                fresh.append(one)
        self._placed = {name: placed for name, placed in self._placed.items() if placed.num_missing}
        return fresh
