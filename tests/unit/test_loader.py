"""The loader: one stream of packs for any number of ranks, exact resume, damaged samples dropped and counted."""

import json
import threading
import time

import numpy as np
import pytest
import torch

from mimo_megatron.data import plan
from mimo_megatron.data.collate import collate
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.loader import PackLoader
from mimo_megatron.data.making import ThreadMaker
from mimo_megatron.data.plan import Position
from mimo_megatron.errors import ConfigError, DataError
from tests.data_fixtures import TINY, image_sample, mixed_samples, recipe, text_sample, write_source, write_tokenizer

PACKS_PER_STEP = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources, 40 and 12 samples; several windows, some of them spanned by one step."""
    home = tmp_path_factory.mktemp("loader")
    folders = [home / "large", home / "small"]
    data = recipe(folders, write_tokenizer(home / "tokenizer"))
    write_source(folders[0], mixed_samples(40), data)
    write_source(folders[1], [text_sample(1000 + number, number) for number in range(12)], data)
    return data


@pytest.fixture
def open_loader():
    opened = []

    def open_one(data, **changes):
        options = {"packs_per_step": PACKS_PER_STEP, "seed": 5, "dp_rank": 0, "dp_size": 1, **changes}
        opened.append(PackLoader(data, TINY, **options))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def equal(first, second) -> bool:
    tensors = ("token_ids_S", "labels_S", "loss_weights_S", "positions_3S", "pixels_Y", "splice_M", "splice_rows_M")
    return (
        all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
        and first.segment_bounds == second.segment_bounds
        and first.sample_ids == second.sample_ids
    )


def all_equal(first, second) -> bool:
    return len(first) == len(second) and all(equal(*pair) for pair in zip(first, second, strict=True))


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stream(loader, num_steps):
    return [pack for _ in range(num_steps) for pack in loader.next_step()]


def by_name(packs):
    return sorted(packs, key=lambda pack: pack.sample_ids)


def test_ranks_share_the_packs_of_one_process(data, open_loader):
    alone = open_loader(data)
    ranks = [open_loader(data, dp_rank=rank, dp_size=2) for rank in range(2)]
    for _ in range(8):
        packs, dealt = alone.next_step(), [loader.next_step() for loader in ranks]
        assert [len(one) for one in dealt] == [2, 2]
        assert all_equal(by_name(packs), by_name(dealt[0] + dealt[1]))
    assert alone.state() == ranks[0].state() == ranks[1].state()
    assert alone.state()["epoch"] >= 1, "the steps should span epochs"


@pytest.mark.parametrize("num_before", [0, 1, 5, 9])
def test_a_resumed_loader_gives_the_packs_of_the_uninterrupted_one(data, open_loader, num_before):
    first = open_loader(data)
    stream(first, num_before)
    state = json.loads(json.dumps(first.state()))
    expected = stream(first, 3)
    for size in (1, 2, 4):
        dealt = []
        for rank in range(size):
            loader = open_loader(data, dp_rank=rank, dp_size=size)
            loader.load_state(state)
            assert loader.state() == state
            dealt += stream(loader, 3)
        assert all_equal(by_name(expected), by_name(dealt))


def test_a_loader_that_already_ran_can_be_set_back(data, open_loader):
    loader = open_loader(data)
    state = loader.state()
    first = stream(loader, 2)
    loader.load_state(state)
    assert all_equal(first, stream(loader, 2))


def test_state_counts_consumed_packs_and_not_prefetched_ones(data, open_loader):
    loader = open_loader(data)
    loader.next_step()
    wait_until(lambda: loader._ahead._made.qsize() > PACKS_PER_STEP)
    assert (loader.state()["epoch"], loader.state()["consumed"]) == (0, PACKS_PER_STEP)


def test_samples_are_counted_by_source_over_all_ranks_and_the_counts_are_part_of_the_state(data, open_loader):
    loader = open_loader(data, dp_rank=1, dp_size=2)
    while loader.state()["epoch"] < 2:
        loader.next_step()
    large, small = loader.epochs_of_sources().items()
    assert (large[0], small[0]) == ("large", "small")
    # Equal weights: 26 of the 52 samples of an epoch come from each source. Two epochs and a step at most are read.
    for used in (40 * large[1], 12 * small[1]):
        assert used == round(used, 9) and 52 <= used < 90
    again = open_loader(data)
    again.load_state(json.loads(json.dumps(loader.state())))
    assert again.epochs_of_sources() == loader.epochs_of_sources()


def test_the_state_is_small_plain_json(data, open_loader):
    state = open_loader(data).state()
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 1024


def test_every_sample_of_an_epoch_arrives_once(data, open_loader):
    loader = open_loader(data.model_copy(update={"sources": data.sources[:1]}), packs_per_step=1)
    seen: list[str] = []
    while len(seen) < 40:
        seen += [name for pack in loader.next_step() for name in pack.sample_ids]
    assert len(set(seen)) == len(seen) == 40
    assert loader.state()["epoch"] == 0


def test_packs_are_the_collated_samples_of_the_plan(data, open_loader):
    loader = open_loader(data)
    (first, *_), plan = loader.next_step(), loader.corpus.plan(5)
    packs, _ = plan.take(Position(0, 0), PACKS_PER_STEP)
    numbers = packs[plan.deal(packs, 1)[0][0]].tolist()
    assert equal(
        first, collate([one for number in numbers for one in loader.corpus.encode(number)], TINY, data.pack_tokens)
    )


@pytest.mark.parametrize(
    "changes", [{"seed": 6}, {"window_samples": 17}, {"pack_tokens": 200}, {"weight": 3.0}, {"sources": 1}]
)
def test_a_state_of_another_stream_is_refused(data, open_loader, changes):
    state = open_loader(data).state()
    seed = changes.get("seed", 5)
    changes = {key: value for key, value in changes.items() if key != "seed"}
    if "weight" in changes:
        reweighted = data.sources[1].model_copy(update=changes)
        changes = {"sources": (data.sources[0], reweighted)}
    elif "sources" in changes:
        changes = {"sources": data.sources[:1]}
    with pytest.raises(ConfigError, match="data stream cannot be resumed"):
        open_loader(data.model_copy(update=changes), seed=seed).load_state(state)


def test_packs_that_ranks_cannot_share_evenly_are_refused_with_the_equation(data, open_loader):
    with pytest.raises(ConfigError, match=r"train\.packs_per_step \(4\) % data-parallel size \(3\) = 1, must be 0"):
        open_loader(data, dp_size=3)


def test_an_index_of_other_settings_is_refused(data, open_loader):
    with pytest.raises(ConfigError, match="was built under other settings"):
        open_loader(data.model_copy(update={"max_pixels": 5000}))


# -- damaged data ---------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Twelve images with the pixels of number 5 overwritten after the index was built; its header is whole."""
    folder = tmp_path / "source"
    data = recipe(folder, write_tokenizer(tmp_path / "tokenizer"), pack_tokens=128, read={"verify": False})
    write_source(folder, [image_sample(number, [(84, 84)]) for number in range(12)], data, samples_per_shard=12)
    return data, folder / "shard-000000.tar"


def damage(loader, shard, name):
    source = loader.corpus.sources[0]
    (ref,) = next(raw for raw in map(source.read, range(12)) if raw.id == name).media
    with shard.open("r+b") as file:
        file.seek(ref.offset + 60)
        file.write(b"\xff" * (ref.num_bytes - 60))


def test_a_damaged_sample_leaves_its_pack_and_nothing_else_changes(damaged, open_loader):
    data, shard = damaged
    whole = stream(open_loader(data), 2)
    loader = open_loader(data)
    damage(loader, shard, "image-5")
    found = stream(loader, 2)
    num_times = sum("image-5" in pack.sample_ids for pack in whole)
    assert num_times >= 1
    for before, after in zip(whole, found, strict=True):
        assert after.sample_ids == tuple(name for name in before.sample_ids if name != "image-5")
        if "image-5" not in before.sample_ids:
            assert equal(before, after)
    assert loader.skipped == {"media": num_times}
    log = loader.take_skip_log()
    assert [(entry["id"], entry["reason"]) for entry in log] == [("image-5", "media")] * num_times
    assert loader.take_skip_log() == []


def test_a_pack_whose_only_sample_is_damaged_is_padding(tmp_path, open_loader):
    folder = tmp_path / "source"
    data = recipe(folder, write_tokenizer(tmp_path / "tokenizer"))
    write_source(folder, [image_sample(0)], data)
    loader = open_loader(data, packs_per_step=1)
    shard = folder / "shard-000000.tar"
    (ref,) = loader.corpus.read(0).media
    content = bytearray(shard.read_bytes())
    content[ref.offset : ref.offset + ref.num_bytes] = bytes(ref.num_bytes)
    shard.write_bytes(content)
    (pack,) = loader.next_step()
    assert (pack.num_tokens, pack.sample_ids, pack.num_slots) == (0, (), 256)


def test_a_skip_is_counted_when_its_step_is_consumed_and_not_when_it_is_prefetched(damaged, open_loader):
    data, shard = damaged
    loader = open_loader(data, packs_per_step=1)
    while True:
        state = loader.state()
        (pack,) = loader.next_step()
        if "image-5" in pack.sample_ids:
            break
    damage(loader, shard, "image-5")
    loader.load_state(state)
    assert not loader.skipped
    loader.next_step()
    assert loader.skipped == {"media": 1}


def test_a_sample_that_outgrew_its_index_row_is_dropped(damaged, open_loader):
    data, _ = damaged
    loader = open_loader(data)
    lengths = loader.corpus.sources[0].lengths
    loader.corpus.sources[0].lengths = lengths._replace(num_tokens_N=lengths.num_tokens_N - 1)
    stream(loader, 1)
    assert set(loader.skipped) == {"lengths_changed"}


def test_samples_over_a_capacity_are_counted_once_by_the_first_rank(tmp_path, open_loader):
    folder = tmp_path / "source"
    data = recipe(folder, write_tokenizer(tmp_path / "tokenizer"))
    samples = [text_sample(0), image_sample(1, [(560, 560)]), text_sample(2, 300), image_sample(3)]
    write_source(folder, samples, data)
    ranks = [open_loader(data, dp_rank=rank, dp_size=2) for rank in range(2)]
    for loader in ranks:
        stream(loader, 3)
    assert [dict(loader.skipped) for loader in ranks] == [{"over_capacity": 2}, {}]
    image, text = ranks[0].take_skip_log()
    assert (image["id"], text["id"]) == ("image-1", "text-2")
    assert "1600 patches; a pack holds data.pack_tokens 256 and data.pack_patches 256" in image["detail"]


def test_a_fault_of_the_background_is_raised_by_next_step_and_the_step_can_be_asked_for_again(data, open_loader):
    loader, whole = open_loader(data), open_loader(data)
    encode, sources = loader.corpus.encode, loader.corpus.sources
    loader.corpus.encode = lambda number: encode(number) if number else 1 / 0  # our own mistake, not a sample's
    with pytest.raises(ZeroDivisionError):
        for _ in range(len(sources[0].lengths.num_tokens_N)):
            state = loader.state()
            loader.next_step()
    assert loader.state() == state
    loader.corpus.encode = encode
    whole.load_state(state)
    assert all_equal(loader.next_step(), whole.next_step())


def test_closing_ends_a_window_that_is_being_packed(data, open_loader, monkeypatch):
    loader = open_loader(data, packs_per_step=1)
    started = threading.Event()

    def pack_until_cancelled(_lengths, _costs, _tokens, _patches, is_cancelled=None):
        started.set()
        wait_until(is_cancelled or (lambda: False))
        raise RuntimeError("cancelled")

    monkeypatch.setattr(plan, "pack_balanced", pack_until_cancelled)  # the first window is packed already
    loader.next_step()
    assert started.wait(20)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 10


def test_closing_ends_a_pack_after_the_sample_under_way(data, open_loader, monkeypatch):
    encoded, go_on = [], threading.Event()
    real = Corpus.encode

    def encode(corpus, number):
        encoded.append(number)
        assert go_on.wait(20)
        return real(corpus, number)

    monkeypatch.setattr(Corpus, "encode", encode)
    maker = ThreadMaker(Corpus(data, TINY))
    pack = maker.start(range(4), {})
    wait_until(lambda: encoded)
    maker.close()
    go_on.set()
    with pytest.raises(DataError, match="the loader was closed"):
        pack.result(20)
    assert encoded == [0]


def test_packs_are_made_in_the_background_as_far_as_bytes_and_steps_reach(data, open_loader):
    loader = open_loader(data)
    maker: set[str] = set()
    encode = loader.corpus.encode
    loader.corpus.encode = lambda number: (maker.add(threading.current_thread().name), encode(number))[1]
    loader.next_step()
    wait_until(lambda: loader._ahead._made.qsize() == 4 * (1 + PACKS_PER_STEP) + 1)  # plans, their packs, a plan
    assert maker == {"pack-loader"}


def test_two_runs_are_bit_identical(data, open_loader):
    first, second = (stream(open_loader(data), 6) for _ in range(2))
    assert all_equal(first, second)
    assert any(pack.num_patches for pack in first) and np.mean([pack.num_tokens for pack in first]) > 128
