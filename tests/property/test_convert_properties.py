"""Rules and files over random shapes: nothing is lost, nothing moves twice, both directions undo each other."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mimo_megatron.convert.hf_io import SafetensorsFolder, SafetensorsWriter
from mimo_megatron.convert.rules import Piece, Rule, Spec, flatten, fuse_gate_up, fuse_qkv, rename, swap_halves
from mimo_megatron.convert.storage import same_bits

SIZES = st.integers(1, 7)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def rules(draw: Callable) -> Rule:
    kind = draw(st.sampled_from(["rename", "flatten", "gate_up", "qkv", "swap"]))
    a, b, c = draw(SIZES), draw(SIZES), draw(SIZES)
    if kind == "rename":
        return rename("ours", "hf", (a, b))
    if kind == "flatten":
        return flatten("ours", "hf", (a, b, c))
    if kind == "gate_up":
        return fuse_gate_up("ours", "gate", "up", (a, b))
    if kind == "swap":
        return swap_halves("ours", "hf", (a, 2 * b))
    rest = draw(st.sampled_from([(), (c,)]))
    return fuse_qkv("ours", ["q", "k", "v"], a * b, b, draw(SIZES), rest)


def random_bits(spec: Spec, dtype: torch.dtype, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (spec.numel * dtype.itemsize,), dtype=torch.uint8, generator=draw)
    return values.view(dtype).view(spec.shape)


def undoes_itself(rule: Rule, dtype: torch.dtype) -> bool:
    ours = random_bits(rule.ours, dtype, 1)
    hf = [random_bits(spec, dtype, i) for i, spec in enumerate(rule.hf)]
    return same_bits(rule.to_ours(rule.to_hf(ours)), ours) and all(
        same_bits(back, one) for back, one in zip(rule.to_hf(rule.to_ours(hf)), hf, strict=True)
    )


@given(rules(), DTYPES)
def test_both_directions_undo_each_other_bit_for_bit(rule: Rule, dtype: torch.dtype) -> None:
    assert undoes_itself(rule, dtype)


@given(rules())
def test_pieces_cover_both_sides_exactly_once(rule: Rule) -> None:
    ours = torch.zeros(rule.ours.shape)
    hf = [torch.zeros(spec.shape) for spec in rule.hf]
    for piece in rule.pieces:
        ours.narrow(piece.dim, piece.ours_start, piece.length).add_(1)
        hf[piece.source].narrow(piece.dim, piece.hf_start, piece.length).add_(1)
    for side in (ours, *hf):
        assert bool((side == (1 if rule.pieces else 0)).all())


@given(rules(), DTYPES)
def test_writing_into_a_lent_buffer_changes_nothing(rule: Rule, dtype: torch.dtype) -> None:
    hf = [random_bits(spec, dtype, i) for i, spec in enumerate(rule.hf)]
    ours = rule.to_ours(hf)
    buffer = torch.full((rule.ours.numel,), 7.0).to(dtype)
    assert same_bits(rule.to_ours(hf, buffer.clone()), ours)
    assert all(same_bits(a, b) for a, b in zip(rule.to_hf(ours, buffer), hf, strict=True))


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1000))
def test_same_bits_sees_every_bit_at_every_alignment(numel: int, skip_a: int, skip_b: int, flipped: int) -> None:
    values = random_bits(Spec("x", (numel,)), torch.uint8, 0)

    def at(offset: int, content: torch.Tensor) -> torch.Tensor:
        room = torch.frombuffer(bytearray(len(content) + 64), dtype=torch.uint8, offset=offset)
        room[2 * offset : 2 * offset + len(content)] = content
        return room[2 * offset : 2 * offset + len(content)]

    a, b = at(skip_a, values), at(skip_b, values)
    assert same_bits(a, b)
    b[flipped % len(b)] ^= 1 << flipped % 8
    assert not same_bits(a, b)


def test_a_piece_in_the_wrong_place_is_caught() -> None:
    right = fuse_qkv("ours", ["q", "k", "v"], 4, 2, 2, (3,))
    first, *others = right.pieces
    wrong = Rule(right.ours, right.hf, (Piece(first.ours_start, 0, first.hf_start + 1, first.length), *others))
    assert undoes_itself(right, torch.float32) and not undoes_itself(wrong, torch.float32)


@given(st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=8), DTYPES, st.integers(1, 400))
def test_what_is_written_in_shards_is_what_safetensors_reads(
    shapes: list[list[int]], dtype: torch.dtype, shard_bytes: int
) -> None:
    specs = [Spec(f"tensor.{i}", tuple(shape)) for i, shape in enumerate(shapes)]
    tensors = {spec.name: random_bits(spec, dtype, i) for i, spec in enumerate(specs)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with SafetensorsWriter(folder, specs, dtype, shard_bytes) as writer:
            for spec in specs:
                writer.add(spec.name, tensors[spec.name])
        files = list(folder.glob("*.safetensors"))
        read = {key: one for path in files for key, one in load_file(path).items()}
        ours = SafetensorsFolder(folder)
        assert read.keys() == tensors.keys() == ours.tensors.keys()
        for key, tensor in tensors.items():
            assert same_bits(read[key], tensor) and same_bits(ours.read(key), tensor)
        for path in files:
            held = load_file(path)
            assert len(held) == 1 or sum(one.nbytes for one in held.values()) <= shard_bytes
