"""What the planner says of FP8: bytes kept and taken by a linear layer beside counted ones; times by hand."""

import gc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mimo_megatron.cli import main
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.run import ModuleTraining, ParallelConfig
from mimo_megatron.errors import ConfigError
from mimo_megatron.fp8.linear import PRODUCTS, fp8_linear
from mimo_megatron.fp8.quantise import E4M3
from mimo_megatron.fp8.rounding import KernelRounding
from mimo_megatron.fp8.scaling import BlockScaling, CurrentScaling, DelayedScaling, Scaling
from mimo_megatron.parallel.mesh import Axis
from mimo_megatron.planner import fp8_memory
from mimo_megatron.planner.cost import flop_counts, stage_seconds
from mimo_megatron.planner.fp8_memory import Product
from mimo_megatron.planner.hardware import Efficiency, check_fp8, gpu_named
from mimo_megatron.planner.memory import rank_memory
from mimo_megatron.planner.packs import assumed_packs
from mimo_megatron.planner.report import counted
from mimo_megatron.planner.setting import Setting
from tests.repository import ROOT
from tests.samples import run_config, tiny_model
from tests.tensor_meter import TensorMeter

STAGE3 = ROOT / "examples/recipes/mimo_vl_7b/stage3.yaml"
H100, EFFICIENCY = gpu_named("h100"), Efficiency()
WIDE_OUT, WIDE_IN, TALL = Product(256, 384, 768), Product(256, 768, 384), Product(1024, 256, 128)
SCALINGS: dict[str, Scaling] = {
    "current": CurrentScaling(E4M3, E4M3, Axis(0, 1)),
    "delayed": DelayedScaling(E4M3, E4M3, 4, 0),
    "blockwise": BlockScaling(E4M3, E4M3),
}
KINDS = [("current", "twin"), ("delayed", "twin"), ("blockwise", "twin"), ("current", "scaled_mm")]


class Collected(KernelRounding):
    """Triton's interpreter leaves the arguments of a launch in cycles of references, which no GPU's launch does."""

    def quantised(self, *args, **ways):
        found = super().quantised(*args, **ways)
        gc.collect()
        return found


def setting_of(
    scaling: str, engine: str, precision: str = "fp32", *, is_trained: bool = True, rounding: str = "torch"
) -> Setting:
    text = ModuleTraining(lr=1e-3 if is_trained else None)
    fp8 = Fp8Config(scaling=scaling, engine=engine, rounding=rounding)
    return Setting.of(run_config(tiny_model(), precision=precision, fp8=fp8, text=text), "cpu")


def measured(
    product: Product, scaling: Scaling, engine: str, dtype: torch.dtype, *, is_trained: bool = True
) -> tuple[int, int, int]:
    """Bytes kept beside the weight, taken by the forward with its output, and by the backward with all gradients."""
    x_TI = torch.randn(product.rows, product.inputs, dtype=dtype, requires_grad=True)
    w_OI = torch.randn(product.outputs, product.inputs, dtype=dtype, requires_grad=is_trained)
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with TensorMeter() as meter:
        meter.count(x_TI, w_OI)
        given = meter.live
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out_TO = fp8_linear(x_TI, w_OI, scaling, PRODUCTS[engine])
        kept.pop(w_OI.untyped_storage()._cdata)
        forward, num_kept = meter.peak - given, sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        d_out_TO = torch.ones_like(out_TO)
        before = meter.live
        meter.reset_peak()
        out_TO.backward(d_out_TO)
        return num_kept, forward, meter.peak - before


def assert_counted(setting: Setting, product: Product, found: tuple[int, int, int]) -> None:
    kept, forward, backward = found
    assert fp8_memory.kept(setting, product) == pytest.approx(kept, rel=0.01, abs=16)
    assert fp8_memory.forward(setting, product) == pytest.approx(forward, rel=0.05)
    assert fp8_memory.backward(setting, product) == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize(("scaling", "engine"), KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("product", [WIDE_OUT, WIDE_IN, TALL], ids=["wide out", "wide in", "many rows"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_a_linear_layer_in_fp8_keeps_and_takes_what_the_planner_says(product, scaling, engine, precision, is_trained):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    found = measured(product, SCALINGS[scaling], engine, dtype, is_trained=is_trained)
    assert_counted(setting_of(scaling, engine, precision, is_trained=is_trained), product, found)


@pytest.mark.parametrize("product", [WIDE_OUT, WIDE_IN, TALL], ids=["wide out", "wide in", "many rows"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_so_it_is_where_kernels_round(product, is_trained):
    pytest.importorskip("triton", reason="the kernels need triton: pip install triton")
    scaling = CurrentScaling(E4M3, E4M3, Axis(0, 1), Collected())
    found = measured(product, scaling, "scaled_mm", torch.float32, is_trained=is_trained)
    setting = setting_of("current", "scaled_mm", is_trained=is_trained, rounding="triton")
    assert_counted(setting, product, found)
    plain = setting_of("current", "scaled_mm", is_trained=is_trained)
    with pytest.raises(AssertionError):
        assert_counted(plain, product, found)


def test_a_layer_that_is_said_to_keep_its_input_as_it_came_is_found():
    found = measured(WIDE_OUT, SCALINGS["current"], "twin", torch.bfloat16)
    as_it_came = WIDE_OUT.of_input * 2
    with pytest.raises(AssertionError):
        assert as_it_came == pytest.approx(found[0], rel=0.1)


def test_a_frozen_decoder_keeps_nothing():
    assert fp8_memory.kept(setting_of("current", "scaled_mm", is_trained=False), WIDE_OUT) == 0


def test_auto_is_counted_as_kernels_on_a_gpu_and_as_torchs_operations_on_the_cpu():
    config = run_config(tiny_model(), fp8=Fp8Config())
    assert [Setting.of(config, device).rounding for device in ("cuda", "cpu")] == ["triton", "torch"]
    given = run_config(tiny_model(), fp8=Fp8Config(rounding="torch"))
    assert Setting.of(given, "cuda").rounding == "torch"


def test_histories_and_copies_of_weights_by_hand():
    delayed = setting_of("delayed", "twin")  # four layers, of which the first and the last are not in FP8
    assert fp8_memory.weight_bytes(delayed, 0) == 2 * 4 * 3 * (1024 + 2) * 4
    assert fp8_memory.weight_bytes(setting_of("current", "twin"), 0) == 0
    layer = 128 * (2 * (4 + 2) * 32 + 3 * 384)
    assert fp8_memory.weight_bytes(setting_of("blockwise", "transformer-engine"), 0) == 2 * 2 * layer


def stage3(*overrides: str):
    config = load_recipe(STAGE3, ["parallel.cp=1", "parallel.vision_placement=replicated", *overrides])
    return config, assumed_packs(config.model, config.data)


def test_products_in_fp8_take_half_their_time_and_nothing_else_changes():
    one = ("parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=1")
    plain, packs = stage3(*one)
    fast, _ = stage3(*one, "train.fp8={}")
    (without,) = stage_seconds(Setting.of(plain), packs.typical, H100, EFFICIENCY)
    (with_fp8,) = stage_seconds(Setting.of(fast), packs.typical, H100, EFFICIENCY)
    forward, both = flop_counts(Setting.of(plain), packs.typical)
    rate = H100.flops * EFFICIENCY.text
    saved = 34 / 36 * (1 - 989.5 / 1979)  # all layers but the first and the last
    assert without.forward - with_fp8.forward == pytest.approx(saved * forward.text_linear / rate)
    whole = (without.forward + without.backward) - (with_fp8.forward + with_fp8.backward)
    again = Setting.of(plain).recompute == "full"
    assert whole == pytest.approx(saved * (both.text_linear + again * forward.text_linear) / rate)
    assert (without.vision, without.communication) == (with_fp8.vision, with_fp8.communication)


def test_the_layers_that_are_not_in_fp8_are_those_of_the_first_and_last_stages():
    pp4 = ("parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=4", "train.vision.lr=null")
    plain, packs = stage3(*pp4)
    fast, _ = stage3(*pp4, "train.fp8={first_layers: 9, last_layers: 0}")
    without, with_fp8 = (stage_seconds(Setting.of(one), packs.typical, H100, EFFICIENCY) for one in (plain, fast))
    gains = [one.forward - other.forward for one, other in zip(without, with_fp8, strict=True)]
    assert gains[0] == pytest.approx(0, abs=1e-9) and gains[1] == pytest.approx(gains[3]) and gains[1] > 0.001


def test_the_twin_is_not_said_to_be_faster():
    plain, packs = stage3()
    twin, _ = stage3("train.fp8={engine: twin}")
    assert stage_seconds(Setting.of(plain), packs.typical, H100, EFFICIENCY) == stage_seconds(
        Setting.of(twin), packs.typical, H100, EFFICIENCY
    )
    assert any("slower than without FP8" in note for note in counted(twin, H100))


def test_microbatches_in_flight_hold_no_fp8_copies_of_weights():
    """Nor does the run: PyTorch's product rounds them when it takes them; Transformer Engine keeps two copies."""
    parallel = ParallelConfig(pp=2)
    config = run_config(tiny_model(), parallel=parallel, fp8=Fp8Config(engine="scaled_mm"), precision="bf16")
    plain = run_config(tiny_model(), parallel=parallel, precision="bf16")
    pack = assumed_packs(config.model, config.data).typical
    grown = []
    for one in (config, plain):
        setting = Setting.of(one)
        single, double = (rank_memory(one, setting, 1, [pack] * num, 0).activations for num in (1, 2))
        grown.append(double - single)
    assert fp8_memory.weight_bytes(Setting.of(config), 0) == 0
    assert grown[0] < grown[1]  # inputs in one byte of two


def test_a_gpu_without_fp8_products_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"a100 has no FP8 products.*train\.fp8=null.*h100"):
        check_fp8(gpu_named("a100"), Fp8Config())
    check_fp8(gpu_named("a100"), Fp8Config(engine="twin"))
    check_fp8(gpu_named("a100"), None)
    check_fp8(H100, Fp8Config())


def test_the_page_says_what_is_counted(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    plan = ["plan", str(STAGE3), "--gpus", "64", "--gpu", "h100", "--top", "1", "parallel.tp=2", "parallel.cp=1"]
    main([*plan, "parallel.vision_placement=replicated", "train.fp8={}", "train.vision_attention=varlen"])
    page = capsys.readouterr().out
    words = " ".join(page.split())
    assert "FP8 in 34 of 36 decoder layers: products at 1,979 TFLOP/s" in words and "as with scaled_mm" in words
    assert "varlen of the vision model" in words and "not modelled" not in words
    assert max(map(len, page.splitlines())) <= 120
    main([*plan, "parallel.vision_placement=replicated", "train.fp8={parts: [vision, projector]}"])
    words = " ".join(capsys.readouterr().out.split())
    assert "FP8 in 0 of 36 decoder layers" in words and "FP8 of vision and projector is not counted" in words
