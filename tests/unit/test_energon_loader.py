"""Megatron-energon's own loader, with a cooker of five lines, reads our tars to the same samples."""

import pytest

from mimo_megatron.data.energon import INSTALL
from mimo_megatron.data.records import parse_record
from mimo_megatron.data.shards import write_shards
from tests.data_fixtures import mixed_samples, video_sample
from tests.unit.test_source_conformance import HAS_ENERGON, prepare

pytestmark = pytest.mark.skipif(not HAS_ENERGON, reason=f"needs megatron-energon: {INSTALL}")


def test_the_same_samples_come_out_of_energons_own_loader(tmp_path):
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )

    @edataclass
    class Cooked(Sample):
        record: object
        media: list

    @stateless
    def cook(raw: dict) -> Cooked:
        record = parse_record(raw["json"], raw["__key__"])
        return Cooked(**basic_sample_keys(raw), record=record, media=[raw[name] for _, name in record.media])

    class TaskEncoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

        def __init__(self) -> None:
            super().__init__(raw_batch_type=dict)

        def batch(self, samples):
            return samples

        def encode_batch(self, batch):
            return batch

    written = [*mixed_samples(12), video_sample(12)]
    write_shards(written, tmp_path, 5)
    prepare(tmp_path)
    dataset = get_train_dataset(
        str(tmp_path),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        parallel_shard_iters=1,
        repeat=False,
        shuffle_over_epochs_multiplier=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=TaskEncoder(),
    )
    read = {one.record.id: one.media for (one,) in get_loader(dataset)}
    assert read == {sample.record["id"]: list(sample.members.values()) for sample in written}
