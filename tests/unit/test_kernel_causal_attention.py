"""The causal attention kernels against their definition in float64, forward and backward; faults that must be found."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from mimo_megatron.attention.packed import Piece, reference_attention
from mimo_megatron.attention.pieces import causal_pieces
from mimo_megatron.ops import turn
from mimo_megatron.parallel.zigzag import local_ranges, local_slots
from mimo_triton_kernels import causal_attention, causal_tiles
from mimo_triton_kernels.causal_attention import Plan
from mimo_triton_kernels.launching import Blocks
from tests.kernel_cases import DEVICE, DTYPES, ON_GPU, uninitialised_memory_is_nan, with_fault
from tests.parity_rule import assert_kernel_parity

Pieces = tuple[tuple[int, int, int, int], ...]
Attention = Callable[..., Tensor]


def segments(*lengths: int) -> Pieces:
    edges = (0, *torch.tensor(lengths).cumsum(0).tolist())
    return tuple((start, end, start, end) for start, end in pairwise(edges))


def tuples(pieces: Sequence[Piece]) -> Pieces:
    return tuple((piece.q_start, piece.q_end, piece.k_start, piece.k_end) for piece in pieces)


SECOND_OF_TWO_RANKS = tuples(causal_pieces((0, 5, 60, 64), local_ranges(64, 1, 2)))
# Pieces, query heads, key heads, head width. Two keys more than the pieces reach are there, which nobody reads.
CASES = {
    "63_after_1": (segments(1, 63), 2, 1, 16),
    "64": (segments(64), 1, 1, 128),
    "65": (segments(65), 2, 2, 32),
    "short_ones_share_tiles": (segments(1, 40, 0, 2, 30), 4, 1, 16),
    "long_beside_short": (segments(20, 130, 3), 1, 1, 64),
    "one_rank_of_two": (SECOND_OF_TWO_RANKS, 2, 1, 32),
    "keys_out_of_order": (((0, 3, 60, 70), (3, 3, 9, 9), (3, 40, 0, 50), (40, 41, 5, 61)), 2, 2, 32),
}
SMALL = Plan(*(Blocks(rows, 16, num_warps=4, num_stages=2) for rows in (32, 16, 32)))


def angles_of(num_rows: int, width: int) -> Tensor:
    return 3 * torch.randn(num_rows, width // 2, generator=torch.Generator().manual_seed(num_rows)).to(DEVICE)


def packed(attention: Attention, pieces: Pieces, width: int) -> Attention:
    """A function of q, k and v, so that the tolerance rule judges each gradient by itself."""
    angles = angles_of(pieces[-1][1], width)

    def of_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = angles.to(torch.promote_types(q.dtype, torch.float32))
        return attention(q, k, v, wide.cos(), wide.sin(), pieces)

    return of_parts


def draw(pieces: Pieces, heads: int, key_heads: int, width: int) -> list[Tensor]:
    num_queries, num_keys = pieces[-1][1], max(piece[3] for piece in pieces) + 2
    generator = torch.Generator().manual_seed(num_queries)
    shapes = [(num_queries, heads, width), (num_keys, key_heads, width), (num_keys, key_heads, width)]
    return [1.5 * torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def assert_parity(
    module: ModuleType, dtype: torch.dtype, pieces: Pieces, heads: int, key_heads: int, width: int
) -> None:
    reference = packed(causal_attention.causal_attention_reference, pieces, width)
    with uninitialised_memory_is_nan():
        kernel = packed(module.causal_attention, pieces, width)
        assert_kernel_parity(kernel, reference, draw(pieces, heads, key_heads, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_equal_the_definition(case: tuple, dtype: torch.dtype) -> None:
    assert_parity(causal_attention, dtype, *case)


@pytest.mark.skipif(ON_GPU, reason="a GPU runs the kernels of its own generation")
@pytest.mark.parametrize("capability", [80, 100])
def test_other_generations_sizes_give_the_same(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "capability", lambda device: capability)
    assert_parity(causal_attention, torch.float16, segments(70), 1, 1, 32)


@pytest.mark.skipif(ON_GPU, reason="a GPU has these sizes in float32 anyway")
def test_the_sizes_that_gpus_take_in_float32_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, for its time, takes larger tiles otherwise."""
    monkeypatch.setattr(causal_attention, "interprets", lambda: False)
    assert_parity(causal_attention, torch.float32, segments(20, 37), 2, 1, 32)


def test_the_definition_is_what_the_model_computes() -> None:
    pieces, *sizes = CASES["one_rank_of_two"]
    q, k, v = (x.double() for x in draw(pieces, *sizes))
    angles = angles_of(len(q), sizes[-1]).double()
    turned = turn(q, angles.cos()[:, None], angles.sin()[:, None])
    model = reference_attention(turned, k, v, [Piece(*piece) for piece in pieces], causal=True)
    ours = causal_attention.causal_attention_reference(q, k, v, angles.cos(), angles.sin(), pieces)
    torch.testing.assert_close(ours, model, rtol=0, atol=1e-12)


def gradients(pieces: Pieces, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = causal_attention.causal_attention(*leaves, cos, sin, pieces)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def test_two_context_parallel_ranks_give_what_one_process_gives() -> None:
    bounds, num_slots = (0, 5, 60, 64), 64
    q, k, v, d_out = (torch.randn(num_slots, heads, 32, device=DEVICE) for heads in (2, 1, 1, 2))
    angles = angles_of(num_slots, 32)
    out, d_q, d_k, d_v = gradients(segments(5, 55, 4), angles.cos(), angles.sin(), q, k, v, d_out)
    sums = [torch.zeros_like(k), torch.zeros_like(v)]
    for rank in range(2):
        pieces = tuples(causal_pieces(bounds, local_ranges(num_slots, rank, 2)))
        own = local_slots(num_slots, rank, 2).to(DEVICE)
        cos, sin = angles[own].cos(), angles[own].sin()
        local_out, local_d_q, *of_keys = gradients(pieces, cos, sin, q[own], k, v, d_out[own])
        torch.testing.assert_close(local_out, out[own], rtol=0, atol=3e-6)
        torch.testing.assert_close(local_d_q, d_q[own], rtol=0, atol=3e-6)
        sums = [total + of_rank for total, of_rank in zip(sums, of_keys, strict=True)]
    for total, whole in zip(sums, (d_k, d_v), strict=True):
        torch.testing.assert_close(total, whole, rtol=0, atol=1e-5)


def test_keys_that_no_query_sees_have_gradients_of_zero_and_rows_may_be_strided() -> None:
    pieces, angles = ((0, 4, 10, 20),), angles_of(4, 16)
    wider = torch.randn(40, 5, 2, 16, device=DEVICE)
    q, k, v = wider[:4, 0], wider[:, 2], wider[:, 3]
    d_out = torch.randn(4, 2, 16, device=DEVICE)
    leaf = [x.detach().requires_grad_() for x in (q, k, v)]
    assert leaf[1].stride(0) == 5 * 2 * 16
    with uninitialised_memory_is_nan():
        out = causal_attention.causal_attention(*leaf, angles.cos(), angles.sin(), pieces)
        got = [out, *torch.autograd.grad(out, leaf, d_out)]
        want = gradients(pieces, angles.cos(), angles.sin(), *(x.contiguous() for x in (q, k, v)), d_out)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    for d in got[2:]:
        assert not d[:10].any() and not d[20:].any() and d[10:20].any()


def test_a_pack_without_queries_has_gradients_of_zero() -> None:
    q, k, v = (torch.empty(rows, 2, 16, device=DEVICE).requires_grad_() for rows in (0, 3, 3))
    out = causal_attention.causal_attention(q, k, v, angles_of(0, 16), angles_of(0, 16), ((0, 0, 1, 1),))
    d_q, d_k, d_v = torch.autograd.grad(out.sum(), [q, k, v])
    assert out.shape == d_q.shape == (0, 2, 16) and torch.equal(d_k, torch.zeros(3, 2, 16, device=DEVICE))
    assert torch.equal(d_v, torch.zeros(3, 2, 16, device=DEVICE))


# A segment, then one that begins before the queries do, with a block before the diagonal; small tiles, so that few
# rows are several tiles.
FAULTY_CASE = (((0, 10, 0, 10), (10, 24, 0, 40)), 2, 1, 16)
FAULTS = {
    "mask_off_by_one": ("key_L[None, :] < high_R[:, None]", "key_L[None, :] <= high_R[:, None]"),
    "mask_of_the_queries": ("key_R[:, None] < high_L[None, :]", "key_R[:, None] <= high_L[None, :]"),
    "blocks_before_the_diagonal_left_out": (
        "key_start, key_middle, scale, max_R",
        "key_middle, key_middle, scale, max_R",
    ),
    "no_shrinking_of_earlier_keys": ("out * shrink_R[:, None]", "out"),
    "queries_not_turned": (
        "load_turned(q_ptr + head * H, row_R, keep_R, q_stride, cos_ptr, sin_ptr, H)",
        "load_rows(q_ptr + head * H, row_R, keep_R, q_stride, H)",
    ),
    "gradient_not_turned_back": (
        "store_turned_back(d_q_ptr + head * H, row_R, keep_R, N * H, cos_ptr, sin_ptr, d_q, H)",
        "store_rows(d_q_ptr + head * H, row_R, keep_R, N * H, d_q, H)",
    ),
    "scale_in_the_backward": ("* (scale * LN_2)", "* scale"),
    "statistics_of_another_head": ("statistics = head.to(tl.int64) * num_rows\n", "statistics = 0 * num_rows\n"),
    "a_query_head_of_the_group_left_out": ("in range(G)", "in range(1, G)"),
    "only_the_first_piece_of_a_key": ("range(first_span, end_span)", "range(first_span, first_span + 1)"),
}


def test_without_a_fault_the_case_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "HOPPER", SMALL)
    assert_parity(causal_attention, torch.float32, *FAULTY_CASE)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_in_a_kernel_is_found(fault: tuple[str, str], tmp_path: Path) -> None:
    module = with_fault(causal_attention, *fault, tmp_path)
    module.HOPPER = SMALL
    with pytest.raises(AssertionError, match="exceeds"):
        assert_parity(module, torch.float32, *FAULTY_CASE)


def test_a_wrong_key_head_of_a_group_is_found(tmp_path: Path) -> None:
    module = with_fault(causal_attention, "head // G * H", "head % (N // G) * H", tmp_path)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_parity(module, torch.float32, segments(3), 4, 2, 16)


TILE_FAULTS = {
    "aligned_to_the_top_left": ("query_tiling", "k_end_Q - q_end_Q", "k_start_Q - q_start_Q"),
    "no_mask_where_one_query_sees_less": (
        "query_tiling",
        "row + 1 + k_end - q_end - k_start",
        "row_end + k_end - q_end",
    ),
    "no_mask_where_one_key_is_not_seen": ("key_tiling", "max(start, key_end - 1 - shift)", "start"),
}


@pytest.mark.parametrize(("which", "right", "wrong"), TILE_FAULTS.values(), ids=TILE_FAULTS)
def test_a_planted_fault_in_the_tiles_is_found(
    which: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_attention, "HOPPER", SMALL)
    monkeypatch.setattr(causal_attention, which, getattr(with_fault(causal_tiles, right, wrong, tmp_path), which))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_parity(causal_attention, torch.float32, *FAULTY_CASE)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits() -> None:
    pieces = tuples(causal_pieces((0, 3000, 3064, 4096), local_ranges(4096, 1, 2)))
    q, k, v = (x.to(torch.bfloat16) for x in draw(pieces, 32, 8, 128))
    angles = angles_of(len(q), 128)
    results = [gradients(pieces, angles.cos(), angles.sin(), q, k, v, torch.ones_like(q)) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def refused(**changes: object) -> str:
    angles, keys = angles_of(8, 32), torch.zeros(9, 2, 32, device=DEVICE)
    inputs = dict(q_TNH=torch.zeros(8, 4, 32, device=DEVICE), k_SKH=keys, v_SKH=keys, cos_TE=angles, sin_TE=angles)
    with pytest.raises(ValueError, match="causal_attention: ") as error:
        causal_attention.causal_attention(**{**inputs, "pieces": ((0, 8, 1, 9),), **changes})
    return str(error.value)


def test_what_the_kernels_do_not_compute_is_refused_by_name() -> None:
    assert "H one of 16, 32, 64, 128, got (8, 4, 80)" in refused(q_TNH=torch.zeros(8, 4, 80))
    assert "[S, K, 32], K divides 4, got k (9, 3, 32)" in refused(
        k_SKH=torch.zeros(9, 3, 32), v_SKH=torch.zeros(9, 3, 32)
    )
    assert "and v (8, 2, 32)" in refused(v_SKH=torch.zeros(8, 2, 32))
    assert "alike, got torch.float16, torch.float32" in refused(q_TNH=torch.zeros(8, 4, 32, dtype=torch.float16))
    wide = torch.zeros(9, 2, 32, dtype=torch.float64)
    assert "got torch.float64" in refused(q_TNH=torch.zeros(8, 4, 32, dtype=torch.float64), k_SKH=wide, v_SKH=wide)
    assert "cos is [8, 16] of float32, got (8, 32)" in refused(cos_TE=torch.zeros(8, 32))
    assert "of torch.float64" in refused(sin_TE=torch.zeros(8, 16, dtype=torch.float64))
    assert "(5, 8, 0, 8) comes after 4" in refused(pieces=((0, 4, 0, 4), (5, 8, 0, 8)))
    assert "keys lie in 0..9" in refused(pieces=((0, 8, 0, 10),))
    assert "as many as queries at least: (0, 8, 2, 9)" in refused(pieces=((0, 8, 2, 9),))
    assert "pieces end at query 5 of 8" in refused(pieces=((0, 5, 0, 5),))


@pytest.mark.skipif(ON_GPU, reason="kernels run on the GPU here, not in the interpreter")
def test_bfloat16_in_the_interpreter_and_a_cpu_without_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys = torch.zeros(8, 4, 32, dtype=torch.bfloat16), torch.zeros(9, 2, 32, dtype=torch.bfloat16)
    assert "interpreter computes bfloat16 wrongly" in refused(q_TNH=q, k_SKH=keys, v_SKH=keys)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "need a CUDA device" in refused()
