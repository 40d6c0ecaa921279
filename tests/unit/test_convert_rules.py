"""Each rule against the plainest statement of what it means, and the tensors of whole models against known counts."""

import pytest
import torch

from mimo_megatron.config.presets import preset
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.rules import flatten, fuse_gate_up, fuse_qkv, rename, swap_halves, tied


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_fused_qkv_is_each_kv_heads_queries_then_its_k_then_its_v() -> None:
    heads, kv_heads, head_width, width = 6, 2, 4, 5
    rule = fuse_qkv("qkv", ["q", "k", "v"], heads, kv_heads, head_width, rest=(width,))
    q, k, v = (numbered(n * head_width, width, start=1000 * i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    rows = []
    for group in range(kv_heads):
        for head in range(3 * group, 3 * group + 3):
            rows += [q[head * head_width + i] for i in range(head_width)]
        rows += [k[group * head_width + i] for i in range(head_width)]
        rows += [v[group * head_width + i] for i in range(head_width)]
    assert torch.equal(rule.to_ours([q, k, v]), torch.stack(rows))


def test_fused_qkv_of_a_bias_is_that_of_a_one_column_weight() -> None:
    weight = fuse_qkv("qkv", ["q", "k", "v"], 4, 2, 3, rest=(1,))
    bias = fuse_qkv("qkv", ["q", "k", "v"], 4, 2, 3, rest=())
    hf = [numbered(12, start=0), numbered(6, start=100), numbered(6, start=200)]
    assert torch.equal(bias.to_ours(hf), weight.to_ours([one.unsqueeze(1) for one in hf]).squeeze(1))


def test_gate_comes_before_up() -> None:
    gate, up = numbered(3, 2), numbered(3, 2, start=100)
    assert torch.equal(fuse_gate_up("fc1", "gate", "up", (3, 2)).to_ours([gate, up]), torch.cat([gate, up]))


def test_hidden_and_embedding_halves_change_places() -> None:
    hidden, embedding = numbered(3, 2), numbered(3, 2, start=100)
    ours = swap_halves("ours", "hf", (3, 4)).to_ours([torch.cat([hidden, embedding], 1)])
    assert torch.equal(ours, torch.cat([embedding, hidden], 1))


def test_flattened_convolution_multiplies_patches() -> None:
    kernel = torch.randn(8, 3, 2, 4, 4, dtype=torch.float64)
    pixels = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64)
    ours = flatten("ours", "hf", tuple(kernel.shape)).to_ours([kernel])
    want = torch.nn.functional.conv3d(pixels, kernel, stride=(2, 4, 4)).flatten(1)
    assert torch.allclose(pixels.flatten(1) @ ours.T, want, atol=1e-12)


def test_renamed_tied_and_flattened_tensors_are_not_copied() -> None:
    values = numbered(4, 6)
    for rule in (rename("a", "b", (4, 6)), tied("a", "b", "c", (4, 6)), flatten("a", "b", (4, 6))):
        assert rule.to_ours([values]).data_ptr() == values.data_ptr()
        assert rule.to_hf(values)[0].data_ptr() == values.data_ptr()


@pytest.mark.parametrize(
    "name, text, vision, projector",
    [
        ("mimo-vl-7b", 7622.619136, 636.4, 47.2),
        ("mimo-7b-base", 7833.409536, 0, 0),  # the published count, with its prediction layer
    ],
)
def test_rules_cover_the_published_millions(name: str, text: float, vision: float, projector: float) -> None:
    counts = {"text": 0, "vision": 0, "projector": 0}
    for rule in rules_for(preset(name)):
        counts[rule.ours.name.split(".")[0]] += rule.ours.numel
        assert rule.ours.numel == sum(spec.numel for spec in rule.hf)
    assert counts["text"] == round(text * 1e6)
    assert (round(counts["vision"] / 1e6, 1), round(counts["projector"] / 1e6, 1)) == (vision, projector)


@pytest.mark.parametrize("name", ["mimo-vl-7b", "mimo-7b-base", "tiny-vl"])
def test_no_name_is_used_twice(name: str) -> None:
    rules = rules_for(preset(name))
    ours, hf = [rule.ours.name for rule in rules], [spec.name for rule in rules for spec in rule.hf]
    assert len(set(ours)) == len(ours) and len(set(hf)) == len(hf)


def test_prediction_layers_carry_mimos_names() -> None:
    names = {spec.name for rule in rules_for(preset("tiny-base")) for spec in rule.hf if "mtp_layers" in spec.name}
    assert names == {
        f"model.mtp_layers.0.{name}"
        for name in (
            "token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight", "final_layernorm.weight",
            "input_layernorm.weight", "post_attention_layernorm.weight",
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
            "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias",
            "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
        )
    }  # fmt: skip
