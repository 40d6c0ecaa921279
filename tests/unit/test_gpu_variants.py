"""Variants of the suite's training step: put into a trainer they are what the recipe builds; wrong ones are told."""

import collections
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the suite measures the kernels: pip install triton")

from benchmarks.gpu import train
from benchmarks.gpu.packs import PackClass
from benchmarks.gpu.report import markdown
from benchmarks.gpu.setting import Bench, Setting
from benchmarks.gpu.steps import step_row
from benchmarks.gpu.variants import (
    BASELINE,
    NOISE,
    SINGLE,
    Noise,
    Start,
    Variant,
    Ways,
    best_of,
    can_be_put_into,
    differences,
    losses_of_tokens,
    noise_of,
    put_into,
    why_wrong,
)
from mimo_megatron.attention.packed import Piece, causal_attention
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import RunConfig, VideoConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.ops import turn
from mimo_megatron.train.step import Trainer, build_trainer, train_step
from tests.harness import run_ranks
from tests.kernel_cases import ON_GPU
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96
SETTING = Setting(torch.device("cpu"), is_rehearsal=True)
on_cpu = pytest.mark.skipif(ON_GPU, reason="ranks are forked: the parent's CUDA context does not survive it")
Rows = list[dict[str, Any]]


def small_model(depth: int = 2, num_layers: int = 3) -> ModelConfig:
    """Heads of 80 in the encoder, as the kernel wants them; one decoder layer at least between first and last."""
    model = tiny_model(num_layers=num_layers)
    assert model.vision is not None
    vision = model.vision.model_copy(
        update=dict(depth=depth, width=80, num_heads=1, ffn_width=208, full_attention_layers=(1,))
    )
    return model.model_copy(update={"vision": vision})


def packs_of(model: ModelConfig, **train_fields: Any) -> PackClass:
    config = run_config(model, packs_per_step=1, **train_fields)
    data = config.data.model_copy(update={"max_pixels": 99_568, "video": VideoConfig(max_total_tokens=127)})
    config = config.model_copy(update={"data": data})
    return PackClass("8K", config, (collate(mixed_packs()[0], model, SLOTS),))


# ---- in place --------------------------------------------------------------------------------------------------------


def described(trainer: Trainer) -> list[str]:
    """Of every module its class and what says how it computes."""
    names = ("kernel", "backend", "numerics", "chunking", "scaling", "product", "encodes_in_fp8")

    def told(value: Any) -> str:
        own = getattr(value, "__qualname__", None)
        if own is not None or type(value).__name__ != "CurrentScaling":
            return own or repr(value)
        rounding = type(value.rounding).__name__
        return f"{value.of_forward} {value.of_backward} {value.axis.size} {rounding}"

    return [
        f"{name}: {type(module).__name__} " + " ".join(f"{key}={told(vars(module).get(key))}" for key in names)
        for model in trainer.bare_chunks
        for name, module in model.named_modules()
    ]


def put_and_built(
    address: RankAddress, ways: Ways, steps: int, precision: str
) -> list[tuple[list[str], list[tuple[float, float]]]]:
    """How both compute, and loss and gradient norm of their first steps."""
    packs = packs_of(small_model(), precision=precision)
    everything = Ways("triton", "triton", "triton", "twin in all parts")
    with megatron(packs.config.parallel, address) as mesh:
        trainer = build_trainer(Variant(packs, "none", BASELINE).config, mesh)
        start = Start(trainer)
        train_step(trainer, packs.batches, 1, 1.0)
        trainer = put_into(put_into(trainer, Variant(packs, "none", everything).config), config_of(packs, ways))
        start.restore(trainer)
        built = build_trainer(config_of(packs, ways), mesh)
        found = []
        for one in (trainer, built):
            results = [train_step(one, packs.batches, 1, 1.0) for _ in range(steps)]
            found.append((described(one), [(result.loss, result.grad_norm) for result in results]))
        return found


def config_of(packs: PackClass, ways: Ways) -> RunConfig:
    return Variant(packs, "none", ways).config


@on_cpu
@pytest.mark.parametrize(
    ("ways", "steps", "precision"),
    [
        (BASELINE, 2, "bf16"),
        (Ways(head="chunked", fp8="twin"), 2, "fp32"),
        (Ways(fp8="twin in all parts"), 1, "fp32"),
        (Ways("triton", "triton", "triton", "scaled_mm"), 0, "fp32"),
    ],
)
def test_a_variant_put_into_a_trainer_is_what_its_recipe_builds_to_the_bit(
    ways: Ways, steps: int, precision: str
) -> None:
    """Also where the trainer had all other ways, and steps, behind it."""
    ((put, built),) = run_ranks(put_and_built, 1, ways, steps, precision)
    assert put == built
    assert any("Fp8ColumnParallelLinear" in line for line in put[0]) == (ways.fp8 is not None)
    assert any("attn.qkv: Fp8Linear" in line for line in put[0]) == (ways.fp8 == "twin in all parts")
    assert any("attn: Attention kernel=vision_attention" in line for line in put[0]) == (ways.vision == "triton")


def refused(address: RankAddress) -> tuple[list[str], list[str], bool, bool]:
    packs = packs_of(small_model())
    with megatron(packs.config.parallel, address) as mesh:
        trainer = build_trainer(config_of(packs, BASELINE), mesh)
        before = described(trainer)
        with pytest.raises(ConfigError, match="Transformer Engine is not installed"):
            put_into(trainer, config_of(packs, Ways("triton", fp8="transformer-engine")))
        other = Variant(packs, "full", BASELINE).config
        is_same = can_be_put_into(trainer, config_of(packs, Ways(fp8="scaled_mm")))
        return before, described(trainer), can_be_put_into(trainer, other), is_same


@on_cpu
def test_what_cannot_run_leaves_the_trainer_as_it_was_and_another_recomputation_is_built_anew() -> None:
    ((before, after, other_recompute, fp8),) = run_ranks(refused, 1)
    assert before == after
    assert not other_recompute and fp8


# ---- the same numbers ------------------------------------------------------------------------------------------------


def keys_read_backwards(trainer: Trainer) -> None:
    """A fault in the decoder: dims of keys in the other order."""
    (model,) = trainer.bare_chunks

    def wrong(q: Tensor, k: Tensor, v: Tensor, cos_sin: tuple[Tensor, Tensor], pieces: Sequence[Piece]) -> Tensor:
        return causal_attention(turn(q, *cos_sin), k.flip(-1), v, pieces)

    model.text.kernel = wrong


def windows_that_are_frames(trainer: Trainer) -> None:
    """A fault in the encoder: every layer attends to whole frames."""
    (model,) = trainer.bare_chunks
    assert model.vision is not None
    every = tuple(range(model.vision.config.depth))
    model.vision.config = model.vision.config.model_copy(update={"full_attention_layers": every})


FAULTS = {"none": lambda trainer: None, "keys": keys_read_backwards, "windows": windows_that_are_frames}


def told_apart(address: RankAddress, fault: str) -> tuple[str, dict[str, float]]:
    packs = packs_of(small_model())
    bench = Bench(SETTING, {"bytes_per_second": 1e9, "flops_per_second": 1e9})
    variant = Variant(packs, "none", BASELINE)
    with megatron(packs.config.parallel, address) as mesh:
        trainer = build_trainer(variant.config, mesh)
        start = Start(trainer)
        baseline = step_row(trainer, variant, bench)
        start.restore(trainer)
        FAULTS[fault](trainer)
        found = differences(step_row(trainer, variant, bench), baseline)
        return why_wrong(found, noise_of(variant.config)), found


@on_cpu
def test_the_same_variant_again_is_the_same_to_the_bit() -> None:
    assert run_ranks(told_apart, 1, "none") == [("", {"loss": 0.0, "tokens": 0.0, "gradient": 0.0})]


@on_cpu
@pytest.mark.parametrize("fault", ["keys", "windows"])
def test_a_planted_fault_is_called_wrong(fault: str) -> None:
    ((why, found),) = run_ranks(told_apart, 1, fault)
    assert "tokens" in why, found


def test_what_is_no_number_is_wrong() -> None:
    nothing = {"loss": 0.0, "tokens": 0.0, "gradient": 0.0}
    assert why_wrong(nothing, NOISE["bf16"]) == ""
    assert why_wrong({**nothing, "tokens": float("nan")}, NOISE["bf16"]).startswith("tokens nan")
    assert why_wrong({**nothing, "gradient": 0.5}, Noise(1.0, 1.0, 0.4)) == "gradient 5.00e-01 over 4e-01"


def rounding(address: RankAddress, engine: str | None) -> dict[str, float]:
    """How far half precision, or FP8, moves the losses of tokens through as many layers as the suite's model has."""
    model = small_model(depth=32, num_layers=8)
    exact, rounded = packs_of(model), packs_of(model, precision="fp32" if engine else "bf16")
    with megatron(exact.config.parallel, address) as mesh:
        losses = {}
        for name, packs, ways in (("exact", exact, BASELINE), ("rounded", rounded, Ways(fp8=engine))):
            trainer = build_trainer(config_of(packs, ways), mesh)
            losses[name] = losses_of_tokens(trainer, packs.batches[0])
    head = {"first_losses": [1.0], "first_gradient_norms": [1.0]}
    return differences({**head, "losses_R": losses["rounded"]}, {**head, "losses_R": losses["exact"]})


@on_cpu
@pytest.mark.parametrize(("engine", "kind"), [(None, "bf16"), ("twin", "fp8"), ("twin in all parts", "fp8")])
def test_a_right_step_stays_within_the_noise_it_is_allowed(engine: str | None, kind: str) -> None:
    ((found),) = run_ranks(rounding, 1, engine)
    assert 0 < found["tokens"] < NOISE[kind].tokens / 2, found


# ---- which variants --------------------------------------------------------------------------------------------------


def row(ways: Ways, rate: float, wrong: str = "") -> dict[str, Any]:
    return {"ways": dict(vars(ways)), "tokens_per_second": rate, "wrong": wrong}


def test_the_best_of_each_key_together_wrong_and_slower_ones_left_out() -> None:
    rows = [
        row(BASELINE, 100), row(Ways(vision="varlen"), 110), row(Ways(vision="triton"), 120),
        row(Ways(text="varlen"), 90), row(Ways(text="triton"), 130, wrong="tokens"), row(Ways(head="chunked"), 101),
        {"ways": dict(vars(Ways(head="triton"))), "failed": "no kernel image"},
    ]  # fmt: skip
    assert best_of(rows) == Ways(vision="triton", head="chunked")
    assert best_of(rows[:1]) == best_of([]) == BASELINE


def test_each_change_by_itself_covers_every_value_of_the_keys_once() -> None:
    changed = [[key for key in vars(ways) if ways.changes(key)] for ways in SINGLE]
    assert all(len(keys) == 1 for keys in changed)
    assert {(keys[0], getattr(ways, keys[0])) for keys, ways in zip(changed, SINGLE, strict=True)} == {
        *(("vision", way) for way in ("varlen", "flash", "triton")),
        *(("text", way) for way in ("varlen", "flash", "triton")),
        *(("head", way) for way in ("chunked", "triton")),
    }


def sections_of(
    monkeypatch: pytest.MonkeyPatch,
    bench: Bench,
    step: Any,
    build: Any = lambda *_: "built",
    profile: Any = lambda *_: {},
) -> Any:
    """What the section saves where trainers and steps are made up."""
    monkeypatch.setattr(train, "megatron", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "build_trainer", build)
    monkeypatch.setattr(train, "release", lambda _: None)  # a collection of garbage after each, which takes seconds
    monkeypatch.setattr(train, "Start", lambda _: None)
    monkeypatch.setattr(train, "can_be_put_into", lambda *_: False)
    monkeypatch.setattr(train, "step_row", step)
    monkeypatch.setattr(train, "top_kernels", profile)
    monkeypatch.setattr(train, "encoder_row", lambda *_: {})
    packs = packs_of(small_model())
    bench.kept |= {"packs": [packs, replace(packs, name="32K")], "text packs": replace(packs, name="8K text")}
    found = collections.defaultdict[str, Rows](list)
    train.section(bench, lambda **more: [found[key].extend(rows) for key, rows in more.items()])
    return found


def made_up(_trainer: object, variant: Variant, _bench: Bench) -> dict[str, Any]:
    if variant.ways.vision == "triton":
        raise RuntimeError("no kernel image")
    rate = 100.0 + 10 * (variant.ways.head == "chunked") + 5 * (variant.ways.head == "triton")
    return {
        "step_seconds": 1.0, "tokens_per_second": rate, "losses_R": torch.tensor([1.0, 2.0]),
        "first_losses": [1.0], "first_gradient_norms": [1.0 + 0.5 * (variant.ways.head == "triton")],
    }  # fmt: skip


def test_the_section_measures_a_baseline_each_change_the_best_text_alone_and_fp8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = sections_of(monkeypatch, Bench(SETTING), made_up)
    told = {row["variant"]: row.get("failed") or row.get("wrong") for row in found["rows"]}
    assert [name.removesuffix(", recompute none") for name in told] == [
        "8K, baseline", "8K, vision triton", "8K, text flash", "8K, head triton", "8K, text varlen",
        "8K, vision flash", "8K, vision varlen", "8K, text triton", "8K, head chunked", "8K text, head chunked",
        "8K, head chunked, fp8 scaled_mm in all parts", "8K, head chunked, fp8 scaled_mm",
        "8K, fp8 scaled_mm", "8K, head chunked, fp8 transformer-engine", "32K, baseline", "32K, head chunked",
    ]  # fmt: skip
    assert told["8K, vision triton, recompute none"] == "RuntimeError: no kernel image"
    assert told["8K, head triton, recompute none"].startswith("gradient 5.00e-01")
    assert all("takes half precision" in told[f"8K, text {way}, recompute none"] for way in ("flash", "varlen"))
    assert not any("losses_R" in row for row in found["rows"])
    assert len(found["profiles"]) == len(found["encoder"]) == 2


def test_without_a_profiler_the_variants_are_measured_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_profiler(*_: object) -> dict[str, Any]:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    found = sections_of(monkeypatch, Bench(SETTING), made_up, profile=no_profiler)
    assert {row["failed"] for row in found["profiles"]} == {"RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}
    assert len([row for row in found["rows"] if "step_seconds" in row]) > 5 and not found["encoder"]
    sections = {"train": {"status": "done", "data": {"profiles": found["profiles"]}}}
    assert "No profile of 8K, baseline" in markdown({"rehearsal": False, "sections": sections})


def test_what_does_not_fit_into_memory_is_tried_with_recomputation_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(config: RunConfig, _mesh: object) -> str:
        if config.train.recompute != "full":
            raise torch.OutOfMemoryError("tried to allocate 60 GiB")
        return "a trainer"

    found = sections_of(monkeypatch, Bench(SETTING), made_up, built)
    failed = [(row["class"], row["recompute"]) for row in found["attempts"] if "failed" in row]
    assert failed == [(name, recompute) for name in ("8K", "32K") for recompute in ("none", "selective")]
    assert {row["recompute"] for row in found["rows"]} == {"full"}


def test_when_time_runs_out_the_baseline_is_there_and_the_rest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SETTING)
    monkeypatch.setattr(bench, "seconds_left", lambda: 0.0)
    monkeypatch.setattr(train.time, "perf_counter", iter(range(1000)).__next__)
    found = sections_of(monkeypatch, bench, made_up)
    told = {row["variant"]: row.get("skipped") for row in found["rows"]}
    assert told.pop("8K, baseline, recompute none") is None
    assert "32K, baseline, recompute none" in told and set(told.values()) == {"no time was left"}
    assert "8K, vision triton, recompute none" in told and not found["profiles"]
