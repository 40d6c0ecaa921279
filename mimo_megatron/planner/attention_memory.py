"""Bytes of attention, by what computes it: what it keeps for its own backward, and what that takes beside.

``sdpa`` is called once for each length of piece, over copies where equal ones are not neighbours. ``triton`` reads the
product of the encoder's linear layer in place and turns queries itself; ``varlen`` and ``flash`` take q, k and v
contiguous, keys and values gathered piece after piece where context-parallel ranks share them.
Log-sums are kept in 4 bytes by all. What is kept is counted in tests/unit/test_planner_attention.py; whole steps, of
sdpa and triton, in tests/distributed/test_memory_model.py. varlen and flash run on GPUs alone: what their backward
takes inside, where no counter of tensors sees it, is by mha_varlen_bwd of flash_api.cpp, in torch and in flash-attn 2.
The latter's, with the same bits every time, has several sums where segments times heads are fewer than the GPU's
multiprocessors; flash-attn 3 and 4 have one.
"""

from dataclasses import dataclass

from mimo_megatron.planner.packs import AttentionShape, PackShape, text_attention, vision_attention
from mimo_megatron.planner.setting import WIDE, Attention, Setting

_FLASH_ROWS = 128
"""By which flash's sums of a segment's query gradients are longer than the segment."""
_FLASH_WIDTH = 32
"""To a multiple of which it pads heads."""
_MULTIPROCESSORS = 148
"""A B200's; an H100 has 132."""


@dataclass(frozen=True)
class AttentionBytes:
    kept: int
    """Without the fused qkv and the output projection's input."""
    keeps_qkv: bool
    """Whether the fused qkv lives on, since v is a view of it."""
    has_other_output: bool
    """Whether the output projection gets another tensor than the one attention keeps."""
    backward: int
    """At most, with the gradients of output, q, k, v and the fused qkv."""


def of_text(setting: Setting, pack: PackShape, cp_rank: int) -> AttentionBytes:
    """Of one decoder layer on one rank."""
    text, tp, cp, t = setting.model.text, setting.layout.tp, setting.layout.cp, setting.local_slots(pack)
    qkv, queries, keys = text_rows(setting, pack)
    log_sums = WIDE * t * text.num_heads // tp
    plain = queries + 2 * qkv
    if setting.text_attention == "triton":
        # The kernel copies rows whose heads are not neighbours, as megatron's are unless all are of one group: queries
        # are then a part of the fused qkv. Gathered keys and values are in place.
        is_one_group = text.num_kv_heads // tp == 1
        kept = queries * (2 - is_one_group) + 2 * keys * cp + log_sums
        return AttentionBytes(kept, is_one_group, False, max(plain, 2 * queries + qkv + log_sums))
    shape = text_attention(pack.runs, cp, cp_rank)
    if setting.text_attention in ("varlen", "flash"):
        gathered = 2 * shape.num_keys * keys // t
        inside = _flash_bytes(setting.text_attention, t, shape.num_pieces, text.num_heads // tp, text.head_width)
        if text.num_kv_heads != text.num_heads:
            inside += gathered * text.num_heads // text.num_kv_heads  # their gradients, of every query head
        if cp > 1:
            inside += gathered + 2 * keys * cp  # before they are added up, and after
        return AttentionBytes(2 * queries + gathered + log_sums, False, False, max(plain, queries + qkv + inside))
    kept = 2 * queries + log_sums + shape.mask_cells * setting.value_bytes
    if shape.keys_copied:
        kept += 2 * shape.num_keys * keys // t
    else:
        kept += 2 * keys * cp if cp > 1 else keys
    return AttentionBytes(kept, cp == 1 and not shape.keys_copied, _has_other_output(shape), plain)


def text_rows(setting: Setting, pack: PackShape) -> tuple[int, int, int]:
    """Bytes of (the fused qkv, all query heads, all key heads) on this rank."""
    text, b, tp, t = setting.model.text, setting.value_bytes, setting.layout.tp, setting.local_slots(pack)
    queries = t * text.num_heads * text.head_width // tp * b
    keys = t * text.num_kv_heads * text.head_width // tp * b
    return queries + 2 * keys, queries, keys


def of_vision(setting: Setting, pack: PackShape, patches: int, *, is_full: bool) -> tuple[int, int]:
    """(kept, needed by the backward) of one layer's attention over ``patches``, the fused qkv and the projection's
    input among them."""
    vision = setting.model.vision
    assert vision is not None
    row, log_sums = patches * vision.width * setting.value_bytes, patches * vision.num_heads * WIDE
    shape = vision_attention(vision, pack.grids, is_full)
    if setting.vision_attention == "triton":
        # The fused qkv and out; no log-sums of windows from Hopper on, which is left out. Backward: the stream's and
        # the output's gradient, one of q and k turned again, and the gradient of the fused qkv.
        return 4 * row + log_sums, 6 * row + log_sums
    if setting.vision_attention in ("varlen", "flash"):
        num_runs = round(shape.num_pieces * patches / pack.num_patches)
        inside = _flash_bytes(setting.vision_attention, patches, num_runs, vision.num_heads, vision.head_width)
        return 4 * row + log_sums, max(8 * row, 5 * row + inside)
    # q, k, v and out; v in place is a view of the fused qkv, three rows. Joined or reordered outputs are a copy.
    attended = 4 + 2 * (not shape.keys_copied) + _has_other_output(shape)
    return attended * row + log_sums, 8 * row


def _has_other_output(shape: AttentionShape) -> bool:
    return shape.num_groups > 1 or shape.queries_copied


def _flash_bytes(backend: Attention, rows: int, num_segments: int, num_heads: int, head_width: int) -> int:
    """Sums of query gradients, and one number a row, in 4 bytes."""
    padded = -(-head_width // _FLASH_WIDTH) * _FLASH_WIDTH
    num_sums = 1 if backend == "varlen" else -(-_MULTIPROCESSORS // max(1, num_segments * num_heads))
    return (rows + _FLASH_ROWS * num_segments) * num_heads * (num_sums * padded + 1) * WIDE
