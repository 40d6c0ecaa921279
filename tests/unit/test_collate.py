"""A pack is its samples side by side: labels, positions and splice never cross a segment, padding carries nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_megatron.config.presets import preset
from mimo_megatron.data.collate import MAX_PADDING_SEGMENT, collate
from mimo_megatron.data.positions import mrope_positions
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.types import EncodedMedia, EncodedSample
from tests.data_fixtures import TINY

IMAGE_PAD, VIDEO_PAD = TINY.tokens.image_pad, TINY.tokens.video_pad


def encoded(name: str, plan, seed: int = 0) -> EncodedSample:
    """Runs of text (a number of tokens) and media (a kind and a grid), with random ids and loss mask."""
    random = np.random.default_rng(seed)
    ids: list[int] = []
    media = []
    for run in plan:
        if isinstance(run, int):
            ids += random.integers(10, 500, run).tolist()
            continue
        kind, grid = run
        num_patches = int(np.prod(grid))
        is_still = kind == "image"
        pixels = random.integers(0, 256, (num_patches, 588 if is_still else 1176), dtype=np.uint8)
        media.append(EncodedMedia(kind, pixels, grid, 0.0 if is_still else 1.0, 2 if is_still else 1))
        ids += [IMAGE_PAD if kind == "image" else VIDEO_PAD] * (num_patches // 4)
    is_text = ~np.isin(ids, [IMAGE_PAD, VIDEO_PAD])
    return EncodedSample(name, np.array(ids), is_text & (random.random(len(ids)) < 0.5), tuple(media))


SAMPLES = [
    encoded("a", [3, ("image", (1, 4, 6)), 4], seed=1),
    encoded("b", [5], seed=2),
    encoded("c", [1, ("video", (2, 2, 4)), 2, ("image", (1, 2, 2)), 3], seed=3),
]


def segments(pack):
    return [slice(start, end) for start, end in zip(pack.segment_bounds, pack.segment_bounds[1:], strict=False)]


def test_a_pack_equals_its_samples_collated_alone():
    pack = collate(SAMPLES, TINY, 64)
    for sample, segment in zip(SAMPLES, segments(pack), strict=False):
        alone = collate([sample], TINY, sample.num_tokens)
        for field in ("token_ids_S", "labels_S", "loss_weights_S"):
            assert torch.equal(getattr(pack, field)[segment], getattr(alone, field))
        assert torch.equal(pack.positions_3S[:, segment], alone.positions_3S)
    assert pack.sample_ids == ("a", "b", "c")
    assert pack.num_tokens == sum(sample.num_tokens for sample in SAMPLES)


def test_labels_are_the_next_tokens_where_the_mask_asks_for_them():
    for sample in SAMPLES:
        pack = collate([sample], TINY, 32)
        for slot in range(32):
            is_trained = slot + 1 < sample.num_tokens and bool(sample.loss_mask_T[slot + 1])
            assert pack.loss_weights_S[slot] == is_trained
            assert pack.labels_S[slot] == (sample.token_ids_T[slot + 1] if is_trained else 0)


def test_the_last_token_of_a_segment_predicts_nothing():
    trained = [EncodedSample(name, np.arange(10, 15), np.ones(5, bool)) for name in "ab"]
    pack = collate(trained, TINY, 12)
    assert pack.loss_weights_S.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]


def test_positions_are_those_of_each_sample_from_zero():
    pack = collate(SAMPLES, TINY, 64)
    for sample, segment in zip(SAMPLES, segments(pack), strict=False):
        expected = mrope_positions(sample.token_ids_T, sample.media, TINY)
        assert np.array_equal(pack.positions_3S[:, segment].numpy(), expected)
        assert not expected[:, 0].any()


def test_each_placeholder_slot_gets_its_own_merge_unit():
    pack = collate(SAMPLES, TINY, 64)
    media = [one for sample in SAMPLES for one in sample.media]
    assert pack.pixels_Y.numpy().tobytes() == b"".join(one.pixels_PZ.tobytes() for one in media)
    units = iter(range(pack.num_patches // 4))
    start = 0
    for sample in SAMPLES:
        for slot in np.flatnonzero(np.isin(sample.token_ids_T, [IMAGE_PAD, VIDEO_PAD])):
            unit = next(units)
            assert (pack.splice_M[unit], pack.splice_rows_M[unit]) == (start + slot, unit)
        start += sample.num_tokens
    assert next(units, None) is None
    assert pack.vision is not None and pack.vision.grids_I3 == tuple(one.grid for one in media)
    assert torch.equal(
        pack.vision.window_order_M, vision_layout([one.grid for one in media], TINY.vision).window_order_M
    )


def test_a_picture_that_several_samples_share_stands_once_and_every_placeholder_takes_its_row():
    shared, own, last = (encoded(name, [2, ("image", grid), 1], seed) for name, grid, seed in (
        ("a", (1, 4, 6), 1), ("b", (1, 2, 4), 2), ("d", (1, 2, 2), 4)
    ))  # fmt: skip
    again = EncodedSample("c", shared.token_ids_T, shared.loss_mask_T, shared.media)
    pack = collate([shared, own, again, last], TINY, 64)
    media = [*shared.media, *own.media, *last.media]
    assert pack.pixels_Y.numpy().tobytes() == b"".join(one.pixels_PZ.tobytes() for one in media)
    assert pack.vision is not None and pack.vision.grids_I3 == tuple(one.grid for one in media)
    assert pack.splice_rows_M.tolist() == [*range(6), 6, 7, *range(6), 8]
    assert len(pack.splice_M) == len(pack.splice_rows_M)


def test_padding_is_short_segments_without_loss():
    num_slots = 5 + 2 * MAX_PADDING_SEGMENT + 7
    pack = collate([SAMPLES[1]], TINY, num_slots)
    assert np.diff(pack.segment_bounds).tolist() == [5, MAX_PADDING_SEGMENT, MAX_PADDING_SEGMENT, 7]
    assert (pack.token_ids_S[5:] == TINY.tokens.pad).all()
    assert not pack.loss_weights_S[5:].any() and not pack.labels_S[5:].any()
    for segment in segments(pack)[1:]:
        length = segment.stop - segment.start
        assert torch.equal(pack.positions_3S[:, segment], torch.arange(length).expand(3, length))


def test_an_empty_pack_is_padding():
    pack = collate([], TINY, 40)
    assert (pack.segment_bounds, pack.num_tokens, pack.sample_ids, pack.vision) == ((0, 40), 0, (), None)
    assert pack.pixels_Y.shape == (0,) and pack.pixels_Y.dtype == torch.uint8 and pack.num_patches == 0
    assert pack.splice_M.shape == (0,) and not pack.loss_weights_S.any()


def test_text_packs_have_no_vision_in_either_kind_of_model():
    for model in (TINY, preset("tiny-base")):
        pack = collate([SAMPLES[1]], model, 8)
        assert pack.vision is None and len(pack.pixels_Y) == len(pack.splice_M) == len(pack.splice_rows_M) == 0


def test_a_full_pack_has_no_padding_segment():
    assert collate([SAMPLES[1]], TINY, 5).segment_bounds == (0, 5)


def test_samples_beyond_the_slots_are_a_bug_of_the_planner():
    with pytest.raises(AssertionError, match="5 tokens planned into 4 slots"):
        collate([SAMPLES[1]], TINY, 4)


_SIDES = st.integers(1, 3).map(lambda half: 2 * half)
_MEDIA = st.one_of(
    st.tuples(st.just("image"), st.tuples(st.just(1), _SIDES, _SIDES)),
    st.tuples(st.just("video"), st.tuples(st.integers(1, 3), _SIDES, _SIDES)),
)
_RUNS = st.lists(_MEDIA, max_size=3).map(lambda media: [2, *(run for one in media for run in (one, 1))])


@settings(max_examples=40, deadline=None)
@given(plans=st.lists(_RUNS, max_size=4), padding=st.integers(0, 9))
def test_every_pack_keeps_the_promises_of_its_type(plans, padding):
    samples = [encoded(str(number), runs, seed=number) for number, runs in enumerate(plans)]
    num_tokens = sum(sample.num_tokens for sample in samples)
    pack = collate(samples, TINY, max(1, num_tokens + padding))
    dtypes = {
        "token_ids_S": torch.int64, "labels_S": torch.int64, "loss_weights_S": torch.float32,
        "positions_3S": torch.int64, "pixels_Y": torch.uint8, "splice_M": torch.int64, "splice_rows_M": torch.int64,
    }  # fmt: skip
    assert {name: getattr(pack, name).dtype for name in dtypes} == dtypes
    assert pack.segment_bounds[0] == 0 and pack.segment_bounds[-1] == pack.num_slots
    assert list(pack.segment_bounds) == sorted(set(pack.segment_bounds))
    assert len(pack.splice_M) * 4 == pack.num_patches
    assert float(pack.loss_weights_S.sum()) == sum(sample.loss_mask_T[1:].sum() for sample in samples)
    for start in pack.segment_bounds[:-1]:
        assert not pack.positions_3S[:, start].any()
