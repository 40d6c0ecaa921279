"""Several engines on one rank as one: a group goes to the engine with the fewest responses running."""

from collections.abc import Collection, Sequence

from mimo_megatron.rl.engine.protocol import GenerationRequest, SamplingEngine
from mimo_megatron.types import Rollout


class SeveralEngines:
    """A ``SamplingEngine``. Each engine's weights are updated on its own."""

    def __init__(self, engines: Sequence[SamplingEngine]) -> None:
        assert engines
        self._engines = list(engines)
        self._placed: dict[str, SamplingEngine] = {}

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines)

    def submit(self, request: GenerationRequest) -> None:
        engine = min(self._engines, key=lambda one: one.num_running)  # of equal ones the first
        engine.submit(request)
        self._placed[request.id] = engine

    def abort(self, request_ids: Collection[str]) -> None:
        for engine in self._engines:
            engine.abort([name for name in request_ids if self._placed.get(name) is engine])
        for name in request_ids:
            self._placed.pop(name, None)

    def poll(self, seconds: float) -> list[Rollout]:
        """Waits at the first engine that has something to do, and looks at the others."""
        found: list[Rollout] = []
        for engine in sorted(self._engines, key=lambda one: -one.num_running):
            found += engine.poll(0.0 if found else seconds / len(self._engines))
        return found
