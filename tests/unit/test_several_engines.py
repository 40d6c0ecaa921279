"""Several engines as one: what a lost one owed comes from the others, once, and another takes its place."""

from collections import Counter

import pytest

from mimo_megatron.errors import EngineError, EngineLostError
from mimo_megatron.rl.engine.embedded import EmbeddedEngine
from mimo_megatron.rl.engine.protocol import GenerationRequest
from mimo_megatron.rl.engine.several import SeveralEngines
from mimo_megatron.types import Rollout
from tests.rl_fixtures import MODEL, ask, engine_with, no_other, prompts, random_weights, several_of

WEIGHTS = random_weights()


class Mortal(EmbeddedEngine):
    """Is lost after some polls that returned something, with what it had ready."""

    polls_left = 10**9
    is_gone = False

    def poll(self, seconds: float) -> list[Rollout]:
        if self.polls_left <= 0:
            self.is_gone = True
        if self.is_gone:
            raise EngineLostError("the process is gone")
        found = super().poll(seconds)
        self.polls_left -= bool(found)
        return found[:1]

    def submit(self, request: GenerationRequest) -> None:
        if self.is_gone:
            raise EngineLostError("the process is gone")
        super().submit(request)


def mortal(polls_left: int = 10**9) -> Mortal:
    engine = engine_with(WEIGHTS)
    engine.__class__ = Mortal
    engine.polls_left = polls_left  # type: ignore[attr-defined]
    return engine  # type: ignore[return-value]


def everything(several: SeveralEngines) -> Counter[tuple[str, int]]:
    found: Counter[tuple[str, int]] = Counter()
    while several.num_running:
        found.update((one.request_id, one.index) for one in several.poll(0.1))
    return found


WANTED = Counter({(str(number), index): 1 for number in range(4) for index in range(3)})


def submitted(several: SeveralEngines) -> SeveralEngines:
    for number, prompt in enumerate(prompts()):
        several.submit(ask(str(number), prompt, 3, seed=number))
    return several


def test_groups_are_spread_over_the_engines():
    engines = [mortal(), mortal()]
    several = submitted(several_of(engines, mortal))
    assert [engine.num_running for engine in engines] == [6, 6]
    assert several.num_running == 12


@pytest.mark.parametrize("polls_left", [0, 1, 2])
def test_every_response_comes_once_though_an_engine_is_lost(polls_left):
    class Whole(Mortal):
        def poll(self, seconds: float) -> list[Rollout]:
            return EmbeddedEngine.poll(self, seconds)

    survivor = engine_with(WEIGHTS)
    survivor.__class__ = Whole
    lost = mortal(polls_left)
    several = submitted(several_of([lost, survivor], mortal))
    assert everything(several) == WANTED
    assert several.engines == [survivor] and lost.is_gone


def test_a_lost_engine_is_replaced_before_the_next_weights():
    several = submitted(several_of([mortal(0), engine_with(WEIGHTS)], mortal))
    everything(several)
    assert len(several.engines) == 1
    several.mend()
    assert len(several.engines) == 2
    several.mend()
    assert len(several.engines) == 2


def test_a_missing_engine_is_waited_for_only_where_there_is_no_other():
    waits: list[float] = []

    def begin(seconds: float) -> EmbeddedEngine:
        waits.append(seconds)
        if len(waits) > 2:
            raise EngineLostError("none is announced")
        return mortal(0) if len(waits) == 1 else engine_with(WEIGHTS)

    several = submitted(SeveralEngines(begin, 2))
    everything(several)
    several.mend()
    assert len(several.engines) == 1 and waits[2] == 0.0
    several.lose(several.engines[0], EngineLostError("gone"))
    with pytest.raises(EngineLostError, match="none is announced"):
        several.mend()
    assert waits[3] >= 60.0


def test_without_any_engine_nothing_is_taken():
    several = several_of([mortal()], no_other)
    several.lose(several.engines[0], EngineLostError("gone"))
    with pytest.raises(EngineLostError, match="all engines are lost"):
        several.submit(ask("one", prompts()[0]))


def test_the_last_engines_loss_is_an_error():
    several = submitted(several_of([mortal(0)], mortal))
    with pytest.raises(EngineLostError):
        everything(several)


def test_an_aborted_group_is_not_asked_of_the_others():
    several = submitted(several_of([mortal(0), engine_with(WEIGHTS)], mortal))
    several.abort(["0", "2"])
    assert {name for name, _ in everything(several)} == {"1", "3"}


def test_a_prompt_that_is_refused_is_the_callers_mistake_and_no_loss():
    engines = [mortal(), mortal()]
    several = several_of(engines, mortal)
    with pytest.raises(EngineError, match="raise max_sequences"):
        several.submit(ask("long", prompts()[0], most=MODEL.text.max_positions))
    assert several.engines == engines and several.num_running == 0
