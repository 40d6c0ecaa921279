"""Encoder and projector against transformers' Qwen2.5-VL vision tower: features and every parameter's gradient."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from mimo_megatron.config.model import VisionConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.model.projector import Projector
from mimo_megatron.model.vision import VisionEncoder
from mimo_megatron.types import VisionLayout
from tests.parity_rule import Float64Everywhere, assert_named_parity, relative_error
from tests.pixels import normalized

Grid = tuple[int, int, int]
OUT_WIDTH = 24
GRIDS: dict[str, list[Grid]] = {
    "smallest": [(1, 2, 2)],
    "one_row_of_units": [(1, 2, 34)],
    "one_column_of_units": [(1, 34, 2)],
    "whole_windows": [(1, 16, 8)],
    "cut_windows": [(1, 10, 22)],
    "same_size_apart": [(1, 6, 6), (1, 4, 10), (1, 6, 6)],
    "video": [(4, 6, 10)],
    "mixed": [(1, 10, 6), (3, 12, 4), (1, 2, 2), (2, 8, 8), (1, 18, 14)],
}


class VisionTower(nn.Module):
    """Ours, under the names of the composed model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision = VisionEncoder(config)
        self.projector = Projector(config, OUT_WIDTH)

    def forward(self, patches_PC: Tensor, layout: VisionLayout) -> Tensor:
        return self.projector(self.vision(patches_PC, layout), layout)


def random_config(seed: int) -> VisionConfig:
    rng = torch.Generator().manual_seed(seed)

    def choice(options: Sequence[int]) -> int:
        return options[int(torch.randint(len(options), (), generator=rng))]

    heads, depth = choice((1, 2, 3)), choice((2, 3))
    return VisionConfig(
        depth=depth,
        width=heads * choice((8, 12, 20)),
        num_heads=heads,
        ffn_width=choice((20, 33, 48)),
        window_size=choice((56, 112)),
        full_attention_layers=(choice(range(depth)),),
    )


def random_tower(config: VisionConfig, seed: int) -> VisionTower:
    """Weights large enough that attention is far from uniform and every norm and bias matters."""
    torch.manual_seed(seed)
    tower = VisionTower(config)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return tower


def hf_name(name: str) -> str:
    for ours, theirs in (
        ("vision.patch_embed", "patch_embed.proj"),
        ("vision.", ""),
        ("projector.norm", "merger.ln_q"),
        ("projector.fc1", "merger.mlp.0"),
        ("projector.fc2", "merger.mlp.2"),
    ):
        name = name.replace(ours, theirs)
    return name


@lru_cache
def empty_hf_tower(config: VisionConfig) -> Qwen2_5_VisionTransformerPretrainedModel:
    return Qwen2_5_VisionTransformerPretrainedModel._from_config(
        Qwen2_5_VLVisionConfig(
            depth=config.depth,
            hidden_size=config.width,
            num_heads=config.num_heads,
            intermediate_size=config.ffn_width,
            window_size=config.window_size,
            fullatt_block_indexes=list(config.full_attention_layers),
            out_hidden_size=OUT_WIDTH,
        ),
        attn_implementation="eager",
    )


def hf_tower(ours: VisionTower, dtype: torch.dtype, run_dtype: torch.dtype) -> Qwen2_5_VisionTransformerPretrainedModel:
    """transformers' tower in ``run_dtype`` with our weights, rounded to ``dtype``."""
    theirs = copy.deepcopy(empty_hf_tower(ours.vision.config))
    state = {hf_name(name): value for name, value in ours.state_dict().items()}
    for name, parameter in theirs.named_parameters():  # not the rotary buffer, which stays float32 in a loaded model
        parameter.data = state.pop(name).reshape(parameter.shape).to(dtype).to(run_dtype)
    assert not state, f"no such parameters in transformers: {list(state)}"
    return theirs


def random_patches(num_patches: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_patches, 1176), dtype=torch.uint8, generator=rng)


def features_and_gradients(module: nn.Module, features_MD: Tensor) -> dict[str, Tensor]:
    weights_MD = torch.randn(features_MD.shape, generator=torch.Generator().manual_seed(3))
    (features_MD * weights_MD.to(features_MD.dtype)).sum().backward()
    named = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"features": features_MD.detach(), **named}


def run_ours(tower: VisionTower, patches_PC: Tensor, layout: VisionLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    tower = copy.deepcopy(tower).to(dtype)
    return features_and_gradients(tower, tower(patches_PC, layout))


def run_hf(
    tower: VisionTower, patches_PC: Tensor, grids: Sequence[Grid], dtype: torch.dtype, run_dtype: torch.dtype
) -> dict[str, Tensor]:
    """transformers' features and gradients in ``run_dtype``, under our names, from weights rounded to ``dtype``."""
    theirs = hf_tower(tower, dtype, run_dtype)
    with Float64Everywhere() if run_dtype == torch.float64 else nullcontext():
        pixels = normalized(patches_PC, torch.promote_types(run_dtype, torch.float32))
        got = features_and_gradients(theirs, theirs(pixels, torch.tensor(grids)).pooler_output)
    shapes = {name: parameter.shape for name, parameter in tower.named_parameters()}
    return {"features": got["features"], **{name: got[hf_name(name)].reshape(shapes[name]) for name in shapes}}


def pooled(runs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def assert_equals_hf(
    config: VisionConfig, layout: VisionLayout, grids: Sequence[Grid], dtype: torch.dtype, draws: int = 3
) -> None:
    """The tolerance rule, errors pooled over several random towers: a single small tensor's error is itself noise."""
    ours, eager, oracle = [], [], []
    for draw in range(draws):
        tower = random_tower(config, draw)
        patches_PC = random_patches(layout.num_patches, draw)
        ours.append(run_ours(tower, patches_PC, layout, dtype))
        eager.append(run_hf(tower, patches_PC, grids, dtype, dtype))
        oracle.append(run_hf(tower, patches_PC, grids, dtype, torch.float64))
    assert_named_parity(pooled(ours), pooled(eager), pooled(oracle), dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_features_and_gradients_equal_hf(grids: list[Grid], seed: int) -> None:
    config = random_config(seed)
    assert_equals_hf(config, vision_layout(grids, config), grids, torch.float32)


@pytest.mark.parametrize("grids", [GRIDS["cut_windows"], GRIDS["mixed"]], ids=["cut_windows", "mixed"])
def test_bfloat16_is_as_close_to_the_oracle_as_hf(grids: list[Grid]) -> None:
    config = random_config(0)
    assert_equals_hf(config, vision_layout(grids, config), grids, torch.bfloat16, draws=8)


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_in_float64_both_are_the_same_function(grids: list[Grid]) -> None:
    tower = random_tower(random_config(5), 5)
    layout = vision_layout(grids, tower.vision.config)
    patches_PC = random_patches(layout.num_patches)
    got = run_ours(tower, patches_PC, layout, torch.float64)
    want = run_hf(tower, patches_PC, grids, torch.float64, torch.float64)
    assert max(relative_error(got[name], want[name]) for name in want) < 1e-12


def _swapped_axes(layout: VisionLayout) -> VisionLayout:
    return dataclasses.replace(layout, rope_hw_P2=layout.rope_hw_P2.flip(1))


def _one_window_moved(layout: VisionLayout) -> VisionLayout:
    bounds = layout.window_bounds
    return dataclasses.replace(layout, window_bounds=(0, bounds[1] - 4, *bounds[2:]))


def _frames_joined(layout: VisionLayout) -> VisionLayout:
    return dataclasses.replace(layout, frame_bounds=layout.frame_bounds[:1] + layout.frame_bounds[2:])


def _two_units_swapped(layout: VisionLayout) -> VisionLayout:
    order = layout.window_order_M.clone()
    order[[0, -1]] = order[[-1, 0]]
    return dataclasses.replace(layout, window_order_M=order)


@pytest.mark.parametrize("fault", [_swapped_axes, _one_window_moved, _frames_joined, _two_units_swapped])
def test_the_comparison_rejects_a_wrong_layout(fault: Callable[[VisionLayout], VisionLayout]) -> None:
    config, grids = random_config(0), GRIDS["mixed"]
    with pytest.raises(AssertionError, match="exceeds"):
        assert_equals_hf(config, fault(vision_layout(grids, config)), grids, torch.float32)


def test_the_comparison_rejects_a_small_error_in_one_gradient() -> None:
    tower, grids = random_tower(random_config(0), 0), GRIDS["mixed"]
    layout = vision_layout(grids, tower.vision.config)
    patches_PC = random_patches(layout.num_patches)
    got = run_ours(tower, patches_PC, layout, torch.float32)
    got["vision.blocks.0.attn.qkv.bias"][0] *= 1.001
    eager, oracle = (run_hf(tower, patches_PC, grids, torch.float32, run) for run in (torch.float32, torch.float64))
    with pytest.raises(AssertionError, match=r"vision\.blocks\.0\.attn\.qkv\.bias: error"):
        assert_named_parity(got, eager, oracle, torch.float32)


def test_layout_equals_hf_on_random_grids() -> None:
    rng = torch.Generator().manual_seed(0)
    for window_size in (56, 112):
        config = random_config(0).model_copy(update={"window_size": window_size})
        for _ in range(100):
            num_media = int(torch.randint(1, 6, (), generator=rng))
            grids_I3 = torch.randint(1, 20, (num_media, 3), generator=rng) * torch.tensor([1, 2, 2])
            layout = vision_layout([tuple(grid) for grid in grids_I3.tolist()], config)
            order, bounds = get_vision_window_index(grids_I3, 2, window_size, 14)
            assert torch.equal(layout.window_order_M, order)
            assert layout.window_bounds == tuple(bounds.tolist())
            assert layout.frame_bounds == tuple(get_vision_cu_seqlens(grids_I3).tolist())
            assert torch.equal(layout.rope_hw_P2, get_vision_position_ids(grids_I3, 2))


def _features_per_medium(tower: VisionTower, media: Sequence[tuple[Grid, Tensor]]) -> list[Tensor]:
    grids = [grid for grid, _ in media]
    features_MD = tower(torch.cat([patches for _, patches in media]), vision_layout(grids, tower.vision.config))
    return list(features_MD.split([t * h * w // 4 for t, h, w in grids]))


def test_packed_media_equal_one_at_a_time_in_any_order() -> None:
    tower = random_tower(random_config(1), 1).double()
    media = [(grid, random_patches(grid[0] * grid[1] * grid[2], i)) for i, grid in enumerate(GRIDS["mixed"])]
    alone = [_features_per_medium(tower, [one])[0] for one in media]
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        packed = _features_per_medium(tower, [media[i] for i in order])
        for place, i in enumerate(order):
            torch.testing.assert_close(packed[place], alone[i], rtol=0, atol=1e-12)


def test_a_pack_without_images_gives_no_features_and_zero_gradients() -> None:
    tower = random_tower(random_config(0), 0)
    features_MD = tower(random_patches(0), vision_layout([], tower.vision.config))
    assert features_MD.shape == (0, OUT_WIDTH)
    features_MD.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower.parameters())


def test_mimo_vl_has_the_published_parameter_counts() -> None:
    model = preset("mimo-vl-7b")
    assert model.vision is not None
    with torch.device("meta"):
        encoder, projector = VisionEncoder(model.vision), Projector(model.vision, model.text.width)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (encoder, projector)]
    assert [round(count / 1e6, 1) for count in counts] == [636.4, 47.2]
