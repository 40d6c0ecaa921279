"""The tensors of a model under both names: Hugging Face's released ones, and those of our checkpoints.

Hugging Face side: Qwen2.5-VL and MiMo-VL (``visual.*``, ``model.*``, ``lm_head.weight``), MiMo-7B-Base (adds
``model.mtp_layers.*``) and Qwen2; a reward model has a score weight in place of ``lm_head.weight``. Our side: the
keys of the model's ``sharded_state_dict`` with layers not stacked, in which megatron puts a layer's norms beside the
linear layer that follows them.
"""

from mimo_megatron.config.model import ModelConfig, TextConfig, VisionConfig
from mimo_megatron.convert.rules import Rule, Shape, flatten, fuse_gate_up, fuse_qkv, rename, swap_halves, tied


def rules_for(model: ModelConfig) -> list[Rule]:
    """One rule for every tensor of the model, in the order in which files are written."""
    # vLLM (0.32), which alone runs such a model with pictures, looks for its head inside the language model.
    reward_head = "score.weight" if model.vision is None else "language_model.score.weight"
    rules = _text_rules(model.text, reward_head)
    if model.vision is not None:
        rules += _vision_rules(model.vision) + _projector_rules(model.vision, model.text.width)
    return rules


def object_keys(model: ModelConfig) -> list[str]:
    """Checkpoint keys of megatron's linear layers that hold an object (quantisation state, None here) and no tensor.

    A strict load through megatron asks for exactly these (megatron-core 0.16.1, local layers).
    """
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    modules = [f"text.decoder.layers.{i}.{linear}" for i in range(model.text.num_layers) for linear in linears]
    for i in range(model.text.num_mtp_layers):
        mtp = f"text.mtp.layers.{i}"
        modules += [f"{mtp}.eh_proj", *(f"{mtp}.transformer_layer.{linear}" for linear in linears)]
    return [f"{module}._extra_state/shard_0_1" for module in modules]


def _text_rules(text: TextConfig, reward_head: str) -> list[Rule]:
    table = (text.vocab_size, text.width)
    embedding = ("text.embedding.word_embeddings.weight", "model.embed_tokens.weight")
    rules = [
        tied(*embedding, "lm_head.weight", table) if text.ties_head else rename(*embedding, table),
        rename("text.decoder.final_layernorm.weight", "model.norm.weight", (text.width,)),
    ]
    for i in range(text.num_layers):
        rules += _decoder_layer(text, f"text.decoder.layers.{i}", f"model.layers.{i}")
    for i in range(text.num_mtp_layers):
        rules += _mtp_layer(text, f"text.mtp.layers.{i}", f"model.mtp_layers.{i}")
    if text.head == "reward":
        rules.append(rename("text.output_layer.weight", reward_head, (1, text.width)))
    elif not text.tie_embeddings:
        rules.append(rename("text.output_layer.weight", "lm_head.weight", table))
    return rules


def _decoder_layer(text: TextConfig, ours: str, hf: str) -> list[Rule]:
    width, query_width = text.width, text.num_heads * text.head_width
    heads = (text.num_heads, text.num_kv_heads, text.head_width)
    attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"

    def qkv(kind: str) -> list[str]:
        return [f"{attention}.{one}_proj.{kind}" for one in "qkv"]

    return [
        rename(f"{ours}.self_attention.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight", (width,)),
        fuse_qkv(f"{ours}.self_attention.linear_qkv.weight", qkv("weight"), *heads, rest=(width,)),
        fuse_qkv(f"{ours}.self_attention.linear_qkv.bias", qkv("bias"), *heads, rest=()),
        rename(f"{ours}.self_attention.linear_proj.weight", f"{attention}.o_proj.weight", (width, query_width)),
        rename(f"{ours}.mlp.linear_fc1.layer_norm_weight", f"{hf}.post_attention_layernorm.weight", (width,)),
        fuse_gate_up(
            f"{ours}.mlp.linear_fc1.weight", f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight", (text.ffn_width, width)
        ),
        rename(f"{ours}.mlp.linear_fc2.weight", f"{mlp}.down_proj.weight", (width, text.ffn_width)),
    ]


def _mtp_layer(text: TextConfig, ours: str, hf: str) -> list[Rule]:
    """MiMo concatenates [hidden, embedding] before the projection, megatron [embedding, hidden]."""
    width = text.width
    return [
        rename(f"{ours}.enorm.weight", f"{hf}.token_layernorm.weight", (width,)),
        rename(f"{ours}.hnorm.weight", f"{hf}.hidden_layernorm.weight", (width,)),
        swap_halves(f"{ours}.eh_proj.weight", f"{hf}.input_proj.weight", (width, 2 * width)),
        *_decoder_layer(text, f"{ours}.transformer_layer", hf),
        rename(f"{ours}.final_layernorm.weight", f"{hf}.final_layernorm.weight", (width,)),
    ]


def _vision_rules(vision: VisionConfig) -> list[Rule]:
    width, ffn = vision.width, vision.ffn_width
    kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patch = (width, vision.in_channels, *kernel)
    rules = [flatten("vision.patch_embed.weight", "visual.patch_embed.proj.weight", patch)]
    for i in range(vision.depth):
        shapes: dict[str, Shape] = {"norm1.weight": (width,), "norm2.weight": (width,)}
        linears = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }
        for name, shape in linears.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        rules += [rename(f"vision.blocks.{i}.{name}", f"visual.blocks.{i}.{name}", at) for name, at in shapes.items()]
    return rules


def _projector_rules(vision: VisionConfig, out_width: int) -> list[Rule]:
    merged = vision.width * vision.merge_factor
    return [
        rename("projector.norm.weight", "visual.merger.ln_q.weight", (vision.width,)),
        rename("projector.fc1.weight", "visual.merger.mlp.0.weight", (merged, merged)),
        rename("projector.fc1.bias", "visual.merger.mlp.0.bias", (merged,)),
        rename("projector.fc2.weight", "visual.merger.mlp.2.weight", (out_width, merged)),
        rename("projector.fc2.bias", "visual.merger.mlp.2.bias", (out_width,)),
    ]
