"""The trainer's weights, of any layout, in every rank's engine: compared, or the gate stays closed."""

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from mimo_megatron.config.rl import SyncConfig
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.errors import EngineError, EngineLostError, SyncError
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.rl.engine.embedded import EmbeddedEngine
from mimo_megatron.rl.engine.several import SeveralEngines
from mimo_megatron.rl.publish import Published, publish
from mimo_megatron.rl.sync.buckets import Bucket
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.train.step import Trainer, build_trainer
from tests.harness import run_ranks
from tests.rl_fixtures import MODEL, ask, empty_engine, no_other, prompts, several_of
from tests.samples import run_config

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, dict(tp=2)),
    "pp2 vpp2": (2, dict(pp=2, vpp=2)),
    "cp2": (2, dict(cp=2)),
    "dp2": (2, {}),
    "tp2 pp2 sp": (4, dict(tp=2, pp=2, sequence_parallel=True)),
    "tp2 cp2 balanced": (4, dict(tp=2, cp=2, vision_placement="balanced")),
}
LIMITS = SyncConfig(max_mean_gap=1e-4, max_gap=1e-3)
BUCKET = 1 << 20


class Damaged(EmbeddedEngine):
    """Flips a bit of a bucket on its way, of the first ``num_times`` updates."""

    num_times = 0

    def receive(self, bucket: Bucket) -> None:
        if bucket.number == 1 and self.num_times:
            self.num_times -= 1
            bucket.data[100] ^= 1
        super().receive(bucket)


class Forgetful(EmbeddedEngine):
    """Keeps what it read from pictures with the old weights, as engines do that key it by picture alone."""

    def finish_update(self) -> None:
        features = dict(self._features)
        super().finish_update()
        self._features.update(features)


class Misplaced(EmbeddedEngine):
    """Reads every key from a place that another tensor was written to: bytes arrive, the model is another one."""

    def finish_update(self) -> None:
        super().finish_update()
        if self._next_version == 1:
            return
        gate, up = (self._model.weights[f"model.layers.1.mlp.{one}_proj.weight"] for one in ("gate", "up"))
        kept = gate.clone()
        gate.copy_(up)
        up.copy_(kept)


class Mortal(EmbeddedEngine):
    """Is lost at the second bucket of version ``last_version``."""

    last_version = -1

    def receive(self, bucket: Bucket) -> None:
        if bucket.number == 1 and self._next_version == self.last_version:
            raise EngineLostError("the process is gone")
        super().receive(bucket)


def scale_weights(trainer: Trainer, factor: float) -> None:
    with torch.no_grad():
        for chunk in trainer.bare_chunks:
            for param in chunk.parameters():
                param.mul_(factor) if param.dim() > 1 else None


def trainer_of(address: RankAddress, layout: dict, mesh) -> Trainer:
    trainer = build_trainer(run_config(MODEL, parallel=ParallelConfig(**layout)), mesh)
    scale_weights(trainer, 4.0)
    return trainer


def engine_of(kind: type[EmbeddedEngine]) -> EmbeddedEngine:
    return kind(MODEL, max_sequences=8, max_tokens=256, dtype=torch.float32, device=torch.device("cpu"))


def published(address: RankAddress, layout: dict) -> tuple[list[Published], list[int]]:
    """Two versions, with other weights, into an engine on every rank; and what the engine then samples."""
    with megatron(ParallelConfig(**layout), address) as mesh:
        trainer = trainer_of(address, layout, mesh)
        publisher, engine = Publisher(trainer.bare_chunks, MODEL, mesh, BUCKET), empty_engine()
        engines = several_of([engine], no_other)
        first = publish(trainer, publisher, engines, 1, prompts(), LIMITS)
        scale_weights(trainer, 1.1)
        second = publish(trainer, publisher, engines, 2, prompts(), LIMITS)
        engine.submit(ask("one", prompts()[1], temperature=0.0))
        (rollout,) = [one for _ in range(20) for one in engine.poll(0.1)]
        assert (rollout.versions_T == 2).all()
        return [first, second], rollout.token_ids_T.tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_ranks_engine_has_the_trainers_log_probabilities(name):
    ranks, layout = LAYOUTS[name]
    found = run_ranks(published, ranks, layout)
    assert all(one.version == version for both, _ in found for version, one in enumerate(both, start=1))
    assert all(gap.largest < 1e-3 for both, _ in found for one in both for gap in one.gaps)
    assert all(len(one.gaps) == len(prompts()) for both, _ in found for one in both)
    assert len({tuple(token_ids) for _, token_ids in found}) == 1


def with_fault(address: RankAddress, kind: type[EmbeddedEngine], num_times: int) -> tuple[str, str]:
    """What publishing and then asking said; the fault is rank 0's alone."""
    with megatron(ParallelConfig(), address) as mesh:
        trainer = trainer_of(address, {}, mesh)
        publisher = Publisher(trainer.bare_chunks, MODEL, mesh, BUCKET)
        engine = engine_of(kind if address.rank == 0 else EmbeddedEngine)
        engines = several_of([engine], no_other)
        publish(trainer, publisher, engines, 1, prompts(), LIMITS)
        scale_weights(trainer, 1.3)
        if isinstance(engine, Damaged):
            engine.num_times = num_times
        said = []
        for attempt in (
            lambda: publish(trainer, publisher, engines, 2, prompts(), LIMITS),
            lambda: engine.submit(ask("one", prompts()[0])),
        ):
            try:
                attempt()
                said.append("")
            except (SyncError, EngineError) as error:
                said.append(f"{type(error).__name__}: {error}")
        return said[0], said[1]


def test_a_bucket_damaged_once_is_sent_again():
    assert run_ranks(with_fault, 2, Damaged, 1) == [("", ""), ("", "")]


def test_a_bucket_damaged_twice_stops_every_rank_with_all_gates_closed():
    for published, asked in run_ranks(with_fault, 2, Damaged, 2):
        assert "SyncError" in published and "did not reach the engines, sent twice" in published
        assert "the gate is closed" in asked


@pytest.mark.parametrize("kind", [Forgetful, Misplaced])
def test_the_canary_stops_what_checksums_cannot_see(kind):
    for published, asked in run_ranks(with_fault, 2, kind, 0):
        assert "engine and trainer differ" in published and "Nothing was sampled" in published
        assert "the gate is closed" in asked


def with_loss(address: RankAddress, are_all_mortal: bool) -> tuple[list[int | None], int]:
    """Policy versions of this rank's two engines after an update in which rank 0 lost one, and how many it had."""
    with megatron(ParallelConfig(), address) as mesh:
        trainer = trainer_of(address, {}, mesh)
        publisher = Publisher(trainer.bare_chunks, MODEL, mesh, BUCKET)
        begun = []

        def begin(_: float) -> EmbeddedEngine:
            engine = engine_of(Mortal)
            engine.last_version = 2 if address.rank == 0 and (are_all_mortal or not begun) else -1
            begun.append(engine)
            return engine

        engines = SeveralEngines(begin, 2)
        for version in (1, 2):
            publish(trainer, publisher, engines, version, prompts(), LIMITS)
        return [one.policy_version for one in engines.engines], len(begun)


def test_an_engine_lost_during_an_update_is_replaced_in_the_same_update():
    assert run_ranks(with_loss, 2, False) == [([2, 2], 3), ([2, 2], 2)]


def test_engines_that_are_lost_at_every_attempt_end_the_run():
    with pytest.raises(ProcessRaisedException, match="engines end whenever policy version 2 is sent to them"):
        run_ranks(with_loss, 1, True)
