"""Engines of all ranks as one: every group comes back once, from whichever rank sampled it."""

from collections import Counter

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.rl.engine.rounds import Rounds, RoundsEngine
from mimo_megatron.types import Rollout
from tests.harness import run_ranks
from tests.rl_fixtures import ask, engine_with, finished, prompts, random_weights

WEIGHTS = random_weights()
PROMPTS = {prompt.id: prompt for prompt in prompts()}


def key(one: Rollout) -> tuple[str, int, tuple[int, ...]]:
    return one.request_id, one.index, tuple(one.token_ids_T.tolist())


def sampled(address: RankAddress, has_engine: tuple[bool, ...], aborted: tuple[str, ...]) -> tuple[list, int]:
    """What rank 0 got, and how many responses this rank's own engine encoded pictures for."""
    with megatron(ParallelConfig(), address):
        local = engine_with(WEIGHTS) if has_engine[address.rank] else None
        num_rounds = Counter[str]()
        rounds = Rounds(local, PROMPTS.__getitem__, lambda: num_rounds.update(["round"]))
        found: list[Rollout] = []
        if address.rank:
            rounds.follow()
        else:
            engine = RoundsEngine(rounds)
            for number, prompt in enumerate(PROMPTS.values()):
                engine.submit(ask(str(number), prompt, 3, seed=number))
            engine.abort(aborted)
            while engine.num_running:
                found += engine.poll(1.0)
            engine.finish()
        assert num_rounds["round"] > 0
        return [key(one) for one in found], local.num_encoded if local is not None else 0


def alone() -> set:
    engine = engine_with(WEIGHTS)
    for number, prompt in enumerate(PROMPTS.values()):
        engine.submit(ask(str(number), prompt, 3, seed=number))
    return {key(one) for one in finished(engine).values()}


def test_two_ranks_return_what_one_engine_samples_and_both_work():
    (found, first), (_, second) = run_ranks(sampled, 2, (True, True), ())
    assert len(found) == len(set(found)) == 12 and set(found) == alone()
    assert first and second


def test_a_rank_without_an_engine_takes_part_and_samples_nothing():
    (found, first), (_, second) = run_ranks(sampled, 2, (False, True), ())
    assert set(found) == alone()
    assert second and not first


def test_an_aborted_group_is_never_returned():
    ((found, _), _) = run_ranks(sampled, 2, (True, True), ("1", "2"))
    assert {name for name, _, _ in found} == {"0", "3"}
