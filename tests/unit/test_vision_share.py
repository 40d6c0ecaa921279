"""A rank's share of a pack's images: its layout, its cost, and the way back into pack order."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from mimo_megatron.config.presets import preset
from mimo_megatron.config.vision_flops import frame_flops
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.model.vision_share import VisionShare, VisionSharing, layout_of, share_out
from mimo_megatron.parallel.mesh import Axis
from mimo_megatron.train.flops import step_flops
from mimo_megatron.types import VisionLayout

MODEL = preset("tiny-vl")
VISION = MODEL.vision and MODEL.vision.model_copy(update={"patch_size": 1, "window_size": 8})  # few bytes a patch
assert VISION is not None
SIDES = st.integers(1, 12).map(lambda units: 2 * units)
GRIDS = st.lists(st.tuples(st.integers(1, 4), SIDES, SIDES), min_size=1, max_size=6)


def shares(grids: list[tuple[int, int, int]], num_ranks: int) -> list[tuple[torch.Tensor, VisionLayout, VisionShare]]:
    """Of every rank; all values of a patch are its number. Flat media of more rows than columns are stills."""
    layout = vision_layout(grids, VISION, [frames == 1 and height >= width for frames, height, width in grids])
    widths = torch.tensor([VISION.still_bytes if is_still else VISION.patch_bytes for is_still in layout.stills_I])
    widths_P = widths.repeat_interleave(torch.tensor(grids).prod(1))
    pixels = torch.arange(layout.num_patches).repeat_interleave(widths_P)
    ranks = (Axis(rank, num_ranks) for rank in range(num_ranks))
    return [share_out(pixels, layout, VisionSharing(VISION, MODEL.text.width, rank)) for rank in ranks]


def patch_numbers(pixels: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
    """[P] read as the encoder reads a pack's pixels: run by run."""
    widths = [(VISION.still_bytes if is_still else VISION.patch_bytes, count) for is_still, count in layout.pixel_runs]
    parts = pixels.split([width * count for width, count in widths])
    rows = [part.view(count, width) for part, (width, count) in zip(parts, widths, strict=True)]
    assert all((row == row[:, :1]).all() for row in rows)
    return torch.cat([pixels[:0], *(row[:, 0] for row in rows)])


@given(GRIDS, st.integers(1, 5))
def test_gathered_features_are_those_of_the_pack_in_its_order(grids, num_ranks) -> None:
    """Each unit's number travels as its feature: through the blocks and ``order_M`` all arrive where they belong."""
    every = shares(grids, num_ranks)
    blocks = []
    for rank, (pixels, layout, share) in enumerate(every):
        features = patch_numbers(pixels, layout)[::4] // 4  # of each unit, in the rank's own order
        assert len(features) == share.num_rows[rank]
        blocks.append(torch.cat([features, features.new_full((share.block - len(features),), -1)]))
        assert torch.equal(share.order_M, every[0][2].order_M)
    num_units = sum(share_rows for share_rows in every[0][2].num_rows)
    assert torch.equal(torch.cat(blocks)[every[0][2].order_M], torch.arange(num_units))


@given(GRIDS, st.data())
def test_the_layout_of_some_pieces_is_that_of_a_pack_of_them(grids, data) -> None:
    layout = vision_layout(grids, MODEL.vision, [frames == 1 for frames, _, _ in grids])
    stills = [count == 1 for count, _, _ in grids for _ in range(count)]
    frames = [(1, height, width) for count, height, width in grids for _ in range(count)]
    some = sorted(data.draw(st.sets(st.integers(0, len(frames) - 1))))
    stills = [stills[piece] for piece in some]
    got, want = layout_of(layout, some, 4), vision_layout([frames[piece] for piece in some], MODEL.vision, stills)
    assert (got.grids_I3, got.stills_I) == (want.grids_I3, want.stills_I)
    assert got.window_bounds == want.window_bounds and got.frame_bounds == want.frame_bounds
    assert torch.equal(got.rope_hw_P2, want.rope_hw_P2)
    assert torch.equal(got.window_order_M, want.window_order_M)


@given(GRIDS)
def test_pieces_cost_together_what_the_accounting_of_a_step_counts(grids) -> None:
    assert MODEL.vision is not None
    counted = step_flops(MODEL, [], grids, [])
    sharing = VisionSharing(MODEL.vision, MODEL.text.width, Axis(0, 3))
    assert sum(sharing.costs(grids)) == counted.vision_linear + counted.vision_attention + counted.projector
    assert sum(sharing.predicted_loads(grids)) == sum(sharing.costs(grids))


def test_full_attention_makes_a_large_image_cost_more_than_its_patches_in_small_ones() -> None:
    vision = preset("mimo-vl-7b").vision
    assert vision is not None
    large, small = frame_flops(vision, 4096, 128, 128), frame_flops(vision, 4096, 16, 16)
    assert large > 1.1 * 64 * small


def test_a_video_is_cut_between_frames_and_an_image_is_never_cut() -> None:
    """Six equal frames go two to each of three ranks; one large image leaves two ranks without patches."""
    assert [share.num_rows for _, _, share in shares([(6, 4, 4)], 3)] == [(8, 8, 8)] * 3
    sizes = [layout.num_patches for _, layout, _ in shares([(1, 20, 20)], 3)]
    assert sorted(sizes) == [0, 0, 400]


def test_a_rank_without_images_gets_an_empty_layout() -> None:
    _, layout, share = shares([(1, 4, 4)], 2)[1]
    assert (layout.frame_bounds, layout.window_bounds, len(layout.window_order_M)) == ((0,), (0,), 0)
    assert share.num_rows == (4, 0) and list(itertools.pairwise(layout.frame_bounds)) == []
