"""Every shipped recipe loads and fits a layout; the four stages have the report's numbers; the docs name every key."""

import itertools
from pathlib import Path

import pytest

from mimo_megatron.config.check import check
from mimo_megatron.config.keys import explain, markdown_table
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.run import RunConfig
from mimo_megatron.planner.hardware import efficiency_of, gpu_named
from mimo_megatron.planner.packs import assumed_packs
from mimo_megatron.planner.search import evaluate

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples/recipes").rglob("*.yaml"))
MIMO = ROOT / "examples/recipes/mimo_vl_7b"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_loads_and_fits_its_smallest_layout(path: Path) -> None:
    config = load_recipe(path)
    check(config, config.parallel.model_ranks)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_the_real_stages_fit_256_gpus(stage: int) -> None:
    check(load_recipe(MIMO / f"stage{stage}.yaml"), 256)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_the_real_stages_fit_the_memory_of_256_h100_as_far_as_the_planner_knows(stage: int) -> None:
    config, gpu = load_recipe(MIMO / f"stage{stage}.yaml"), gpu_named("h100")
    planned = evaluate(config, 256, assumed_packs(config.model, config.data), gpu, efficiency_of(None, None))
    assert planned.fits, [round(peak / 2**30) for peak in planned.peaks]


def test_fine_tuning_fits_one_node_of_h100s_as_far_as_the_planner_knows_the_encoder_with_recomputation() -> None:
    path, gpu = ROOT / "examples/recipes/qwen2_5_vl_7b/finetune.yaml", gpu_named("h100")
    trained = ["train.vision.lr=1e-6"]
    for overrides, fits in (([], True), (trained, False), ([*trained, "train.vision_recompute=true"], True)):
        config = load_recipe(path, overrides)
        check(config, 8)
        planned = evaluate(config, 8, assumed_packs(config.model, config.data), gpu, efficiency_of(None, None))
        assert planned.fits == fits, (overrides, [round(peak / 2**30) for peak in planned.peaks])


@pytest.mark.parametrize(
    ("stage", "tokens", "pack", "vision_lr", "projector_lr", "text_lr"),
    [
        (1, 300e9, 8192, None, 1e-3, None),
        (2, 167e9, 8192, 1e-5, 1e-4, None),
        (3, 1.4e12, 8192, 1e-5, 1e-5, 1e-5),
        (4, 550e9, 32768, 2.5e-5, 2.5e-5, 2.5e-5),
    ],
)
def test_the_stages_have_the_reports_numbers(
    stage: int, tokens: float, pack: int, vision_lr: float | None, projector_lr: float, text_lr: float | None
) -> None:
    config = load_recipe(MIMO / f"stage{stage}.yaml")
    train = config.train
    assert config.model.name == "mimo-vl-7b" and config.data.pack_tokens == pack
    assert (train.vision.lr, train.projector.lr, train.text.lr) == (vision_lr, projector_lr, text_lr)
    assert train.steps * train.packs_per_step * pack == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize("folder", ["mimo_vl_7b", "tiny"])
def test_each_stage_starts_from_the_last_checkpoint_of_the_stage_before(folder: str) -> None:
    stages = [load_recipe(ROOT / f"examples/recipes/{folder}/stage{stage}.yaml") for stage in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(stages):
        assert after.start_from == last_checkpoint(before)
        assert after.model == before.model and after.data.tokenizer == before.data.tokenizer


def test_the_tiny_policy_and_its_judges_are_the_last_checkpoints_of_their_recipes() -> None:
    tiny = {
        name: load_recipe(ROOT / f"examples/recipes/tiny/{name}.yaml")
        for name in ("morl", "morl_start", "reward_model_text", "reward_model_multimodal")
    }
    policy = tiny["morl"]
    assert policy.rl is not None and policy.start_from == last_checkpoint(tiny["morl_start"])
    assert policy.rl.reward.text_model == last_checkpoint(tiny["reward_model_text"])
    assert policy.rl.reward.multimodal_model == last_checkpoint(tiny["reward_model_multimodal"])


def last_checkpoint(config: RunConfig) -> Path:
    return config.dir / "checkpoints" / f"step_{config.train.steps:06d}"


def test_the_tiny_stages_train_the_same_parts_as_the_real_ones() -> None:
    for stage in (1, 2, 3, 4):
        real, tiny = (
            load_recipe(ROOT / f"examples/recipes/{name}/stage{stage}.yaml").train for name in ("mimo_vl_7b", "tiny")
        )
        for part in ("vision", "projector", "text"):
            assert real.module(part).is_frozen == tiny.module(part).is_frozen, f"stage {stage}, {part}"  # type: ignore[arg-type]


def test_the_docs_table_is_the_schemas() -> None:
    assert markdown_table(explain(None)) in (ROOT / "docs/recipes.md").read_text(), (
        "replace the table at the end of docs/recipes.md by what `mimo-megatron config explain --markdown` prints"
    )
