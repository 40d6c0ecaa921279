"""Bytes that the forward of one microbatch keeps for its backward, part by part, as our code keeps them.

A stage is a row of ``Part``s in the order of its forward. While a part runs, everything saved before it is alive, and
the part's own ``forward`` bytes above what it saves; in the backward, everything saved up to it and its ``backward``
bytes. Each formula names the tensors; docs/planner.md has the table, tests/distributed/test_memory_model.py the proof.

Letters as in docs/shapes.md; ``t`` slots on this cp rank, ``s`` slots on this rank (t / tp under sequence parallelism),
``b`` bytes of a value in the weights' dtype. Statistics and softmax are kept in 4 bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mimo_megatron.config.model import ModelConfig, VisionConfig
from mimo_megatron.config.run import ModuleName, Offload, ParallelConfig, RunConfig
from mimo_megatron.config.vision_flops import frame_flops
from mimo_megatron.parallel.spread_reference import loads, spread_reference
from mimo_megatron.planner.packs import Grid, PackShape, text_attention, vision_attention

Device = Literal["cpu", "cuda"]
WIDE = 4


@dataclass(frozen=True)
class Part:
    name: str
    saved: int
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Setting:
    """What, beside the pack, decides how much is kept."""

    model: ModelConfig
    layout: ParallelConfig
    trained: frozenset[ModuleName]
    recompute: str
    recompute_vision: bool
    value_bytes: int
    device: Device = "cuda"
    head_logits: int | None = None
    """Most that exist at a time; None for all."""
    offload: Offload = "none"

    @classmethod
    def of(cls, config: RunConfig, device: Device = "cuda") -> "Setting":
        names: tuple[ModuleName, ...] = ("vision", "projector", "text")
        return cls(
            config.model,
            config.parallel,
            frozenset(name for name in names if not config.train.module(name).is_frozen),
            config.train.recompute,
            config.train.recomputes_vision,
            4 if config.train.precision == "fp32" else 2,
            device,
            config.train.head_logits if config.train.head_loss != "logits" else None,
            config.train.offload_activations,
        )

    @property
    def features_need_grad(self) -> bool:
        return bool(self.trained & {"vision", "projector"})

    def local_slots(self, pack: PackShape) -> int:
        return pack.num_slots // self.layout.cp

    def stream_slots(self, pack: PackShape) -> int:
        """s: slots between layers on this rank."""
        return self.local_slots(pack) // (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def shares_vision(self) -> bool:
        """Whether the tp and cp ranks of the first stage share out the images of a microbatch."""
        return self.layout.vision_placement == "balanced" and self.layout.tp * self.layout.cp > 1

    def vision_share(self, pack: PackShape) -> float:
        """The part of the pack's vision work that the most loaded rank of the first stage does: at least one image."""
        vision = self.model.vision
        if vision is None or not self.shares_vision or not pack.grids:
            return 1.0
        return _largest_share(vision, self.model.text.width, pack.grids, self.layout.tp * self.layout.cp)


@lru_cache(maxsize=64)
def _largest_share(vision: VisionConfig, text_width: int, grids: tuple[Grid, ...], num_ranks: int) -> float:
    costs = [frame_flops(vision, text_width, height, width) for frames, height, width in grids for _ in range(frames)]
    return max(loads(costs, spread_reference(costs, num_ranks), num_ranks)) / sum(costs)


def stage_parts(setting: Setting, stage: int, pack: PackShape, cp_rank: int = 0) -> list[Part]:
    """The parts of one stage, in the order of its forward."""
    num_layers = setting.layout.layers_of_stages(setting.model.text.num_layers)[stage]
    is_first, is_last = stage == 0, stage == setting.layout.num_stages - 1
    parts = (
        [*_vision_parts(setting, pack), _embedding(setting, pack)] if is_first else [_received(setting, pack, stage)]
    )
    for _ in range(num_layers):
        parts += _text_layer(setting, pack, cp_rank)
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
    """The input of an inner stage, kept until its gradient has been sent; recomputation keeps it anyway."""
    num_layers = setting.layout.layers_of_stages(setting.model.text.num_layers)[stage]
    is_kept_by_layer = setting.recompute == "full" and num_layers > 0
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


def _text_layer(setting: Setting, pack: PackShape, cp_rank: int) -> Iterator[Part]:
    plain = _plain_layer(setting, pack, cp_rank)
    hidden = _hidden(setting, pack)
    if setting.recompute == "full":
        # Only the layer's input, which the part before made; the whole layer is made again for its backward.
        saved = sum(part.saved for part in plain)
        worst = max(plain[0].saved + plain[0].forward, saved + plain[1].forward)
        again = max(saved + plain[1].backward, plain[0].saved + plain[0].backward)
        yield Part("layer", hidden, forward=worst, backward=again + hidden)
    elif setting.recompute == "selective":
        yield from _selective_layer(setting, pack, cp_rank)
    else:
        yield from plain


def _norm(setting: Setting, pack: PackShape, *, feeds_trained_linear: bool) -> int:
    """The normed rows and the inverse root mean squares in 4 bytes; the linear layer behind keeps its own input."""
    s, width = setting.stream_slots(pack), setting.model.text.width
    return s * (width * WIDE + WIDE) + feeds_trained_linear * s * width * setting.value_bytes


def _attention_rows(setting: Setting, pack: PackShape, cp_rank: int) -> tuple[int, int, int]:
    """Bytes of (the fused qkv, all query heads, all key heads) on this rank."""
    text, b, tp, t = setting.model.text, setting.value_bytes, setting.layout.tp, setting.local_slots(pack)
    queries = t * text.num_heads * text.head_width // tp * b
    keys = t * text.num_kv_heads * text.head_width // tp * b
    return queries + 2 * keys, queries, keys


def _core_attention(setting: Setting, pack: PackShape, cp_rank: int) -> int:
    """What core attention keeps for its own backward, without the fused qkv: q, k, v, out, log-sums, masks."""
    text, b, tp, t = setting.model.text, setting.value_bytes, setting.layout.tp, setting.local_slots(pack)
    _, queries, keys = _attention_rows(setting, pack, cp_rank)
    shape = text_attention(pack.runs, setting.layout.cp, cp_rank)
    kept = 2 * queries + WIDE * t * text.num_heads // tp + shape.mask_cells * b
    if shape.keys_copied:
        return kept + 2 * shape.num_keys * text.num_kv_heads * text.head_width // tp * b
    return kept + (2 * keys * setting.layout.cp if setting.layout.cp > 1 else keys)


def _keeps_qkv(setting: Setting, pack: PackShape, cp_rank: int) -> bool:
    """Attention's v is a view of the fused qkv, which lives on with it, unless v was gathered or copied."""
    return setting.layout.cp == 1 and not text_attention(pack.runs, 1, cp_rank).keys_copied


def _joined_outputs(setting: Setting, pack: PackShape, cp_rank: int) -> int:
    """The output projection's input, where it is not the very output that attention keeps."""
    shape = text_attention(pack.runs, setting.layout.cp, cp_rank)
    is_other = shape.num_groups > 1 or shape.queries_copied
    return _attention_rows(setting, pack, cp_rank)[1] if is_other and "text" in setting.trained else 0


def _mlp_rows(setting: Setting, pack: PackShape) -> tuple[int, int]:
    """Bytes of one F-wide tensor on this rank, and how many of them the MLP keeps."""
    inner = setting.local_slots(pack) * setting.model.text.ffn_width // setting.layout.tp * setting.value_bytes
    return inner, 2 + (setting.device == "cpu") + ("text" in setting.trained)


def _weight_gradient(setting: Setting, numbers: int) -> int:
    return numbers * setting.value_bytes if "text" in setting.trained else 0


def _plain_layer(setting: Setting, pack: PackShape, cp_rank: int) -> tuple[Part, Part]:
    is_trained = "text" in setting.trained
    text, tp = setting.model.text, setting.layout.tp
    hidden, whole = _hidden(setting, pack), setting.local_slots(pack) * text.width * setting.value_bytes
    qkv, queries, _ = _attention_rows(setting, pack, cp_rank)
    inner, kept = _mlp_rows(setting, pack)
    norm = _norm(setting, pack, feeds_trained_linear=is_trained)
    wide = hidden // setting.value_bytes * WIDE
    attention = Part(
        "attention",
        norm
        + _core_attention(setting, pack, cp_rank)
        + _joined_outputs(setting, pack, cp_rank)
        + _keeps_qkv(setting, pack, cp_rank) * qkv,
        forward=2 * hidden + whole,
        backward=2 * hidden
        + max(queries + 2 * qkv, whole + 2 * wide + qkv)
        + _weight_gradient(setting, (qkv // setting.value_bytes // setting.local_slots(pack)) * text.width),
    )
    mlp = Part(
        "mlp",
        norm + kept * inner,
        forward=2 * hidden + whole,
        backward=hidden
        + max((4 - is_trained) * inner, inner + _weight_gradient(setting, 2 * text.ffn_width // tp * text.width)),
    )
    return attention, mlp


def _selective_layer(setting: Setting, pack: PackShape, cp_rank: int) -> Iterator[Part]:
    """Keeps the inputs of core attention (q, and k and v in the fused qkv) and of the MLP; makes the rest again."""
    attention, mlp = _plain_layer(setting, pack, cp_rank)
    qkv, queries, _ = _attention_rows(setting, pack, cp_rank)
    is_trained = "text" in setting.trained
    hidden = _hidden(setting, pack)
    norm = _norm(setting, pack, feeds_trained_linear=is_trained)
    core = _core_attention(setting, pack, cp_rank) + _joined_outputs(setting, pack, cp_rank)
    out = queries if is_trained else 0
    yield Part(
        "attention",
        norm + qkv + queries + out,
        forward=attention.forward + core,
        backward=attention.backward + core,
    )
    whole_norm = _norm(setting, pack, feeds_trained_linear=True)
    again = mlp.saved - norm
    yield Part("mlp", whole_norm, forward=mlp.forward + again, backward=mlp.backward + again + hidden)


def _prediction_layers(setting: Setting, pack: PackShape, cp_rank: int) -> Iterator[Part]:
    """Two norms, the joining matrix over both side by side, a decoder layer, a norm."""
    hidden, is_trained = _hidden(setting, pack), "text" in setting.trained
    norm = _norm(setting, pack, feeds_trained_linear=False)
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
    return Part("norm", _norm(setting, pack, feeds_trained_linear=False), forward=2 * hidden, backward=4 * hidden)


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
    shape = vision_attention(vision, pack.grids, is_full)
    norm = patches * (vision.width * (WIDE + b) + WIDE)
    # q, k, v and out; v in place is a view of the fused qkv, three rows. Joined or reordered outputs are a copy.
    attended = 4 + 2 * (not shape.keys_copied) + (shape.num_groups > 1 or shape.queries_copied)
    weights = (vision.ffn_width * vision.width) * b
    attention = Part(
        "vision attention",
        norm + attended * row + patches * vision.num_heads * WIDE,
        forward=2 * row,
        backward=8 * row,
    )
    mlp = Part("vision mlp", norm + 4 * inner, forward=2 * row, backward=row + inner + max(inner, weights))
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
    norm = patches * (vision.width + 1) * WIDE
    is_trained = "projector" in setting.trained
    merged = vision.width * vision.merge_factor
    gradient = is_trained * merged * merged * b
    return Part(
        "projector",
        setting.features_need_grad * (norm + row) + is_trained * 2 * row,
        forward=2 * features + (0 if is_trained else 3 * row),
        backward=features + 2 * row + gradient,
    )
