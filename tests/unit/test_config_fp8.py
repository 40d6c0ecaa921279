"""The rules of the section ``train.fp8``: each fires alone, its remedy works; and which engine multiplies where."""

from pathlib import Path

import pytest

from mimo_megatron import platform
from mimo_megatron.config.check import check
from mimo_megatron.config.check_fp8 import FP8_RULES
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.load import load_recipe
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore import fp8, layers
from tests.unit.test_config import RECIPE, failed, rl_recipe, write

BLOCKS = "train.fp8={scaling: blockwise}"
ALL_PARTS = "train.fp8={parts: [vision, projector, text]}"
WIDE = "model.text={width: 256, num_heads: 4, num_kv_heads: 2, head_width: 64, mrope_section: [8, 12, 12]}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "example.yaml", RECIPE)


CASES = [
    ("packs_are_aligned", 1, ["train.fp8={}", "data.pack_tokens=520"]),
    ("packs_are_aligned", 4, ["train.fp8={}", "data.pack_tokens=520", "parallel={cp: 4}"]),
    ("packs_are_aligned", 2, [BLOCKS, "data.pack_tokens=768", "parallel={cp: 2}"]),
    ("sizes_are_aligned", 1, ["train.fp8={}", "model.text.ffn_width=328"]),
    ("sizes_are_aligned", 2, ["train.fp8={}", "model.text.ffn_width=336", "parallel={tp: 2}"]),
    ("sizes_are_aligned", 2, [BLOCKS, "parallel={tp: 2}"]),
    ("a_layer_is_in_fp8", 1, ["train.fp8={first_layers: 2, last_layers: 2}"]),
    ("images_are_encoded_whole", 1, ["train.fp8={parts: [projector]}", "model.vision=null"]),
    ("images_are_encoded_whole", 2, [ALL_PARTS, "parallel={cp: 2}"]),
    (
        "images_are_encoded_whole",
        2,
        ["train.fp8={parts: [vision], scaling: blockwise}", "parallel={tp: 2, vision_placement: balanced}"],
    ),
    ("parts_are_named_once", 1, ["train.fp8={parts: [text, text]}"]),
    ("kernels_round_for_pytorchs_product", 1, ["train.fp8={rounding: triton, engine: twin}"]),
    ("kernels_round_for_pytorchs_product", 1, ["train.fp8={rounding: triton, scaling: blockwise}"]),
    ("kernels_round_for_pytorchs_product", 1, ["train.fp8={rounding: triton, engine: transformer-engine}"]),
    ("only_delayed_scaling_has_a_history", 1, ["train.fp8={margin: 1}"]),
    ("only_delayed_scaling_has_a_history", 1, ["train.fp8={scaling: blockwise, history: 16}"]),
]


def fired(config) -> set[str]:
    return {rule.__name__ for rule in FP8_RULES if list(rule(config.train.fp8, config))}


@pytest.mark.parametrize(("rule", "world_size", "overrides"), CASES)
def test_each_rule_of_fp8_fires_alone(recipe: Path, rule: str, world_size: int, overrides: list[str]) -> None:
    assert failed(recipe, world_size, *overrides) == set()
    assert fired(load_recipe(recipe, overrides)) == {rule}


def test_all_rules_of_fp8_are_tested(tmp_path: Path) -> None:
    config = load_recipe(rl_recipe(tmp_path), ["train.fp8={}"])
    assert fired(config) == {"a_policy_is_not_in_fp8"}
    with pytest.raises(ConfigError, match=r"train\.fp8 with the section rl"):
        check(config, 1)
    assert {rule for rule, *_ in CASES} | fired(config) == {rule.__name__ for rule in FP8_RULES}


@pytest.mark.parametrize("scaling", ["current", "delayed", "blockwise"])
def test_what_fits_is_accepted(recipe: Path, scaling: str) -> None:
    fp8 = f"train.fp8={{scaling: {scaling}}}"
    check(load_recipe(recipe, [fp8]), 1)
    check(load_recipe(recipe, [fp8, WIDE, "model.text.ffn_width=512", "parallel={tp: 2}"]), 2)
    check(load_recipe(recipe, [fp8, "parallel={cp: 2}"]), 2)


def test_an_encoder_in_fp8_goes_with_ranks_that_encode_all_or_share_images_out(recipe: Path) -> None:
    check(load_recipe(recipe, [ALL_PARTS, "parallel={tp: 2}"]), 2)
    check(load_recipe(recipe, [ALL_PARTS, "parallel={cp: 2, vision_placement: balanced}"]), 2)
    check(load_recipe(recipe, ["train.fp8={parts: [vision], scaling: blockwise}", "parallel={tp: 2}"]), 2)


def test_an_encoder_of_any_sizes_goes_in_fp8(recipe: Path) -> None:
    """Qwen2.5-VL's is 3420 wide between its layers, no multiple of 16; the demo's 344."""
    for scaling in ("current", "delayed", "blockwise"):
        for ffn_width in (344, 3420):
            parts = f"train.fp8={{parts: [vision, projector], scaling: {scaling}}}"
            check(load_recipe(recipe, [parts, f"model.vision.ffn_width={ffn_width}"]), 1)


def test_the_proposed_pack_fits(recipe: Path) -> None:
    layout = ["parallel={tp: 2, cp: 2, sequence_parallel: true}", "data.pack_tokens=520", "train.fp8={}"]
    with pytest.raises(ConfigError, match=r"set data\.pack_tokens=576") as caught:
        check(load_recipe(recipe, layout), 4)
    assert "16 * cp * tp = 64" in str(caught.value)
    check(load_recipe(recipe, [*layout, "data.pack_tokens=576"]), 4)


def test_the_format_is_the_scalings_own_unless_it_is_given() -> None:
    assert [Fp8Config(scaling=one).number_format for one in ("current", "delayed", "blockwise")] == [
        "hybrid", "hybrid", "e4m3",
    ]  # fmt: skip
    assert Fp8Config(scaling="blockwise", format="hybrid").number_format == "hybrid"
    assert [layer for layer in range(6) if Fp8Config(last_layers=2).covers(layer, 6)] == [1, 2, 3]


# --- which engine multiplies -----------------------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, products: bool = True, engine: bool = False) -> None:
    here = platform.Platform("cuda", "nccl") if gpu else platform.Platform("cpu", "gloo")
    monkeypatch.setattr(platform, "current", lambda: here)
    monkeypatch.setattr(platform, "has_fp8_products", lambda: products)
    monkeypatch.setattr(layers, "layer_backend", lambda: "transformer-engine" if engine else "local")


def test_the_cpu_has_the_twin_and_a_gpu_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, here in {
        "cpu": dict(gpu=False),
        "h100": dict(gpu=True),
        "h100 with engine": dict(gpu=True, engine=True),
    }.items():
        machine(monkeypatch, **here)
        found[name] = [layers.fp8_engine(Fp8Config(scaling=one)) for one in ("current", "delayed")]
    assert found == {
        "cpu": ["twin", "twin"],
        "h100": ["scaled_mm", "scaled_mm"],
        # megatron: with delayed scaling the first and last layers cannot be left out
        "h100 with engine": ["transformer-engine", "scaled_mm"],
    }
    whole = Fp8Config(scaling="delayed", first_layers=0, last_layers=0)
    assert layers.fp8_engine(whole) == "transformer-engine"
    assert layers.fp8_engine(Fp8Config(engine="twin")) == "twin"


@pytest.mark.parametrize(
    ("here", "options", "words"),
    [
        (dict(gpu=True, products=False), dict(), "no FP8 products"),
        (dict(gpu=True), dict(scaling="blockwise"), "one scale for a tensor"),
        (dict(gpu=False), dict(engine="transformer-engine"), "not installed, or there is no GPU"),
        (dict(gpu=True, engine=True), dict(scaling="delayed", engine="transformer-engine"), "first_layers=0"),
        (dict(gpu=False), dict(scaling="blockwise", engine="scaled_mm"), "one scale for a tensor"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_by_name(here, options, words, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, **here)
    with pytest.raises(ConfigError, match=words):
        layers.fp8_engine(Fp8Config(**options))


def test_on_a_gpu_kernels_round_for_pytorchs_product_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, delayed = Fp8Config(), Fp8Config(scaling="delayed")
    machine(monkeypatch, gpu=True)
    monkeypatch.setattr(fp8, "why_no_kernels", lambda: "")
    assert fp8.rounding_name(plain, "scaled_mm") == fp8.rounding_name(delayed, "scaled_mm") == "triton"
    assert fp8.rounding_name(Fp8Config(rounding="torch"), "scaled_mm") == "torch"
    assert fp8.rounding_name(Fp8Config(engine="twin"), "twin") == "torch"
    monkeypatch.setattr(fp8, "why_no_kernels", lambda: "triton is not installed")
    assert fp8.rounding_name(plain, "scaled_mm") == "torch"
    machine(monkeypatch, gpu=False)
    monkeypatch.setattr(fp8, "why_no_kernels", lambda: "")
    assert fp8.rounding_name(plain, "scaled_mm") == "torch"
    with pytest.raises(ConfigError, match=r"the twin multiplies here: set train\.fp8\.engine=scaled_mm"):
        fp8.rounding_name(Fp8Config(rounding="triton"), "twin")


def test_where_rounding_is_given_transformer_engine_does_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True, engine=True)
    assert layers.fp8_engine(Fp8Config(rounding="triton")) == "scaled_mm"
    assert layers.fp8_engine(Fp8Config(rounding="torch")) == "scaled_mm"
    assert layers.fp8_engine(Fp8Config(rounding="torch", parts=("text", "vision"))) == "transformer-engine"
    with pytest.raises(ConfigError, match=r"rounding is given, which is that of scaled_mm"):
        layers.fp8_engine(Fp8Config(rounding="torch", engine="transformer-engine"))


def test_the_log_names_what_multiplies_and_what_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True, engine=True)
    monkeypatch.setattr(fp8, "why_no_kernels", lambda: "")
    whole = Fp8Config(parts=("vision", "text"))
    assert layers.fp8_by_part(whole) == "vision by scaled_mm, rounded by triton; text by transformer-engine"
    machine(monkeypatch, gpu=False)
    assert layers.fp8_by_part(whole) == "vision by twin; text by twin"


def test_encoder_and_projector_have_pytorchs_product_on_a_gpu_whatever_the_decoder_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, gpu=True, engine=True)
    encoder = Fp8Config(parts=("vision", "projector"))
    assert layers.encoder_product(encoder) == "scaled_mm"
    assert layers.encoder_product(encoder.model_copy(update={"engine": "twin"})) == "twin"
    with pytest.raises(ConfigError, match=r"parts has vision and projector.*one scale for a tensor.*parts=\[text\]"):
        layers.encoder_product(encoder.model_copy(update={"scaling": "blockwise"}))
    machine(monkeypatch, gpu=True, products=False)
    with pytest.raises(ConfigError, match="no FP8 products"):
        layers.encoder_product(encoder)
    machine(monkeypatch, gpu=False)
    assert layers.encoder_product(encoder) == "twin"
