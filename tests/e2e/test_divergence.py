"""Ranks that would train on different things are stopped before the first update, and named."""

import pytest

from mimo_megatron.config.run import ParallelConfig, RunConfig
from mimo_megatron.errors import MimoError
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.train.agreement import divergence, name_ranks, recipe_digest
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.loop import pretrain
from tests.data_fixtures import recipe, text_sample, write_source
from tests.e2e.faults_run import rows_of, run_of, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def with_another_recipe_on_rank_1(address: RankAddress, config: RunConfig, other: RunConfig) -> None:
    pretrain(address, config if address.rank == 0 else other)


def refusal(config: RunConfig, other: RunConfig) -> str:
    with pytest.raises(MimoError) as caught:
        run_local(with_another_recipe_on_rank_1, 2, config, other)
    assert rows_of(config) == []
    return str(caught.value)


def test_another_seed_on_one_rank_is_found_before_the_first_update(data, tmp_path):
    config = run_of(data, tmp_path / "run")
    said = refusal(config, config.model_copy(update={"seed": 2}))
    assert said.startswith("step 1: the ranks do not train on the same thing")
    assert "recipe: " in said and "data plan: " in said and " on rank 0; " in said and " on rank 1" in said


def test_another_data_folder_on_one_rank_is_found_though_the_recipe_differs_only_in_paths(data, tmp_path):
    config = run_of(data, tmp_path / "run")
    elsewhere = write_data(tmp_path, "elsewhere", count=23)
    said = refusal(config, config.model_copy(update={"data": elsewhere}))
    assert "data plan: " in said and "recipe: " not in said


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_model_parallel_ranks_that_read_other_words_under_the_same_ids_are_found(layout, data, tmp_path):
    """The plans are equal: ids and lengths are. Only what was read differs."""

    def source(name: str, word: str):
        samples = [text_sample(number) for number in range(12)]
        for sample in samples:
            (answer,) = [one for one in sample.record["messages"] if one["role"] == "assistant"]
            answer["content"] = word
        limits = {"max_pixels": 100_000, "video": {"max_total_tokens": 128}}
        settings = recipe(tmp_path / name, data.tokenizer, pack_patches=1024, window_samples=8, **limits)
        write_source(tmp_path / name, samples, settings)
        return settings

    first, second = source("first", "A"), source("second", "B")
    config = run_of(first, tmp_path / "run", parallel=ParallelConfig(**layout))
    said = refusal(config, config.model_copy(update={"data": second}))
    assert "packs of dp rank 0: " in said and "data plan: " not in said and "recipe: " not in said


def test_the_recipes_digest_is_over_every_key_but_the_paths(data, tmp_path):
    config = run_of(data, tmp_path)
    elsewhere = config.data.model_copy(update={"tokenizer": tmp_path / "other"})
    moved = config.model_copy(update={"dir": tmp_path / "x", "start_from": tmp_path / "y", "data": elsewhere})
    assert recipe_digest(moved) == recipe_digest(config)
    changes = {
        "seed": 7,
        "parallel": config.parallel.model_copy(update={"tp": 2}),
        "train": config.train.model_copy(update={"steps": 99}),
        "model": config.model.model_copy(update={"name": "other"}),
        "data": config.data.model_copy(update={"pack_tokens": 2 * config.data.pack_tokens}),
    }
    digests = {recipe_digest(config.model_copy(update={key: value})) for key, value in changes.items()}
    assert len({*digests, recipe_digest(config)}) == len(changes) + 1


def test_the_message_groups_ranks_by_what_they_hold():
    facts = [{"data plan": 7, "packs of dp rank 0": 1}, {"data plan": 7, "packs of dp rank 0": 2}] + [
        {"data plan": one} for one in (7, 9)
    ]
    said = divergence(5, facts)
    assert "data plan: 0000000000000007 on ranks 0-2; 0000000000000009 on rank 3" in said
    assert "packs of dp rank 0: 0000000000000001 on rank 0; 0000000000000002 on rank 1" in said
    assert name_ranks([5, 1, 0, 2]) == "ranks 0-2, 5"
