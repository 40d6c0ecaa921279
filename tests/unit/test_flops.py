"""The published FLOP formula against torch's own counter on transformers' Qwen2.5-VL, forward and backward.

torch counts the eager forward's matrix products as they run: the linear parts must be equal to the last FLOP, vision
attention too (transformers runs it window by window), and causal attention must be exactly half, since eager computes
the whole square.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mimo_megatron.config.model import ModelConfig, SpecialTokens, TextConfig, VisionConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.train.flops import FlopCount, peak_flops, step_flops

TEXT = TextConfig(
    num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_width=8, ffn_width=48, vocab_size=64, rope_theta=20.0,
    mrope_section=(1, 1, 2), norm_eps=1e-5, max_positions=256,
)  # fmt: skip
VISION = VisionConfig(depth=3, width=24, num_heads=2, ffn_width=40, full_attention_layers=(1,))
TOKENS = SpecialTokens(pad=0, turn_start=1, turn_end=2, vision_start=3, vision_end=4, image_pad=5, video_pad=6)
MODEL = ModelConfig(name="flop-test", text=TEXT, vision=VISION, tokens=TOKENS)

# Windows cut at both borders, whole windows, a single row of blocks, two segments; and text alone.
IMAGE_SAMPLES: tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...] = (
    (7, ((1, 10, 14), (1, 8, 8))),
    (5, ((1, 2, 20),)),
)
TEXT_SAMPLE = (11, ())
SUBSETS = [some for n in (1, 2, 3) for some in itertools.combinations(("vision", "projector", "text"), n)]
ROOT = "Qwen2_5_VLForConditionalGeneration"


@pytest.fixture(scope="module")
def hf_model() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config=dict(
            num_hidden_layers=TEXT.num_layers, hidden_size=TEXT.width, num_attention_heads=TEXT.num_heads,
            num_key_value_heads=TEXT.num_kv_heads, intermediate_size=TEXT.ffn_width, vocab_size=TEXT.vocab_size,
            rope_theta=TEXT.rope_theta, rope_scaling={"type": "mrope", "mrope_section": list(TEXT.mrope_section)},
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        vision_config=dict(
            depth=VISION.depth, hidden_size=VISION.width, num_heads=VISION.num_heads, window_size=VISION.window_size,
            intermediate_size=VISION.ffn_width, fullatt_block_indexes=list(VISION.full_attention_layers),
            out_hidden_size=TEXT.width,
        ),
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager")


def _samples(trained: Collection[str]) -> tuple:
    """With the text model frozen, torch has nothing to differentiate in a text-only sample; our rule is the pack's."""
    return (*IMAGE_SAMPLES, TEXT_SAMPLE) if "text" in trained else IMAGE_SAMPLES


def _torch_counts(hf_model: Qwen2_5_VLForConditionalGeneration, trained: Collection[str]) -> dict[str, dict]:
    """What torch counted in one forward and backward of each sample: {module: {op: FLOPs}}."""
    for name, parameter in hf_model.named_parameters():
        part = "projector" if ".merger." in name else "vision" if ".visual." in name else "text"
        parameter.requires_grad_(part in trained)
    with FlopCounterMode(display=False) as counter:
        for sample in _samples(trained):
            logits = hf_model(**_inputs(*sample), use_cache=False).logits
            if trained:
                logits.square().sum().backward()
    hf_model.zero_grad()
    return counter.get_flop_counts()


def _linear_and_attention(counts: dict) -> tuple[int, int]:
    """torch's products split in two: attention alone runs as batched products."""
    attention = counts.get(torch.ops.aten.bmm, 0)
    return sum(counts.values()) - attention, attention


def _inputs(num_text: int, grids: tuple[tuple[int, int, int], ...]) -> dict[str, torch.Tensor]:
    ids = [7] * num_text
    for grid in grids:
        ids += [3, *[5] * (math.prod(grid) // 4), 4]
    token_ids = torch.tensor([ids])
    inputs = {"input_ids": token_ids, "mm_token_type_ids": (token_ids == 5).long()}
    if grids:
        inputs["pixel_values"] = torch.randn(sum(map(math.prod, grids)), VISION.patch_bytes)
        inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def _our_count(samples: tuple, trained: Collection[str]) -> FlopCount:
    segments = [_inputs(*sample)["input_ids"].numel() for sample in samples]
    return step_flops(MODEL, segments, [grid for _, grids in samples for grid in grids], trained)


def test_forward_flops_equal_torchs_part_by_part_with_causal_attention_as_half(hf_model):
    counts = _torch_counts(hf_model, ())

    def part(module: str) -> tuple[int, int]:
        return _linear_and_attention(counts[f"{ROOT}.{module}"])

    (text_linear, text_attention), (vision_linear, vision_attention) = map(
        part, ("model.language_model", "model.visual")
    )
    head, projector = part("lm_head")[0], part("model.visual.merger")[0]
    torchs = FlopCount(text_linear, text_attention, head, vision_linear - projector, vision_attention, projector)
    ours = _our_count(IMAGE_SAMPLES, ())
    assert dataclasses.replace(ours, text_attention=2 * ours.text_attention) == torchs


@pytest.mark.parametrize("trained", SUBSETS, ids="+".join)
def test_step_flops_equal_torchs_with_any_parts_frozen(hf_model, trained):
    linear, attention = _linear_and_attention(_torch_counts(hf_model, trained)["Global"])
    ours = _our_count(_samples(trained), trained)
    assert ours.text_linear + ours.head + ours.projector + ours.vision_linear == linear
    assert 2 * ours.text_attention + ours.vision_attention == attention


def test_a_wrong_freezing_rule_disagrees_with_torch(hf_model):
    """Planted fault: the frozen text model counted as trained, as the rule "3 x forward" has it."""
    linear, _ = _linear_and_attention(_torch_counts(hf_model, ("vision",))["Global"])
    right, fault = (_our_count(IMAGE_SAMPLES, trained) for trained in (("vision",), ("vision", "text")))
    assert right.vision_linear + right.projector + right.text_linear + right.head == linear
    assert right.vision_linear + right.projector + fault.text_linear + fault.head > 1.05 * linear


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=6), st.lists(st.sampled_from([(1, 4, 6), (3, 10, 14)])))
def test_the_count_of_a_step_is_the_sum_over_its_samples(segments, grids):
    whole = dataclasses.astuple(step_flops(MODEL, segments, grids, ("vision", "text")))
    parts = [step_flops(MODEL, [one], [], ("vision", "text")) for one in segments]
    parts += [step_flops(MODEL, [], [one], ("vision", "text")) for one in grids]
    assert whole == tuple(map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))


@given(height=st.integers(1, 20), width=st.integers(1, 20), frames=st.integers(1, 3))
def test_windowed_attention_equals_windows_enumerated_one_by_one(height, width, frames):
    vision = VISION.model_copy(update={"full_attention_layers": ()})
    grid = (frames, 2 * height, 2 * width)
    rows, columns = torch.meshgrid(torch.arange(2 * height) // 8, torch.arange(2 * width) // 8, indexing="ij")
    patches_per_window = torch.unique(rows * 100 + columns, return_counts=True)[1]
    pairs = frames * int(patches_per_window.square().sum())
    count = step_flops(MODEL.model_copy(update={"vision": vision}), [], [grid], ())
    assert count.vision_attention == VISION.depth * 4 * VISION.width * pairs


def test_mimo_vl_7b_costs_six_flops_per_parameter_and_token_outside_attention():
    """Its text model has 7,622.6 M parameters, of which the embedding (151,680 x 4,096) multiplies nothing."""
    count = step_flops(preset("mimo-vl-7b"), [8192], [], ("text",))
    multiplied = 7_622.6e6 - 151_680 * 4096
    assert (count.text_linear + count.head) / (6 * 8192) == pytest.approx(multiplied, rel=1e-4)


def test_a_text_model_with_mtp_counts_its_extra_layer_and_head():
    plain, with_mtp = (
        step_flops(preset(name).model_copy(update={"vision": None}), [100], [], ("text",))
        for name in ("tiny-vl", "tiny-base")
    )
    text = preset("tiny-base").text
    assert with_mtp.head == 2 * plain.head
    assert with_mtp.text_attention == plain.text_attention * (text.num_layers + 1) // text.num_layers
    joining = 6 * 100 * 2 * text.width**2
    assert with_mtp.text_linear - joining == plain.text_linear * (text.num_layers + 1) // text.num_layers


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops_are_known_for_data_centre_gpus_only(device, expected):
    assert peak_flops(device) == expected
