"""Bytes that the forward of one microbatch keeps for its backward, part by part, as our code keeps them.

A stage is a row of ``Part``s in the order of its forward. While a part runs, everything saved before it is alive, and
the part's own ``forward`` bytes above what it saves; in the backward, everything saved up to it and its ``backward``
bytes. Each formula names the tensors; docs/planner.md has the table, tests/distributed/test_memory_model.py the proof.

Letters as in docs/shapes.md; ``t`` slots on this cp rank, ``s`` slots on this rank (t / tp under sequence parallelism),
``b`` bytes of a value in the weights' dtype. Statistics and softmax are kept in 4 bytes.
"""

from collections.abc import Iterator

from mimo_megatron.planner import attention_memory, fp8_memory
from mimo_megatron.planner.fp8_memory import LayerProducts, Product
from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.setting import WIDE, Part, Setting


def stage_parts(setting: Setting, stage: int, pack: PackShape, cp_rank: int = 0) -> list[Part]:
    """The parts of one stage, in the order of its forward."""
    of_stages = setting.layout.layers_of_stages(setting.model.text.num_layers)
    before = sum(of_stages[:stage])
    is_first, is_last = stage == 0, stage == setting.layout.num_stages - 1
    parts = (
        [*_vision_parts(setting, pack), _embedding(setting, pack)] if is_first else [_received(setting, pack, stage)]
    )
    for layer in range(before, before + of_stages[stage]):
        parts += _text_layer(setting, pack, cp_rank, in_fp8=setting.is_in_fp8(layer))
    if is_last:
        parts += _prediction_layers(setting, pack, cp_rank)
        parts.append(_final_norm(setting, pack))
        in_chunks = setting.head_logits is not None
        parts += [_head_in_chunks(setting, pack)] if in_chunks else [_head(setting, pack), _loss(setting, pack)]
    return parts


# ---- decoder ---------------------------------------------------------------------------------------------------------


def _streams(setting: Setting) -> int:
    """Parts of what travels between stages: the hidden states, and the embeddings ahead for prediction layers."""
    return 1 + setting.model.text.num_mtp_layers


def _hidden(setting: Setting, pack: PackShape) -> int:
    return setting.stream_slots(pack) * setting.model.text.width * setting.value_bytes


def _received(setting: Setting, pack: PackShape, stage: int) -> Part:
    """The input of an inner stage, kept until its gradient has been sent; recomputation keeps it anyway, as does the
    first norm on a GPU."""
    num_layers = setting.layout.layers_of_stages(setting.model.text.num_layers)[stage]
    is_kept_by_layer = num_layers > 0 and (setting.recompute == "full" or setting.device == "cuda")
    return Part("received", (_streams(setting) - is_kept_by_layer) * _hidden(setting, pack))


def _embedding(setting: Setting, pack: PackShape) -> Part:
    """Embeds and splices: the stream is the first layer's input. Its backward holds the embedding's gradient."""
    text, b = setting.model.text, setting.value_bytes
    whole = setting.local_slots(pack) * text.width * b
    features = _merged_units(setting, pack) * text.width * b
    gradient = text.vocab_size // setting.layout.tp * text.width * b if "text" in setting.trained else 0
    index = 3 * 8 * setting.local_slots(pack)
    has_room = setting.recompute == "full" or setting.model.text.num_mtp_layers
    saved = _streams(setting) * _hidden(setting, pack) if has_room else 0
    return Part(
        "embedding",
        saved + index,
        forward=2 * whole + 2 * features + _hidden(setting, pack) * (_streams(setting) - bool(saved)),
        backward=3 * whole + gradient + (2 * features if setting.features_need_grad else 0),
    )


def _text_layer(setting: Setting, pack: PackShape, cp_rank: int, *, in_fp8: bool = False) -> Iterator[Part]:
    plain = _plain_layer(setting, pack, cp_rank, in_fp8=in_fp8)
    hidden = _hidden(setting, pack)
    if setting.recompute == "full":
        # Only the layer's input, which the part before made; the whole layer is made again for its backward.
        saved = sum(part.saved for part in plain)
        worst = max(plain[0].saved + plain[0].forward, saved + plain[1].forward)
        again = max(saved + plain[1].backward, plain[0].saved + plain[0].backward)
        yield Part("layer", hidden, forward=worst, backward=again + hidden)
    elif setting.recompute == "selective":
        yield from _selective_layer(setting, pack, cp_rank, in_fp8=in_fp8)
    else:
        yield from plain


def _norm(setting: Setting, pack: PackShape) -> int:
    """Without its output, which is the input of the linear layer behind it."""
    return setting.norm_bytes(setting.stream_slots(pack), setting.model.text.width)


def _if_trained(setting: Setting, num_bytes: int) -> int:
    return num_bytes if "text" in setting.trained else 0


def _mlp_rows(setting: Setting, pack: PackShape) -> tuple[int, int]:
    """Bytes of one F-wide tensor on this rank, and how many of them the MLP keeps beside its products' inputs."""
    inner = setting.local_slots(pack) * setting.model.text.ffn_width // setting.layout.tp * setting.value_bytes
    return inner, 2 + (setting.device == "cpu")


def _weight_gradient(setting: Setting, numbers: int) -> int:
    return _if_trained(setting, numbers * setting.value_bytes)


def _of_product(setting: Setting, product: Product, plain_input: int, *, in_fp8: bool) -> int:
    """What a linear layer keeps, where it is trained: its input, in FP8 or of so many bytes."""
    return fp8_memory.kept(setting, product) if in_fp8 else _if_trained(setting, plain_input)


def _plain_layer(setting: Setting, pack: PackShape, cp_rank: int, *, in_fp8: bool = False) -> tuple[Part, Part]:
    return _attention_part(setting, pack, cp_rank, in_fp8=in_fp8), _mlp_part(setting, pack, in_fp8=in_fp8)


def _attention_part(setting: Setting, pack: PackShape, cp_rank: int, *, in_fp8: bool) -> Part:
    hidden, whole = _hidden(setting, pack), setting.local_slots(pack) * setting.model.text.width * setting.value_bytes
    qkv, queries, _ = attention_memory.text_rows(setting, pack)
    core = attention_memory.of_text(setting, pack, cp_rank)
    products = LayerProducts.of(setting, pack)
    of_qkv = _of_product(setting, products.qkv, hidden, in_fp8=in_fp8)
    of_projection = _of_product(setting, products.projection, core.has_other_output * queries, in_fp8=in_fp8)
    of_core = core.kept + core.keeps_qkv * qkv
    wide = hidden if setting.device == "cuda" else hidden // setting.value_bytes * WIDE
    forward, backward = 2 * hidden + whole, max(core.backward, whole + 2 * wide + qkv)
    if in_fp8:
        # Later rows of the part are not yet there in the forward, and gone again in the backward, while qkv is made.
        gathered = whole if setting.layout.sequence_parallel else hidden
        first = gathered + fp8_memory.forward(setting, products.qkv) - of_qkv - of_core - of_projection
        last = fp8_memory.forward(setting, products.projection) - of_projection + hidden
        forward = max(forward, first, last)
        backward = max(
            backward,
            whole + fp8_memory.backward(setting, products.projection),
            qkv + fp8_memory.backward(setting, products.qkv) - of_core - of_projection,
        )
    else:
        backward += _weight_gradient(setting, products.qkv.of_weight)
    saved = _norm(setting, pack) + of_qkv + of_core + of_projection
    return Part("attention", saved, forward=forward, backward=2 * hidden + backward)


def _mlp_part(setting: Setting, pack: PackShape, *, in_fp8: bool) -> Part:
    is_trained = "text" in setting.trained
    hidden, whole = _hidden(setting, pack), setting.local_slots(pack) * setting.model.text.width * setting.value_bytes
    inner, kept = _mlp_rows(setting, pack)
    products = LayerProducts.of(setting, pack)
    of_fc1 = _of_product(setting, products.fc1, hidden, in_fp8=in_fp8)
    of_fc2 = _of_product(setting, products.fc2, inner, in_fp8=in_fp8)
    forward = 2 * hidden + whole
    if in_fp8:
        gathered = whole if setting.layout.sequence_parallel else hidden
        forward = max(
            forward,
            gathered + fp8_memory.forward(setting, products.fc1) - of_fc1 - kept * inner - of_fc2,
            hidden + inner + fp8_memory.forward(setting, products.fc2) - of_fc2,
        )
        backward = max(
            whole + fp8_memory.backward(setting, products.fc2),
            4 * inner - of_fc2,
            2 * inner + fp8_memory.backward(setting, products.fc1) - kept * inner - of_fc2,
        )
    else:
        backward = max((4 - is_trained) * inner, inner + _weight_gradient(setting, products.fc1.of_weight))
    saved = _norm(setting, pack) + of_fc1 + kept * inner + of_fc2
    return Part("mlp", saved, forward=forward, backward=hidden + backward)


def _selective_layer(setting: Setting, pack: PackShape, cp_rank: int, *, in_fp8: bool) -> Iterator[Part]:
    """Keeps the inputs of core attention (q, and k and v in the fused qkv) and of the MLP; makes the rest again."""
    attention, mlp = _plain_layer(setting, pack, cp_rank, in_fp8=in_fp8)
    qkv, queries, _ = attention_memory.text_rows(setting, pack)
    core = attention_memory.of_text(setting, pack, cp_rank)
    products = LayerProducts.of(setting, pack)
    hidden, norm = _hidden(setting, pack), _norm(setting, pack)
    of_qkv = _of_product(setting, products.qkv, hidden, in_fp8=in_fp8)
    out = _of_product(setting, products.projection, queries, in_fp8=in_fp8)
    again = core.kept + (0 if in_fp8 else _if_trained(setting, core.has_other_output * queries))
    yield Part(
        "attention",
        norm + of_qkv + qkv + queries + out,
        forward=attention.forward + again,
        backward=attention.backward + again,
    )
    again = mlp.saved - norm - (0 if in_fp8 else _if_trained(setting, hidden))
    yield Part("mlp", norm + hidden, forward=mlp.forward + again, backward=mlp.backward + again + hidden)


def _prediction_layers(setting: Setting, pack: PackShape, cp_rank: int) -> Iterator[Part]:
    """Two norms, the joining matrix over both side by side, a decoder layer, a norm."""
    hidden, is_trained = _hidden(setting, pack), "text" in setting.trained
    norm = _norm(setting, pack)
    joined = Part("join", 2 * norm + is_trained * 2 * hidden, forward=2 * hidden, backward=4 * hidden)
    for _ in range(setting.model.text.num_mtp_layers):
        if setting.recompute == "full":
            parts = [joined, *_plain_layer(setting, pack, cp_rank)]
            saved = sum(part.saved for part in parts) + norm
            yield Part("prediction", 2 * hidden, forward=saved, backward=saved + max(part.backward for part in parts))
            continue
        yield joined
        yield from _text_layer(setting, pack, cp_rank)
        yield Part("norm", norm + hidden, forward=hidden)


def _final_norm(setting: Setting, pack: PackShape) -> Part:
    hidden = _hidden(setting, pack)
    return Part("norm", _norm(setting, pack), forward=2 * hidden, backward=4 * hidden)


def _head_rows(setting: Setting, pack: PackShape) -> int:
    """R: trained tokens on this rank, of the decoder and of each prediction layer."""
    return pack.num_rows * _streams(setting) // setting.layout.cp


def _head(setting: Setting, pack: PackShape) -> Part:
    """Keeps the gathered rows. Its logits are kept by nobody, but live until the loss has been taken."""
    text, b = setting.model.text, setting.value_bytes
    rows, local_vocabulary = _head_rows(setting, pack), max(text.head_rows // setting.layout.tp, 1)
    whole = setting.local_slots(pack) * text.width * b * _streams(setting)
    d_logits = rows * local_vocabulary * b
    return Part(
        "head",
        rows * text.width * b if "text" in setting.trained else 0,
        forward=whole + rows * local_vocabulary * b,
        backward=d_logits
        + rows * text.width * b
        + max(_weight_gradient(setting, local_vocabulary * text.width), whole),
    )


def _head_in_chunks(setting: Setting, pack: PackShape) -> Part:
    """Head and loss: keeps the gathered rows; a chunk's logits, also in 4 bytes, live while it is read."""
    text, b = setting.model.text, setting.value_bytes
    rows, local_vocabulary = _head_rows(setting, pack), text.vocab_size // setting.layout.tp
    whole = setting.local_slots(pack) * text.width * b * _streams(setting)
    chunk = min(setting.head_logits or 0, rows * local_vocabulary) * (b + (WIDE if b < WIDE else 0))
    hidden = rows * text.width
    return Part(
        "head in chunks",
        hidden * b,
        forward=whole + chunk,
        backward=hidden * WIDE
        + _weight_gradient(setting, local_vocabulary * text.width)
        + max(chunk, whole, 2 * hidden * b if b < WIDE else 0),
    )


def _loss(setting: Setting, pack: PackShape) -> Part:
    """Log-probabilities in 4 bytes, over which the gradient of the logits is written."""
    cells = _head_rows(setting, pack) * setting.model.text.head_rows // setting.layout.tp
    b = setting.value_bytes
    widened = cells * WIDE if setting.device == "cpu" and b < WIDE else 0
    return Part("loss", cells * WIDE, forward=cells * b + widened, backward=cells * b if b < WIDE else 0)


# ---- vision ----------------------------------------------------------------------------------------------------------


def _merged_units(setting: Setting, pack: PackShape) -> int:
    return pack.num_patches // setting.model.vision.merge_factor if setting.model.vision else 0


def _vision_parts(setting: Setting, pack: PackShape) -> Iterator[Part]:
    vision, b = setting.model.vision, setting.value_bytes
    if vision is None or not pack.grids:
        return
    patches = round(pack.num_patches * setting.vision_share(pack))
    row = patches * vision.width * b
    is_trained = "vision" in setting.trained
    pixels = round(pack.pixel_bytes(vision) * setting.vision_share(pack)) * b
    angles = patches * vision.head_width * WIDE
    folded = vision.patch_bytes * vision.width * WIDE * 3 // 2  # the weights of whole patches and of stills
    yield Part(
        "patch embedding",
        is_trained * (pixels + angles),
        forward=folded + row + max(row, 0 if is_trained else pixels),  # as embedded, and in the order of windows
        backward=is_trained * (2 * folded + row),
    )
    for number in range(vision.depth):
        yield from _vision_block(setting, pack, patches, is_full=number in vision.full_attention_layers)
    yield _projector(setting, patches, row)
    if setting.shares_vision:
        features = _merged_units(setting, pack) * setting.model.text.width * b
        yield Part("gathered features", 0, forward=2 * features, backward=2 * features)


def _vision_block(setting: Setting, pack: PackShape, patches: int, *, is_full: bool) -> Iterator[Part]:
    vision, b = setting.model.vision, setting.value_bytes
    assert vision is not None
    row, inner = patches * vision.width * b, patches * vision.ffn_width * b
    norm = setting.norm_bytes(patches, vision.width) + row
    weights = (vision.ffn_width * vision.width) * b
    kept, needed = attention_memory.of_vision(setting, pack, patches, is_full=is_full)
    attention = Part("vision attention", norm + kept, forward=2 * row, backward=needed)
    gated = 2 + (setting.device == "cpu")  # gate and up; on a CPU the gate's silu too
    mlp = Part("vision mlp", norm + (gated + 1) * inner, forward=2 * row, backward=row + inner + max(inner, weights))
    saved = attention.saved + mlp.saved
    if "vision" not in setting.trained:
        angles = patches * vision.head_width * WIDE
        yield Part("vision block", 0, forward=max(8 * row, 3 * row + 3 * inner) + angles)
    elif setting.recompute_vision:
        worst = max(8 * row, 3 * row + 3 * inner)
        yield Part(
            "vision block", row, forward=worst, backward=saved + max(mlp.backward, attention.backward - mlp.saved)
        )
    else:
        yield attention
        yield mlp


def _projector(setting: Setting, patches: int, row: int) -> Part:
    """Norm, and two linear layers on merged rows, which are as large as the patches' rows together."""
    vision, text, b = setting.model.vision, setting.model.text, setting.value_bytes
    assert vision is not None
    features = patches // vision.merge_factor * text.width * b
    norm = setting.norm_bytes(patches, vision.width)
    is_trained = "projector" in setting.trained
    merged = vision.width * vision.merge_factor
    gradient = is_trained * merged * merged * b
    return Part(
        "projector",
        setting.features_need_grad * (norm + row) + is_trained * 2 * row,
        forward=2 * features + (0 if is_trained else 3 * row),
        backward=features + 2 * row + gradient,
    )
