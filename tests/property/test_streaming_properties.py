"""Packs from a stream: full, bounded in both costs and in how long a sample waits, resumable from JSON."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_megatron.data.packing import pack
from mimo_megatron.data.streaming import StreamPacker, Waiting
from mimo_megatron.errors import DataError

TOKENS, PATCHES = 100, 64
_STREAM = st.lists(st.tuples(st.integers(0, TOKENS), st.just(0) | st.integers(0, PATCHES)), max_size=60)


def packs_of(packer, samples):
    given_back = [packer.push(sample) for sample in samples]
    return [one for one in given_back if one is not None]


def named(stream):
    return [Waiting(name, *lengths) for name, lengths in enumerate(stream)]


@given(stream=_STREAM, buffer=st.integers(1, 12))
def test_every_sample_leaves_once_and_no_pack_exceeds_a_capacity(stream, buffer):
    packer = StreamPacker(TOKENS, PATCHES, buffer)
    packs = packs_of(packer, named(stream)) + list(packer.drain())
    assert sorted(one.name for packed in packs for one in packed) == list(range(len(stream)))
    for packed in packs:
        assert sum(one.num_tokens for one in packed) <= TOKENS
        assert sum(one.num_patches for one in packed) <= PATCHES


@given(stream=_STREAM, buffer=st.integers(1, 12))
def test_no_sample_waits_for_more_packs_than_the_buffer_holds_samples(stream, buffer):
    packer, packs, arrived = StreamPacker(TOKENS, PATCHES, buffer), 0, {}
    for sample in named(stream):
        if packed := packer.push(sample):
            packs += 1
            assert all(packs - arrived[one.name] <= buffer for one in packed)
            assert packed[0].name == min(set(arrived) - {None}), "the oldest is in every pack"
            for one in packed:
                del arrived[one.name]
        arrived[sample.name] = packs
        assert len(packer.state()["waiting"]) <= buffer


@given(lengths=st.lists(st.integers(1, TOKENS), min_size=1, max_size=10))
def test_a_pack_is_the_fullest_that_holds_the_oldest_sample(lengths):
    packer = StreamPacker(TOKENS, PATCHES, len(lengths))
    assert not packs_of(packer, named((length, 0) for length in lengths))
    packed = next(packer.drain())
    subsets = {lengths[0]}
    for length in lengths[1:]:
        subsets |= {total + length for total in subsets if total + length <= TOKENS}
    assert packed[0].name == 0 and sum(one.num_tokens for one in packed) == max(subsets)


@given(stream=_STREAM, buffer=st.integers(1, 12), place=st.integers(0, 60))
def test_a_packer_goes_on_from_its_state_in_json(stream, buffer, place):
    before, after = named(stream)[:place], named(stream)[place:]
    packer, other = StreamPacker(TOKENS, PATCHES, buffer), StreamPacker(TOKENS, PATCHES, buffer)
    packs_of(packer, before)
    other.load_state(json.loads(json.dumps(packer.state())))
    rest = [packs_of(one, after) + list(one.drain()) for one in (packer, other)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize(("mix", "fill_of_greedy"), [("log-normal", 0.95), ("bimodal", 0.98)])
def test_a_buffer_of_128_fills_packs_and_each_buffer_on_its_own_does_not(mix, fill_of_greedy):
    random = np.random.default_rng(1)
    lengths = random.lognormal(np.log(900), 1.1, 10_000)
    if mix == "bimodal":
        lengths = np.where(random.random(10_000) < 0.6, lengths, random.lognormal(np.log(6500), 0.6, 10_000))
    lengths = np.clip(lengths, 1, 32_768).astype(np.int64)
    full = packs_of(StreamPacker(32_768, 1, 128), named((length, 0) for length in lengths.tolist()))
    assert sum(one.num_tokens for packed in full for one in packed) / (32_768 * len(full)) >= 0.999
    buffers = [pack(lengths[first : first + 128], 32_768) for first in range(0, 10_000, 128)]
    assert lengths.sum() / (32_768 * sum(map(len, buffers))) < fill_of_greedy


def test_a_sample_over_a_capacity_is_refused_by_name():
    packer = StreamPacker(TOKENS, PATCHES)
    with pytest.raises(DataError, match="sample 'a' has 101 tokens and 0 patches but a pack holds 100 and 64"):
        packer.push(Waiting("a", 101))
