"""Packed attention: grouped calls against the definition, forward and backward, and what packing must not touch."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mimo_megatron.attention import packed as packing
from mimo_megatron.attention.packed import Backend, Piece, causal_attention, varlen_attention
from tests.parity_rule import assert_kernel_parity

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
RUNS = {
    "one_run": (0, 37),
    "equal_neighbours": (0, 16, 32, 48),
    "equal_apart": (0, 16, 23, 39, 40, 56, 57, 64),
    "single_rows": (0, 1, 2, 3, 4),
    "all_different": (0, 1, 3, 8, 15, 30),
    "empty_run": (0, 5, 5, 9),
}
PIECES = {
    "segments": [Piece(0, 5, 0, 5), Piece(5, 6, 5, 6), Piece(6, 40, 6, 40)],
    "equal_segments_apart": [Piece(0, 8, 0, 8), Piece(8, 12, 8, 12), Piece(12, 20, 12, 20)],
    "long_keys": [Piece(0, 4, 0, 9), Piece(4, 11, 9, 25)],
    "zigzag_of_one_segment": [Piece(0, 6, 0, 6), Piece(6, 12, 0, 24)],
    "zigzag_of_three_segments": [Piece(0, 5, 0, 5), Piece(5, 7, 5, 7), Piece(7, 11, 5, 21), Piece(11, 14, 21, 24)],
    "keys_out_of_order": [Piece(0, 3, 20, 30), Piece(3, 6, 0, 10), Piece(6, 7, 5, 6)],
    "single_rows": [Piece(0, 1, 0, 1), Piece(1, 2, 0, 7), Piece(2, 3, 7, 8)],
}


def random_qkv(num_queries: int, num_keys: int, heads: int, kv_heads: int, width: int = 8) -> list[Tensor]:
    rng = torch.Generator().manual_seed(num_queries)
    shapes = [(num_queries, heads, width), (num_keys, kv_heads, width), (num_keys, kv_heads, width)]
    return [2 * torch.randn(shape, generator=rng) for shape in shapes]


def windowed(bounds: tuple[int, ...], backend: Backend) -> Attention:
    return lambda q, k, v: varlen_attention(q, k, v, bounds, backend=backend)


def causal(pieces: Sequence[Piece], backend: Backend) -> Attention:
    return lambda q, k, v: causal_attention(q, k, v, pieces, backend=backend)


def keys_of(pieces: Sequence[Piece]) -> int:
    return max(piece.k_end for piece in pieces) + 2  # and two rows that nobody looks at


def assert_equal_in_float64(got: Attention, want: Attention, qkv: Sequence[Tensor]) -> None:
    """Output and gradients, where the order of summation is all that may differ."""
    results = []
    for attention in (got, want):
        leaves = [x.double().requires_grad_() for x in qkv]
        out = attention(*leaves)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, d_out)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bounds", RUNS.values(), ids=RUNS)
def test_runs_equal_the_definition(bounds: tuple[int, ...], kv_heads: int) -> None:
    qkv = random_qkv(bounds[-1], bounds[-1], 4, kv_heads)
    assert_equal_in_float64(windowed(bounds, "sdpa"), windowed(bounds, "reference"), qkv)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_causal_pieces_equal_the_definition(pieces: list[Piece], kv_heads: int) -> None:
    qkv = random_qkv(pieces[-1].q_end, keys_of(pieces), 4, kv_heads)
    assert_equal_in_float64(causal(pieces, "sdpa"), causal(pieces, "reference"), qkv)


def eager(pieces: Sequence[Piece], is_causal: bool) -> Attention:
    """Attention as model code writes it: products in the inputs' dtype, softmax in at least float32."""

    def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        outs = []
        for piece in pieces:
            q = q_TNH[piece.q_start : piece.q_end].transpose(0, 1)
            k, v = (x[piece.k_start : piece.k_end].transpose(0, 1).repeat_interleave(2, 0) for x in (k_TKH, v_TKH))
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            if is_causal:
                mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
                scores = scores.masked_fill(~mask, -torch.inf)
            wide = torch.promote_types(q.dtype, torch.float32)
            outs.append((scores.softmax(-1, dtype=wide).to(q.dtype) @ v).transpose(0, 1))
        return torch.cat(outs)

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_stay_within_the_tolerance_rule(dtype: torch.dtype) -> None:
    bounds, pieces = (
        (0, 64, 128, 144, 208, 221),
        [Piece(0, 60, 0, 60), Piece(60, 100, 60, 100), Piece(100, 221, 0, 190)],
    )
    runs = [Piece(start, end, start, end) for start, end in pairwise(bounds)]
    qkv = random_qkv(221, 221, 4, 2, width=32)
    assert_kernel_parity(windowed(bounds, "sdpa"), eager(runs, is_causal=False), qkv, dtype)
    assert_kernel_parity(causal(pieces, "sdpa"), eager(pieces, is_causal=True), qkv, dtype)


def test_the_definition_is_pytorch_attention_of_each_run() -> None:
    q, k, v = (x.double() for x in random_qkv(30, 30, 4, 4))
    want = [
        scaled_dot_product_attention(*(x[start:end].transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
        for start, end in pairwise((0, 11, 30))
    ]
    got = causal([Piece(0, 11, 0, 11), Piece(11, 30, 11, 30)], "reference")(q, k, v)
    torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-13)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 2**31))
def test_a_run_does_not_see_what_else_is_packed(lengths: list[int], seed: int) -> None:
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(bounds[-1], 2, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    pieces = [Piece(start, end, start, end) for start, end in pairwise(bounds)]
    for packed, alone in (
        (varlen_attention(q, k, v, bounds), lambda q, k, v: varlen_attention(q, k, v, (0, len(q)))),
        (causal_attention(q, k, v, pieces), lambda q, k, v: causal_attention(q, k, v, [Piece(0, len(q), 0, len(q))])),
    ):
        for start, end in pairwise(bounds):
            run = alone(*(x[start:end] for x in (q, k, v)))
            torch.testing.assert_close(packed[start:end], run, rtol=0, atol=1e-13)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3), st.randoms(use_true_random=False))
def test_cutting_the_queries_of_a_segment_changes_nothing(lengths: list[int], cuts: int, random) -> None:
    """What context parallelism relies on: pieces with fewer queries than keys give the rows of the whole segment."""
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    whole = [Piece(start, end, start, end) for start, end in pairwise(bounds)]
    cut = []
    for start, end in pairwise(bounds):
        edges = sorted({start, end, *(random.randint(start, end) for _ in range(cuts))})
        cut += [Piece(first, last, start, last) for first, last in pairwise(edges)]
    qkv = random_qkv(bounds[-1], bounds[-1], 4, 2)
    assert_equal_in_float64(causal(cut, "sdpa"), causal(whole, "reference"), qkv)


def test_equal_runs_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def counted(q: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        batches.append(q.shape[0])
        return scaled_dot_product_attention(q, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("mimo_megatron.attention.packed.scaled_dot_product_attention", counted)
    bounds = (0, *torch.tensor([16, 4, 16, 8] * 50).cumsum(0).tolist())
    windowed(bounds, "sdpa")(*random_qkv(bounds[-1], bounds[-1], 2, 2))
    assert sorted(batches) == [50, 50, 100]


def test_results_are_bitwise_repeatable() -> None:
    def run() -> list[Tensor]:
        leaves = [x.requires_grad_() for x in random_qkv(12, 26, 4, 2)]
        out = causal(PIECES["zigzag_of_one_segment"], "sdpa")(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def _later_start(piece: Piece) -> Piece:
    return dataclasses.replace(piece, k_start=piece.k_start + 1)


def _earlier_end(piece: Piece) -> Piece:
    return dataclasses.replace(piece, k_end=piece.k_end - 1)


@pytest.mark.parametrize("fault", [_later_start, _earlier_end])
def test_the_comparison_rejects_one_key_too_few(fault: Callable[[Piece], Piece]) -> None:
    pieces = PIECES["zigzag_of_three_segments"]
    wrong = [fault(piece) if piece == pieces[2] else piece for piece in pieces]
    qkv = random_qkv(14, 26, 4, 2)
    with pytest.raises(AssertionError):
        assert_equal_in_float64(causal(wrong, "sdpa"), causal(pieces, "reference"), qkv)
    with pytest.raises(AssertionError):
        assert_kernel_parity(causal(wrong, "sdpa"), causal(pieces, "reference"), qkv, torch.float32)


def test_layouts_that_do_not_fit_are_refused() -> None:
    q, k, v = random_qkv(10, 10, 2, 2)
    with pytest.raises(AssertionError):
        varlen_attention(q, k, v, (0, 9))
    with pytest.raises(AssertionError, match="follow one another"):
        causal_attention(q, k, v, [Piece(0, 4, 0, 4), Piece(5, 10, 5, 10)])
    with pytest.raises(AssertionError, match="a query without a key"):
        Piece(0, 5, 0, 4)


@pytest.mark.parametrize(("device", "may_plan"), [("cuda", False), ("cpu", True)])
def test_calls_on_a_gpu_are_not_cudnns_whose_plans_are_for_one_length(device: str, may_plan: bool) -> None:
    allowed = torch.backends.cuda
    assert allowed.cudnn_sdp_enabled()
    with packing.without_plans(torch.device(device)):
        assert allowed.cudnn_sdp_enabled() is may_plan
        assert allowed.flash_sdp_enabled() and allowed.mem_efficient_sdp_enabled() and allowed.math_sdp_enabled()
    assert allowed.cudnn_sdp_enabled()


def test_a_piece_behind_more_keys_is_masked_and_leaves_the_choice_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    plain = packing.without_plans
    monkeypatch.setattr(packing, "without_plans", lambda device: asked.append(device) or plain(device))
    for pieces in (PIECES["long_keys"], PIECES["segments"]):
        q, k, v = random_qkv(pieces[-1].q_end, max(one.k_end for one in pieces), 2, 1)
        causal_attention(q, k, v, pieces)
    assert asked == [torch.device("cpu")]
