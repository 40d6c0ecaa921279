"""A rank's loader decodes the media that the rank encodes and no others; all else of its packs is everybody's."""

import dataclasses

import numpy as np
import pytest
import torch

from mimo_megatron.config.run import ParallelConfig, VideoConfig
from mimo_megatron.data import encode
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.loader import PackLoader, open_maker
from mimo_megatron.data.making import MEDIA, make_pack
from mimo_megatron.data.media_part import ALL_MEDIA, NO_MEDIA, MediaPart
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.data.video import encode_video, video_grid
from mimo_megatron.errors import DataError
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.model.vision_share import VisionSharing, all_pixels, share_out
from mimo_megatron.parallel.mesh import Axis, Mesh
from mimo_megatron.train.step import media_part
from mimo_megatron.types import PackedBatch
from tests.data_fixtures import (
    TINY,
    clip,
    mixed_samples,
    picture,
    recipe,
    user_and_assistant,
    video_sample,
    write_source,
    write_tokenizer,
)

assert TINY.vision is not None
STEPS = 3
DAMAGED = (26, 27)
"""Numbers of the samples whose picture cannot be decoded."""


def damaged_picture(number: int) -> ShardSample:
    """A JPEG whose header is good and whose second half is missing: the index takes it."""
    record = {"id": f"damaged-{number}", "messages": user_and_assistant([{"type": "image", "image": "a.jpg"}], "?")}
    whole = picture(112, 112, seed=number, format="JPEG")
    return ShardSample(f"{number:06d}", record, {"a.jpg": whole[: len(whole) // 2]})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts, pictures, videos of four steps; two of the pictures cannot be decoded."""
    home = tmp_path_factory.mktemp("part")
    data = recipe(home / "source", write_tokenizer(home / "tokenizer"), pack_patches=1024)
    samples = [*mixed_samples(24), video_sample(24), video_sample(25), *map(damaged_picture, DAMAGED)]
    assert not write_source(home / "source", samples, data).skipped
    return data


@pytest.fixture
def open_loader(data):
    opened = []

    def open_one(part=ALL_MEDIA, maker=None):
        opened.append(PackLoader(data, TINY, packs_per_step=2, seed=3, part=part, maker=maker))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def sharing_of(part: MediaPart) -> VisionSharing:
    return VisionSharing(TINY.vision, TINY.text.width, Axis(part.rank, part.size))


def assert_same_but_pixels(one: PackedBatch, other: PackedBatch) -> None:
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor) and name != "pixels_Y":
            assert torch.equal(value, getattr(other, name)), name
    assert (one.segment_bounds, one.sample_ids) == (other.segment_bounds, other.sample_ids)
    for name, value in vars(one.vision).items() if one.vision else ():
        same = value == getattr(other.vision, name)
        assert same.all() if isinstance(same, torch.Tensor) else same, name


def step_of_all(loaders: list[PackLoader]) -> list[list[PackedBatch]]:
    """The next step of each, after what ``agree`` does between ranks."""
    steps = [loader.next_step() for loader in loaders]
    faults = {number: fault for one in loaders for number, fault in one.faults.items()}
    return [loader.leave_out(step, faults) for loader, step in zip(loaders, steps, strict=True)]


def num_pieces(pack: PackedBatch) -> int:
    return sum(steps for steps, _, _ in pack.vision.grids_I3) if pack.vision else 0


@pytest.mark.parametrize("size", [2, 3])
def test_parts_are_what_each_rank_encodes_and_together_they_are_the_pack(open_loader, size):
    whole = open_loader()
    parts = [MediaPart(rank, size) for rank in range(size)]
    loaders = [open_loader(part) for part in parts]
    shared_videos = 0
    for _ in range(STEPS):
        expected, steps = whole.next_step(), step_of_all(loaders)
        assert {loader.packs_digest for loader in loaders} == {whole.packs_digest}
        for pack, *packs in zip(expected, *steps, strict=True):
            for part, own in zip(parts, packs, strict=True):
                assert_same_but_pixels(own, pack)
                if pack.vision is None:
                    assert own.pieces_held == () and not len(own.pixels_Y)
                    continue
                wanted, layout, _ = share_out(pack.pixels_Y, pack.vision, sharing_of(part))
                assert torch.equal(own.pixels_Y, wanted)
                local = local_pack(own, Axis(0, 1), sharing=sharing_of(part))
                assert torch.equal(local.pixels_Y, wanted) and local.vision.grids_I3 == layout.grids_I3
            held = sorted(piece for own in packs for piece in own.pieces_held)
            assert held == list(range(num_pieces(pack)))
            if pack.vision:
                again = all_pixels([own.pixels_Y for own in packs], pack.vision, sharing_of(parts[0]))
                assert torch.equal(again, pack.pixels_Y)
                shared_videos += sum(steps > 1 for steps, _, _ in pack.vision.grids_I3)
    assert shared_videos


def test_a_rank_without_the_encoder_decodes_nothing_and_has_all_else(open_loader, monkeypatch):
    whole, inner = open_loader(), open_loader(NO_MEDIA)
    expected = [pack for _ in range(STEPS) for pack in whole.next_step()]
    faults = whole.skipped
    whole.close()

    def refuse(*_args, **_kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(encode, "encode_image", refuse)
    monkeypatch.setattr(encode, "encode_video", refuse)
    found = []
    undecoded = {number: SampleError(f"damaged-{number}", MEDIA, "told by another rank") for number in DAMAGED}
    for _ in range(STEPS):
        found += inner.leave_out(inner.next_step(), undecoded)
    for own, pack in zip(found, expected, strict=True):
        assert_same_but_pixels(own, pack)
        assert own.pieces_held == () and not len(own.pixels_Y)
    assert inner.skipped == faults
    assert any(pack.vision for pack in found)


def test_each_picture_is_decoded_on_one_rank(data, monkeypatch):
    counts: list[int] = []
    real = encode.encode_image

    def counted(*args, **kwargs):
        counts[-1] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(encode, "encode_image", counted)
    for part in (ALL_MEDIA, MediaPart(0, 2), MediaPart(1, 2)):
        counts.append(0)
        make_pack(Corpus(data, TINY, part), range(6), {}, lambda place: None)
    assert counts[1] + counts[2] == counts[0] and min(counts) > 0


def test_a_picture_that_one_rank_cannot_decode_is_left_out_by_the_others_when_they_are_told(open_loader):
    """Of it, only the rank that decodes it knows; until the others are told, their packs' digests differ."""
    whole, *loaders = open_loader(), open_loader(MediaPart(0, 2)), open_loader(MediaPart(1, 2)), open_loader(NO_MEDIA)
    untold = [open_loader(loader.corpus.part) for loader in loaders]
    differed = False
    for _ in range(STEPS):
        whole.next_step()
        for loader in untold:
            loader.next_step()
        differed |= len({loader.packs_digest for loader in untold}) > 1
        step_of_all(loaders)
        assert {loader.packs_digest for loader in loaders} == {whole.packs_digest}
    assert differed and set(whole.skipped) == {MEDIA}
    listed = whole.take_skip_log()
    assert {row["id"] for row in listed} == {"damaged-26", "damaged-27"}
    for loader in loaders:
        assert loader.skipped == whole.skipped
        assert sorted(row["id"] for row in loader.take_skip_log()) == sorted(row["id"] for row in listed)


def test_a_worker_makes_the_part_of_its_rank(data, open_loader):
    part = MediaPart(1, 2)
    pool = open_maker(data.model_copy(update={"workers": 1}), TINY, part)
    ours, theirs = open_loader(part), open_loader(maker=pool)
    for _ in range(2):
        for one, other in zip(ours.next_step(), theirs.next_step(), strict=True):
            assert_same_but_pixels(one, other)
            assert torch.equal(one.pixels_Y, other.pixels_Y) and one.pieces_held == other.pieces_held
        assert ours.faults.keys() == theirs.faults.keys()
    pool.close()


def steps_of_video(content: bytes, steps: list[int] | None) -> np.ndarray | None:
    """Their pixels, or None where they cannot be decoded."""
    try:
        return encode_video(content, TINY.vision, VideoConfig(fps=8), min_pixels=3136, steps=steps).pixels_PZ
    except DataError:
        return None


def test_a_damaged_video_fails_in_some_step_where_it_fails_as_a_whole_and_in_none_where_it_does_not():
    """So whether a sample is left out does not depend on how its steps are divided over ranks; nor do the pixels."""
    good = clip(32)
    media, outcomes = good.index(b"mdat"), set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        content = bytearray(good)
        for place in rng.integers(media + 8, good.index(b"moov", media), 1 + seed):
            content[place] = rng.integers(256)
        (num_steps, _, _), _ = video_grid(bytes(content), TINY.vision, VideoConfig(fps=8), min_pixels=3136)
        whole = steps_of_video(bytes(content), None)
        parts = [steps_of_video(bytes(content), [step]) for step in range(num_steps)]
        decoded = [part for part in parts if part is not None]
        assert (whole is None) == (len(decoded) < num_steps)
        assert whole is None or np.array_equal(np.concatenate(decoded), whole)
        outcomes.add(whole is None)
    assert outcomes == {True, False}


def test_a_pack_that_holds_another_rank_s_pieces_is_not_shared_out(open_loader):
    loader = open_loader(MediaPart(0, 2))
    packs = [pack for _ in range(STEPS) for pack in loader.next_step()]
    pack = next(pack for pack in packs if len(pack.pieces_held) > 1)
    with pytest.raises(AssertionError, match="the loader decoded the pieces"):
        local_pack(pack, Axis(0, 1), sharing=sharing_of(MediaPart(1, 2)))


def test_the_first_stage_decodes_what_it_encodes_and_the_others_nothing():
    def mesh(pp_rank: int) -> Mesh:
        one = Axis(0, 1)
        return Mesh(tp=Axis(1, 2), cp=one, dp=one, pp=Axis(pp_rank, 2), tp_cp=Axis(1, 2))

    replicated, balanced = ParallelConfig(tp=2, pp=2), ParallelConfig(tp=2, pp=2, vision_placement="balanced")
    assert media_part(replicated, mesh(0)) == ALL_MEDIA
    assert media_part(balanced, mesh(0)) == MediaPart(1, 2)
    assert media_part(replicated, mesh(1)) == media_part(balanced, mesh(1)) == NO_MEDIA
    alone = dataclasses.replace(mesh(0), tp=Axis(0, 1), tp_cp=Axis(0, 1))
    assert media_part(balanced, alone) == ALL_MEDIA
