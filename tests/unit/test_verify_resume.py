"""The stream of packs survives a kill on any number of ranks and workers; and the verb that proves it finds faults."""

import json
import random

import pytest

from mimo_megatron.cli import main
from mimo_megatron.data.loader import PackLoader, open_maker
from mimo_megatron.data.verify_resume import MOST_STATE_BYTES, Request, difference, read_steps, request_of
from mimo_megatron.errors import ConfigError
from tests.data_fixtures import TINY, mixed_samples, recipe, text_sample, write_source, write_tokenizer
from tests.samples import run_config

RANKS = (8, 6, 3, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    home = tmp_path_factory.mktemp("resume")
    folders = [home / "texts", home / "images"]
    settings = recipe(folders, write_tokenizer(home / "tokenizer"), pack_tokens=96, pack_patches=64)
    write_source(folders[0], [text_sample(number, 1 + number % 5) for number in range(90)], settings)
    write_source(folders[1], mixed_samples(15), settings)
    return settings


@pytest.fixture(scope="module")
def maker(data):
    maker = open_maker(data, TINY)
    yield maker
    maker.close()


def test_streams_stopped_at_a_step_on_8_ranks_go_on_alike_on_6_3_and_1_in_20_random_cases(data, maker):
    draw = random.Random(1)
    for _ in range(20):
        kill_at = draw.randint(1, 2)
        request = Request(data, TINY, draw.randrange(10**6), 24, kill_at + 1, kill_at, RANKS, (0,))
        whole, _ = read_steps(maker, request, 1, request.steps)
        before, state = read_steps(maker, request, 8, kill_at)
        assert difference(before, whole[:kill_at], 0) == ""
        state = json.loads(text := json.dumps(state))
        assert len(text) < MOST_STATE_BYTES
        for num_ranks in RANKS[1:]:
            after, _ = read_steps(maker, request, num_ranks, 1, state)
            assert difference(after, whole[kill_at:], kill_at) == "", (num_ranks, request)


@pytest.fixture
def recipe_file(data, tmp_path):
    config = run_config(TINY, packs_per_step=4).model_copy(update={"data": data})
    path = tmp_path / "recipe.yaml"
    path.write_text(config.model_dump_json())  # JSON is YAML
    return path


def test_the_verb_compares_a_killed_process_with_all_ranks_and_workers(recipe_file, capsys):
    assert main(["data", "verify-resume", str(recipe_file), "--steps", "3", "--workers", "0,2", "--ranks", "8,3"]) == 0
    said = capsys.readouterr().out
    assert "steps of 24 packs here, not train.packs_per_step 4" in said
    rows = [line.split()[:3] for line in said.splitlines()[2:-1]]
    assert rows == [
        ["1", "0", "1-3"],
        ["8", "2", "1-2"],
        *([ranks, workers, "3-3"] for workers in "02" for ranks in "83"),
    ]
    assert said.count("resumed: equal") == 4


def skip_a_pack(monkeypatch):
    """As if packs made ahead counted as consumed."""
    load = PackLoader.load_state
    monkeypatch.setattr(
        PackLoader, "load_state", lambda self, state: load(self, {**state, "consumed": state["consumed"] + 1})
    )
    return "step 2, pack 0 holds "


def test_a_planted_fault_ends_the_verb_with_the_first_difference(recipe_file, maker, monkeypatch, capsys):
    expected = skip_a_pack(monkeypatch)
    in_this_process = lambda request, ranks, workers: read_steps(maker, request, ranks, request.kill_at)  # noqa: E731
    monkeypatch.setattr("mimo_megatron.data.verify_resume._killed", in_this_process)  # saves a start, kills nothing
    arguments = ["--steps", "2", "--kill-at", "1", "--workers", "0", "--ranks", "3,1"]
    assert main(["data", "verify-resume", str(recipe_file), *arguments]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"differs: {expected}")


def test_ranks_that_take_each_others_packs_are_found(data, maker, monkeypatch):
    request = Request(data, TINY, 1, 6, 1, 1, (3,), (0,))
    whole, _ = read_steps(maker, request, 1, 1)
    monkeypatch.setattr(PackLoader, "places", property(lambda self: self.__dict__["p"], deal_in_reverse), raising=False)
    found, _ = read_steps(maker, request, 3, 1)
    assert difference(found, whole, 0).startswith("step 1, pack 0 holds ")


def deal_in_reverse(loader, places):
    loader.__dict__["p"] = places[::-1]


def test_other_contents_and_other_numbers_of_packs_are_told_apart(data, maker):
    request = Request(data, TINY, 1, 2, 2, 1, (1,), (0,))
    steps, _ = read_steps(maker, request, 1, 1)
    (first, second), *_ = steps
    assert difference(steps, [[first, second]], 0) == ""
    assert "holds" in difference(steps, [[second, first]], 0)
    changed = type(first)("0" * 64, first.sample_ids)
    assert "step 3, pack 0 holds the right samples" in difference([[changed, second]], steps, 2)
    assert difference([[first]], steps, 0) == "step 1 has 1 packs, not 2"


def test_steps_keep_the_recipes_packs_where_all_ranks_share_them_evenly(data):
    config = run_config(TINY, packs_per_step=48).model_copy(update={"data": data})
    assert request_of(config, steps=2, kill_at=1, ranks=RANKS, workers=(0,)).packs_per_step == 48
    with pytest.raises(ConfigError, match="--kill-at 2 must be at least 1 and below --steps 2"):
        request_of(config, steps=2, kill_at=2, ranks=RANKS, workers=(0,))
