"""Recipes, overrides and the rules between keys."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mimo_megatron.config import check as rules
from mimo_megatron.config.check import check, check_layout
from mimo_megatron.config.keys import all_keys, explain, nearest
from mimo_megatron.config.load import dump_resolved, load_recipe
from mimo_megatron.config.run import RunConfig
from mimo_megatron.config.yaml_text import from_yaml, to_yaml
from mimo_megatron.errors import ConfigError

RECIPE = """
name: example
dir: runs/example
model: {preset: tiny-vl}
data:
  sources: [{path: data/a}, {path: data/b, weight: 2}]
  tokenizer: data/tokenizer
  pack_tokens: 512
  pack_patches: 1536
  max_pixels: 200704
  video: {max_total_tokens: 256}
train:
  steps: 10
  packs_per_step: 4
  text: {lr: 1e-3}
"""
RL = """
rl:
  prompts:
    - {task: box, path: a.jsonl}
    - {task: chat, path: b.parquet, reward: rm_text, ratio: 3}
  rollout: {groups_per_step: 4, max_new_tokens: 24}
  reward: {text_model: runs/judge}
"""


def rl_recipe(folder: Path) -> Path:
    return write(folder / "rl.yaml", RECIPE.replace("sources: [{path: data/a}, {path: data/b, weight: 2}]", "") + RL)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "example.yaml", RECIPE)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_an_override_wins_over_the_recipe_and_the_recipe_over_the_default(recipe: Path) -> None:
    config = load_recipe(recipe, ["train.steps=20", "train.optimizer.betas=[0.8, 0.9]", "data.sources.1.weight=3"])
    assert (config.train.steps, config.train.packs_per_step, config.seed) == (20, 4, 1)
    assert config.train.optimizer.betas == (0.8, 0.9)
    assert [source.weight for source in config.data.sources] == [1.0, 3.0]


def test_model_keys_change_the_preset_they_stand_beside(recipe: Path) -> None:
    config = load_recipe(recipe, ["model.text.num_layers=2"])
    assert (config.model.name, config.model.text.num_layers, config.model.text.width) == ("tiny-vl", 2, 128)
    assert load_recipe(recipe, ["model.vision=null"]).model.vision is None
    assert load_recipe(recipe, ["model.preset=tiny-base"]).model.text.num_mtp_layers == 1


def test_a_section_given_whole_as_an_override_is_merged_key_by_key(recipe: Path) -> None:
    config = load_recipe(recipe, ["train={steps: 3, schedule: {warmup_steps: 1}}"])
    assert (config.train.steps, config.train.packs_per_step, config.train.schedule.warmup_steps) == (3, 4, 1)


def test_a_base_is_inherited_and_found_beside_the_file_that_names_it(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/child.yaml", "base: ../example.yaml\nname: child\ntrain: {vision: {lr: 1e-4}}\n")
    grandchild = write(tmp_path / "grandchild.yaml", "base: sub/child.yaml\ndata: {sources: [{path: data/c}]}\n")
    config = load_recipe(grandchild)
    assert (config.name, config.train.vision.lr, config.train.text.lr) == ("child", 1e-4, 1e-3)
    assert [str(source.path) for source in config.data.sources] == ["data/c"]


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "leads back" in complaint(tmp_path / "a.yaml")


def test_a_missing_recipe_or_base_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in complaint(tmp_path / "nowhere.yaml")
    assert "the `base` of child.yaml" in complaint(write(tmp_path / "child.yaml", "base: nowhere.yaml\n"))


def test_the_resolved_tree_loads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe, ["data.system_prompt=no", "start_from=runs/1e-5"])
    dump_resolved(config, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == config


_WORDS = st.text(min_size=1, max_size=12)
_RATES = st.floats(1e-9, 1e3, allow_nan=False)
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "name": _WORDS,
    "seed": st.integers(0, 2**63),
    "data.system_prompt": st.none() | _WORDS,
    "data.split": st.sampled_from(["no", "null", "1e-5", "12:30", "0x1", "~", "- a", "a: b", "true", "1_0", ""]),
    "train.steps": st.integers(1, 10**12),
    "train.text.lr": st.none() | _RATES,
    "train.optimizer.betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    "train.optimizer.eps": _RATES,
    "train.schedule.decay": st.sampled_from(["cosine", "constant"]),
    "parallel.sequence_parallel": st.booleans(),
    "model.text.tie_embeddings": st.booleans(),
    "model.text.rope_theta": st.integers(1, 10**9) | _RATES,
}


@given(values=st.fixed_dictionaries({}, optional=_VALUES))
def test_overrides_round_trip_through_the_resolved_tree(tmp_path_factory: Any, values: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("round_trip")
    overrides = [f"{key}={to_yaml(value)}" for key, value in values.items()]
    config = load_recipe(write(folder / "recipe.yaml", RECIPE), overrides)
    for key, value in values.items():
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == (tuple(value) if isinstance(value, list) else value)
    dump_resolved(config, folder / "config.yaml")
    assert load_recipe(folder / "config.yaml") == config


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@example("\x85")
@example({"a": " \u2028 "})
@given(_TREES)
def test_yaml_reads_back_what_it_wrote(value: Any) -> None:
    assert from_yaml(to_yaml(value), "test") == value


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_every_mistake_is_reported_at_once_on_one_screen(recipe: Path) -> None:
    text = complaint(recipe, "train.stps=1", "parallel.tp=0", "data.sources.0.weight=-1", "train.precision=fp8", "x")
    for words in (
        "did you mean train.steps",
        "parallel.tp = 0",
        "data.sources.0.weight",
        "'fp32' or 'bf16'",
        "'x' is not",
    ):
        assert words in text
    many = complaint(recipe, *(f"train.wrong{number}=1" for number in range(50)))
    assert "50 mistakes" in many and "and 38 more" in many and len(many.splitlines()) < 20


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.stepz=1", "did you mean train.steps?"),
        ("data.sources.0.pth=x", "did you mean data.sources.0.path?"),
        ("model.text.nm_layers=2", "did you mean model.text.num_layers"),
        ("steps=1", "did you mean train.steps?"),
        ("trian.steps=1", "did you mean train?"),
        ("model.preset=tiny", "there are mimo-vl-7b"),
        ("model.preset=[tiny-vl]", "there are mimo-vl-7b"),
        ("train.steps='20'", "valid integer"),
        ("train.steps=true", "valid integer"),
        ("train.steps=2.5", "integer"),
        ("data.sources.7.path=x", "data.sources has no '7'"),
        ("data.sources.0.path.x=1", "has no 'x'"),
        ("train.steps", "is not of the form"),
        ("seed=[1", "not valid YAML"),
        ("model.text.num_kv_heads=3", "num_heads (4) % num_kv_heads (3) != 0"),
        ("data.tokenizer=null", "data.tokenizer = None"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(recipe: Path, override: str, remedy: str) -> None:
    text = complaint(recipe, override)
    assert remedy in text and "1 mistake" in text


def test_a_missing_key_is_explained(tmp_path: Path) -> None:
    text = complaint(write(tmp_path / "r.yaml", RECIPE.replace("  pack_tokens: 512\n", "")))
    assert "data.pack_tokens: must be given (int). S: slots of a pack." in text


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    assert "line 3: key 'name' was given on line 1" in complaint(
        write(tmp_path / "r.yaml", "name: a\nseed: 1\nname: b\n")
    )


def test_broken_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "line 2" in complaint(write(tmp_path / "r.yaml", "name: a\n\tdir: b\n"))
    assert "a recipe is `key: value` lines" in complaint(write(tmp_path / "r.yaml", "- a\n"))


# --- keys ------------------------------------------------------------------------------------------------------------


def test_every_key_of_the_schema_is_described() -> None:
    assert [key.path for key in all_keys().values() if not key.description] == []


def test_keys_are_exactly_those_the_resolved_tree_has(recipe: Path, tmp_path: Path) -> None:
    def paths(tree: Any, prefix: str) -> set[str]:
        if isinstance(tree, list):
            return set().union(*(paths(item, f"{prefix}.*") for item in tree if isinstance(item, dict)))
        inner = {f"{prefix}.{key}".lstrip("."): value for key, value in tree.items()}
        return set(inner).union(*(paths(value, key) for key, value in inner.items() if isinstance(value, dict | list)))

    with_cost = load_recipe(recipe, ["data.cost={per_token: 1}", "train.fp8={}"])
    trees = [config.model_dump(mode="json") for config in (with_cost, load_recipe(rl_recipe(tmp_path)))]
    assert set(all_keys()) - {"base", "model.preset"} == set().union(*(paths(tree, "") for tree in trees))


def test_explain_shows_a_key_or_a_section_or_offers_the_nearest() -> None:
    assert [key.path for key in explain("train.checkpoint")] == [
        "train.checkpoint", "train.checkpoint.every_steps", "train.checkpoint.keep", "train.checkpoint.mode",
    ]  # fmt: skip
    assert str(explain("seed")[0]).startswith("seed: int = 1.")
    with pytest.raises(ConfigError, match=r"did you mean train\.schedule"):
        explain("train.schedul")
    assert nearest("zzz") == []


# --- rules between keys ----------------------------------------------------------------------------------------------


def failed(recipe: Path, world_size: int, *overrides: str) -> set[str]:
    config = load_recipe(recipe, overrides)
    names = {rule.__name__ for rule in rules.RULES if list(rule(config, world_size))}
    layout = (config.model, config.parallel, world_size)
    return names | {rule.__name__ for rule in rules.LAYOUT_RULES if list(rule(*layout))}


@pytest.mark.parametrize(
    ("rule", "world_size", "overrides"),
    [
        ("training_has_data_and_rl_has_questions", 1, ["data.sources=[]"]),
        ("training_has_data_and_rl_has_questions", 1, [f"rl={from_yaml(RL, 'rl')['rl']}"]),
        ("ranks_fill_the_layout", 3, ["parallel.tp=2"]),
        ("packs_divide_over_data_parallel_ranks", 8, []),
        ("tensor_parallel_divides_the_text_model", 4, ["parallel.tp=4"]),
        ("pipeline_divides_the_layers", 3, ["parallel.pp=3"]),
        ("packs_cut_evenly", 3, ["parallel.cp=3"]),
        ("packs_cut_evenly", 2, ["parallel.tp=2", "parallel.sequence_parallel=true", "data.pack_tokens=511"]),
        ("sequence_parallel_needs_tensor_parallel", 1, ["parallel.sequence_parallel=true"]),
        ("something_is_trained", 1, ["train.text.lr=null"]),
        ("trained_modules_exist", 1, ["model.vision=null", "train.projector.lr=1"]),
        ("warmup_ends_within_the_run", 1, ["train.schedule.warmup_steps=11"]),
        ("packs_fit_the_positions", 1, ["data.pack_tokens=8192"]),
        ("pixel_limits_are_ordered", 1, ["data.min_pixels=200705"]),
        ("pixel_limits_are_ordered", 1, ["data.max_pixels=783", "data.min_pixels=783"]),
        ("pixel_limits_are_ordered", 1, ["data.video.max_pixels_per_frame=784"]),
        ("largest_media_fit_a_pack", 1, ["data.max_pixels=12845056"]),
        ("largest_media_fit_a_pack", 1, ["data.video.max_total_tokens=512"]),
        ("largest_media_fit_a_pack", 1, ["data.pack_patches=1020"]),
        ("a_pack_can_be_made_ahead", 1, ["data.prefetch_mib=1"]),
        ("special_tokens_differ", 1, ["model.tokens.pad=1"]),
        ("interleaving_needs_a_pipeline", 1, ["parallel.vpp=2"]),
        ("interleaving_fills_the_pipeline", 2, ["parallel.pp=2", "parallel.vpp=2", "train.packs_per_step=3"]),
        ("balanced_vision_needs_ranks_that_share", 1, ["parallel.vision_placement=balanced"]),
        (
            "balanced_vision_needs_ranks_that_share",
            2,
            ["parallel.vision_placement=balanced", "parallel.tp=2", "model.vision=null"],
        ),
        ("pipeline_divides_the_layers", 2, ["parallel.pp=2", "parallel.stage_layers=[1, 2]"]),
        ("pipeline_divides_the_layers", 2, ["parallel.pp=2", "parallel.stage_layers=[4]"]),
        ("the_vision_kernel_has_heads_of_its_width", 1, ["train.vision_attention=triton"]),
        ("the_vision_kernel_has_heads_of_its_width", 1, ["train.vision_attention=triton", "model.vision=null"]),
        ("what_is_offloaded_exists", 1, ["train.offload_activations=vision", "model.vision=null"]),
        ("the_chunked_head_has_a_vocabulary", 1, ["train.head_loss=chunked", "model.text.head=reward"]),
        (
            "the_text_kernel_has_heads_of_its_widths",
            1,
            ["train.text_attention=triton", "model.text.head_width=48", "model.text.mrope_section=[8, 8, 8]"],
        ),
        ("library_attention_is_possible", 1, ["train.text_attention=varlen", "train.precision=fp32"]),
        ("library_attention_is_possible", 1, ["train.vision_attention=flash", "train.precision=fp32"]),
        ("library_attention_is_possible", 1, ["train.vision_attention=flash", "model.vision=null"]),
        (
            "library_attention_is_possible",
            1,
            ["train.text_attention=flash", "model.text.head_width=36", "model.text.mrope_section=[6, 6, 6]"],
        ),
        (
            "library_attention_is_possible",
            1,
            ["train.text_attention=flash", "model.text.head_width=264", "model.text.mrope_section=[44, 44, 44]"],
        ),
        ("overlap_has_buckets", 1, ["train.overlap_param_gather=true"]),
        ("overlap_has_buckets", 1, ["train.ddp_bucket_size=1000"]),
    ],
)
def test_each_rule_fires_alone(recipe: Path, rule: str, world_size: int, overrides: list[str]) -> None:
    assert failed(recipe, 1) == set()
    assert failed(recipe, world_size, *overrides) == {rule}


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[-0.1, 0.95]", "[0.9, .nan]"])
def test_moving_means_that_do_not_decay_are_refused(recipe: Path, betas: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.betas .* from 0 to below 1"):
        load_recipe(recipe, [f"train.optimizer.betas={betas}"])


def test_all_rules_are_tested() -> None:
    marks: Any = test_each_rule_fires_alone
    cases = marks.pytestmark[0].args[1]
    assert {case[0] for case in cases} == {rule.__name__ for rule in (*rules.RULES, *rules.LAYOUT_RULES)}


def test_check_reports_every_failed_equation_with_a_remedy(recipe: Path) -> None:
    config = load_recipe(recipe, ["parallel.tp=2", "train.schedule.warmup_steps=11", "data.max_pixels=12845056"])
    with pytest.raises(ConfigError) as caught:
        check(config, 3)
    text = str(caught.value)
    assert "ranks (3) % (parallel.tp 2 * pp 1 * cp 1 = 2) = 1, must be 0: start a multiple of 2 ranks" in text
    assert "3 mistakes" in text and "set data.max_pixels=301056" in text


def test_a_layout_is_checked_without_a_run_too(recipe: Path) -> None:
    config = load_recipe(recipe, ["parallel.tp=2"])
    check_layout(config.model, config.parallel, 4)
    with pytest.raises(ConfigError, match=r"model 'tiny-vl' on 3 ranks: 1 mistake"):
        check_layout(config.model, config.parallel, 3)


@given(
    tp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2, 4]), cp=st.integers(1, 4), dp=st.integers(1, 5),
    slots=st.integers(1, 40), microbatches=st.integers(1, 3),
)  # fmt: skip
def test_every_layout_that_divides_is_accepted_and_its_remedies_work(
    tmp_path_factory: Any, tp: int, pp: int, cp: int, dp: int, slots: int, microbatches: int
) -> None:
    unit = 2 * cp * tp
    config = load_recipe(
        write(tmp_path_factory.mktemp("layout") / "r.yaml", RECIPE),
        [
            f"parallel={{tp: {tp}, pp: {pp}, cp: {cp}, sequence_parallel: {'true' if tp > 1 else 'false'}}}",
            f"data.pack_tokens={unit * (257 // unit + slots)}",
            f"train.packs_per_step={dp * microbatches}",
        ],
    )
    check(config, tp * pp * cp * dp)
    odd = with_slots(config, config.data.pack_tokens + 1)
    message = next(rules.packs_cut_evenly(odd, 1), None)
    assert (message is None) == (tp * cp == 1)
    if message is not None:
        remedy = int(message.rpartition("=")[2])
        assert not list(rules.packs_cut_evenly(with_slots(config, remedy), 1))


def with_slots(config: RunConfig, num_slots: int) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"pack_tokens": num_slots})})


def test_a_config_is_frozen(recipe: Path) -> None:
    config: RunConfig = load_recipe(recipe)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
