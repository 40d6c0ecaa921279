"""A pack of 32,768 slots from stored files to the loss: long documents, a video of minutes, large pictures; with two
context parallel ranks as with one process."""

from typing import Any

import pytest

from mimo_megatron.config.check import check
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig, ModuleTraining, ParallelConfig, RunConfig, VideoConfig
from mimo_megatron.data.loader import PackLoader
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.train.step import build_trainer, train_step
from tests.data_fixtures import (
    clip,
    image_sample,
    recipe,
    text_sample,
    user_and_assistant,
    write_source,
    write_tokenizer,
)
from tests.harness import run_ranks
from tests.samples import run_config, tiny_model

SLOTS = 32_768
NARROW: dict[str, Any] = dict(
    num_layers=2,
    width=32,
    num_heads=2,
    num_kv_heads=1,
    head_width=16,
    ffn_width=64,
    mrope_section=(2, 3, 3),
    max_positions=SLOTS,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    home = tmp_path_factory.mktemp("long")
    data = recipe(
        home / "source",
        write_tokenizer(home / "tokenizer"),
        pack_tokens=SLOTS,
        pack_patches=4 * SLOTS,
        max_pixels=4096 * 28 * 28,
        video=VideoConfig(max_frames=256, max_total_tokens=8192),
    )
    question = [{"type": "video", "video": "video0.mp4"}, {"type": "text", "text": "What happens?"}]
    video = ShardSample(
        "000009",
        {"id": "video", "messages": user_and_assistant(question, "It gets brighter.")},
        {"video0.mp4": clip(256, 224, 224, fps=2)},  # two minutes
    )
    samples = [
        text_sample(0, 2_000),
        text_sample(1, 1_900),
        image_sample(2, [(1120, 1400)]),
        image_sample(3, [(1400, 840)]),
    ]
    write_source(home / "source", [*samples, video], data)
    return data


def config_of(data: DataConfig, **layout: Any) -> RunConfig:
    model: ModelConfig = tiny_model(**NARROW)
    frozen = dict(vision=ModuleTraining())
    config = run_config(model, parallel=ParallelConfig(**layout), packs_per_step=1, **frozen)
    return config.model_copy(update={"data": data})


def one_step(address: RankAddress, config: RunConfig) -> tuple[float, float, int, int, list[int]]:
    """Loss, gradient norm, tokens and patches of the pack, and its samples' lengths."""
    check(config, address.world_size)
    with megatron(config.parallel, address) as mesh:
        loader = PackLoader(config.data, config.model, packs_per_step=1, seed=config.seed)
        loader.steps_to_come = 1
        (pack,) = loader.next_step()
        loader.close()
        assert not loader.skipped
        result = train_step(build_trainer(config, mesh), [pack], 0, 1.0)
        return result.loss, result.grad_norm, pack.num_tokens, pack.num_patches, pack.segment_lengths


@pytest.mark.slow
def test_a_pack_of_32k_trains_with_two_context_ranks_like_one_process(data):
    ((loss, norm, num_tokens, num_patches, lengths),) = run_ranks(one_step, 1, config_of(data))
    assert num_tokens > 0.9 * SLOTS and num_patches > 45_000, (num_tokens, num_patches, lengths)
    assert max(lengths) > 8_192, "no sample is long"
    for found in run_ranks(one_step, 2, config_of(data, cp=2, vision_placement="balanced")):
        assert found[0] == pytest.approx(loss, rel=3e-6)
        assert found[1] == pytest.approx(norm, rel=3e-5)
        assert found[2:] == (num_tokens, num_patches, lengths)
