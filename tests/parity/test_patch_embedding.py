"""The patch embedding from raw pixels against its definition: normalise, repeat a still's frame, multiply by W."""

import copy

import pytest
import torch
from torch import Tensor

from mimo_megatron.config.presets import preset
from mimo_megatron.model import patch_embed
from mimo_megatron.model.patch_embed import CENTRE, PIXEL_MEAN, PIXEL_STD, PatchEmbedding
from tests.parity_rule import assert_named_parity, relative_error

VISION = preset("tiny-vl").vision
assert VISION is not None
Runs = list[tuple[bool, int]]
RUNS: dict[str, Runs] = {
    "stills": [(True, 48)],
    "videos": [(False, 24)],
    "mixed": [(True, 8), (False, 16), (True, 24), (False, 4)],
}


def material(runs: Runs, seed: int = 0) -> tuple[PatchEmbedding, Tensor]:
    torch.manual_seed(seed)
    embedding = PatchEmbedding(VISION)
    torch.nn.init.normal_(embedding.weight, std=1176**-0.5)
    size = sum(count * (588 if is_still else 1176) for is_still, count in runs)
    return embedding, torch.randint(0, 256, (size,), dtype=torch.uint8)


def whole_patches(pixels_Y: Tensor, runs: Runs) -> Tensor:
    """[P, 1176] a still's frame twice."""
    parts = pixels_Y.split([count * (588 if is_still else 1176) for is_still, count in runs])
    rows = [part.view(count, 3, -1, 196) for part, (_, count) in zip(parts, runs, strict=True)]
    return torch.cat([row.expand(-1, -1, 2, -1).flatten(1) for row in rows])


def by_definition(weight: Tensor, patches_PC: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean, std = (torch.tensor(values, dtype=wide).repeat_interleave(392) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((patches_PC.to(wide) / 255 - mean) / std).to(weight.dtype) @ weight.T


def outcome(embedding: PatchEmbedding, out_PD: Tensor) -> dict[str, Tensor]:
    embedding.zero_grad()
    pull_PD = torch.randn(out_PD.shape, generator=torch.Generator().manual_seed(1)).to(out_PD.dtype)
    (out_PD * pull_PD).sum().backward()
    assert embedding.weight.grad is not None
    return {"out": out_PD.detach(), "weight": embedding.weight.grad.clone()}


def outcomes(runs: Runs, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], ...]:
    """(ours, the definition in the same dtype, the definition in float64 from the same weights)"""
    embedding, pixels_Y = material(runs, seed)
    embedding, patches_PC = embedding.to(dtype), whole_patches(pixels_Y, runs)
    exact = copy.deepcopy(embedding).double()
    return (
        outcome(embedding, embedding(pixels_Y, runs)),
        outcome(embedding, by_definition(embedding.weight, patches_PC)),
        outcome(exact, by_definition(exact.weight, patches_PC)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_raw_pixels_give_the_values_and_gradients_of_normalised_ones(runs: Runs, dtype: torch.dtype) -> None:
    pooled = [
        {name: torch.stack([one[name] for one in row]) for name in row[0]}
        for row in zip(*(outcomes(runs, dtype, seed) for seed in range(4)), strict=True)
    ]
    assert_named_parity(*pooled, dtype)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_in_float64_both_are_the_same_function(runs: Runs) -> None:
    ours, _, oracle = outcomes(runs, torch.float64)
    assert max(relative_error(ours[name], oracle[name]) for name in ours) < 1e-13


def test_both_frames_of_the_weight_get_a_stills_gradient() -> None:
    ours, _, _ = outcomes(RUNS["stills"], torch.float64)
    first, second = ours["weight"].unflatten(1, (3, 2, 196)).unbind(2)
    assert torch.equal(first, second) and first.any()


def test_no_pixels_give_no_rows_and_a_zero_gradient() -> None:
    embedding, pixels_Y = material([])
    got = outcome(embedding, embedding(pixels_Y, []))
    assert got["out"].shape == (0, VISION.width) and not got["weight"].any()


def test_centred_pixels_are_exact_in_bfloat16() -> None:
    levels = torch.arange(256)
    for centre in CENTRE:
        assert torch.equal((levels.to(torch.bfloat16) - centre).long(), levels - centre)


def test_weights_folded_about_zero_would_miss_the_bar_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why pixels are centred: with the whole shift in the bias, rounded weights no longer cancel it."""
    monkeypatch.setattr(patch_embed, "CENTRE", (0, 0, 0))
    with pytest.raises(AssertionError, match="exceeds"):
        test_raw_pixels_give_the_values_and_gradients_of_normalised_ones(RUNS["mixed"], torch.bfloat16)


@pytest.mark.parametrize("fault", ["the first frame twice", "means swapped"])
def test_the_comparison_rejects_a_wrong_fold(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "means swapped":
        monkeypatch.setattr(patch_embed, "PIXEL_MEAN", PIXEL_MEAN[::-1])
    else:
        fold = PatchEmbedding._folded

        def doubled(self: PatchEmbedding) -> tuple[Tensor, Tensor]:
            weight, bias = fold(self)
            return weight[:, :, :1].expand_as(weight), bias

        monkeypatch.setattr(PatchEmbedding, "_folded", doubled)
    with pytest.raises(AssertionError, match="exceeds"):
        test_raw_pixels_give_the_values_and_gradients_of_normalised_ones(RUNS["stills"], torch.float32)
