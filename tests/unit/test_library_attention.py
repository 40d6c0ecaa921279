"""Attention by libraries' varlen kernels: what they are given, which is taken, which is passed over and why."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_megatron.attention import libraries, varlen
from mimo_megatron.attention.libraries import FLASH_ATTN, Unavailable, find, hindrance, load
from mimo_megatron.attention.packed import Backend, Piece, causal_attention, varlen_attention
from mimo_megatron.attention.reference import reference_attention
from mimo_megatron.attention.rows import Rows
from mimo_megatron.attention.varlen import Attend, causal_by, varlen_by
from tests.library_cases import NAMES, Kernel, at_the_top_left, attend_of, by, by_definition, put

PIECES = {
    "whole_segments": [Piece(0, 5, 0, 5), Piece(5, 6, 5, 6), Piece(6, 40, 6, 40)],
    "two_chunks_of_one_sample": [Piece(0, 6, 0, 6), Piece(6, 12, 0, 24)],
    "chunks_of_three_samples": [Piece(0, 5, 0, 5), Piece(5, 7, 5, 7), Piece(7, 11, 5, 21), Piece(11, 14, 21, 24)],
    "keys_out_of_order": [Piece(0, 3, 20, 30), Piece(3, 6, 0, 10), Piece(6, 7, 5, 6)],
    "one_query_each": [Piece(0, 1, 0, 1), Piece(1, 2, 0, 7), Piece(2, 3, 7, 8)],
    "pieces_without_queries": [Piece(0, 0, 0, 9), Piece(0, 4, 3, 9), Piece(4, 4, 9, 9), Piece(4, 6, 9, 12)],
}
SHARED = PIECES["chunks_of_three_samples"]


def qkv_of(pieces: list[Piece], kv_heads: int = 2) -> list[Tensor]:
    """With two rows of keys that nobody looks at."""
    draw = torch.Generator().manual_seed(1)
    num_queries, num_keys = pieces[-1].q_end, max(piece.k_end for piece in pieces) + 2
    shapes = [(num_queries, 4, 8), (num_keys, kv_heads, 8), (num_keys, kv_heads, 8)]
    return [2 * torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def results(attend: Callable[..., Tensor], qkv: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def assert_same(got: Callable[..., Tensor], want: Callable[..., Tensor], qkv: list[Tensor]) -> None:
    for one, other in zip(results(got, qkv), results(want, qkv), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def by_sdpa(pieces: list[Piece]) -> Callable[..., Tensor]:
    return lambda q, k, v: causal_attention(q, k, v, pieces, backend="sdpa")


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("name", NAMES)
def test_causal_pieces_equal_sdpas(
    name: str, pieces: list[Piece], kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = attend_of(name, by_definition, monkeypatch)
    assert_same(lambda q, k, v: causal_by(attend, q, k, v, pieces), by_sdpa(pieces), qkv_of(pieces, kv_heads))


@pytest.mark.parametrize("name", NAMES)
def test_whole_segments_of_every_length_equal_sdpas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values as parts of one product, as the encoder has them; one segment is empty."""
    attend, bounds = attend_of(name, by_definition, monkeypatch), (0, 5, 5, 6, 19)
    wide = torch.randn(19, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def by_library(qkv_T3NH: Tensor) -> Tensor:
        return varlen_by(attend, *qkv_T3NH.unbind(1), bounds)

    assert_same(by_library, lambda qkv_T3NH: varlen_attention(*qkv_T3NH.unbind(1), bounds), [wide])


@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_a_pack_without_rows_asks_no_library(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    with by(lambda *_: pytest.fail("asked"), monkeypatch):
        q, k, v = (torch.zeros(0, heads, 8) for heads in (4, 2, 2))
        assert varlen_attention(q, k, v, (0,), backend=backend).shape == q.shape
        assert causal_attention(q, k, v, [], backend=backend).shape == q.shape
        with pytest.raises(AssertionError):
            causal_attention(torch.zeros(3, 4, 8), k, v, [], backend=backend)


def test_flash_attn_is_asked_for_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES[2:]:
        asked: list[bool] = []
        attend = attend_of(name, by_definition, monkeypatch, asked)
        causal_by(attend, *qkv_of(SHARED), SHARED)
        assert asked == [True]


# ---- faults ----------------------------------------------------------------------------------------------------------


def assert_found(attend: Attend) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(lambda q, k, v: causal_by(attend, q, k, v, SHARED), by_sdpa(SHARED), qkv_of(SHARED))


def test_a_mask_at_the_top_left_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(attend_of("flash-attn 2", at_the_top_left, monkeypatch))


def test_keys_that_are_not_gathered_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as the pieces ask for, but the first ones there are."""

    def not_gathered(x: Tensor, rows: Rows) -> Tensor:
        assert rows.index is not None
        return torch.cat((x, x))[: len(rows.index)]

    monkeypatch.setattr(varlen, "take", not_gathered)
    assert_found(attend_of("flash-attn 2", by_definition, monkeypatch))


def test_a_missing_range_of_keys_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the gradient alone: what two pieces share is added once."""
    plain = varlen.rows_of

    def without_the_first(*args: Any) -> Rows:
        rows = plain(*args)
        return dataclasses.replace(rows, ranges=((0, 0), *rows.ranges[1:]))

    varlen._pieces.cache_clear()
    monkeypatch.setattr(varlen, "rows_of", without_the_first)
    assert_found(attend_of("flash-attn 2", by_definition, monkeypatch))
    varlen._pieces.cache_clear()


# ---- which library ---------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As far as which library is concerned; nothing is installed."""
    on_a(9, monkeypatch)
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    find.cache_clear()
    yield monkeypatch
    find.cache_clear()


def on_a(major: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(libraries, "find_gpu", lambda: (torch.device("cpu"), major))


def install(patch: pytest.MonkeyPatch, *versions: tuple[str, str], kernel: Kernel = by_definition) -> None:
    """Of (library, version)."""
    patch.delitem(sys.modules, "flash_attn")
    distributions = {one.name: one.distribution for one in FLASH_ATTN}
    found = {distributions[name]: version for name, version in versions}
    patch.setattr(libraries, "_version", found.get)
    for name, _ in versions:
        put(name, kernel, patch, [])


ALL = (("flash-attn 2", "2.8.3"), ("flash-attn 3", "3.0.0"), ("flash-attn 4", "4.0.0b27"))


@pytest.mark.parametrize(
    ("major", "name"),
    [
        (8, "flash-attn 2 (2.8.3)"),
        (9, "flash-attn 4 (4.0.0b27)"),
        (10, "flash-attn 4 (4.0.0b27)"),
        (12, "flash-attn 2 (2.8.3)"),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_the_newest_that_runs_on_the_device_is_taken(
    major: int, name: str, causal: bool, on_a_hopper: pytest.MonkeyPatch
) -> None:
    install(on_a_hopper, *ALL)
    on_a(major, on_a_hopper)
    assert find("flash", 128, causal).name == name and hindrance("flash", 128, causal) is None


def test_what_is_passed_over_is_told(on_a_hopper: pytest.MonkeyPatch) -> None:
    install(on_a_hopper, *ALL)
    on_a(8, on_a_hopper)
    assert find("flash", 64, True).passed_over == (
        "flash-attn 4: runs on compute capabilities 9.x, 10.x, 11.x, and this GPU's is 8.x; "
        "flash-attn 3: runs on compute capabilities 9.x, and this GPU's is 8.x"
    )


def test_without_any_the_reasons_of_all_are_told(on_a_hopper: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable) as caught:
        find("flash", 128, True)
    assert [part.endswith("is not installed") for part in str(caught.value).split("; ")] == [True] * 3


@pytest.mark.parametrize(
    ("version", "newest"), [("4.0.0b12", "flash-attn 3 (3.0.0)"), ("4.0.0b13", "flash-attn 4 (4.0.0b13)")]
)
def test_a_release_whose_same_bits_are_not_right_yet_is_passed_over(
    version: str, newest: str, on_a_hopper: pytest.MonkeyPatch
) -> None:
    install(on_a_hopper, *ALL[:2], ("flash-attn 4", version))
    found = find("flash", 128, True)
    assert found.name == newest and ("older than 4.0.0b13" in found.passed_over) == (version == "4.0.0b12")
    load(FLASH_ATTN[0], 9, deterministic=False)  # for the suite, which times it in any order too


def test_a_build_for_another_torch_is_passed_over(on_a_hopper: pytest.MonkeyPatch) -> None:
    install(on_a_hopper, *ALL)

    def broken() -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    generations = tuple(dataclasses.replace(one, load=broken) if one.majors == (9,) else one for one in FLASH_ATTN[1:])
    on_a_hopper.setattr(libraries, "FLASH_ATTN", generations)
    found = find("flash", 128, True)
    assert found.name == "flash-attn 2 (2.8.3)"
    assert found.passed_over == "flash-attn 3: does not import: ImportError: undefined symbol: _ZN3c10"


def test_a_function_that_takes_other_arguments_is_passed_over(on_a_hopper: pytest.MonkeyPatch) -> None:
    """As flash-attn 3's did in early 2025, and flash-attn 2's before 2.4."""
    install(on_a_hopper, *ALL[:2])

    def before(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, causal=False):
        raise AssertionError

    sys.modules["flash_attn_interface"].flash_attn_varlen_func = before  # type: ignore[attr-defined]
    found = find("flash", 128, True)
    assert found.name.startswith("flash-attn 2") and "flash_attn_varlen_func is another one" in found.passed_over


def raising(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available")


def with_a_wrong_gradient(*args: Any) -> Tensor:
    out = by_definition(*args)
    return out + (args[1].sum() - args[1].sum().detach()) * 0.1


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (at_the_top_left, "computes something else on this device: output is 1."),
        (raising, "fails on this device: RuntimeError: no kernel image"),
        (with_a_wrong_gradient, "computes something else on this device: of k is"),
        (lambda *args: by_definition(*args) * torch.nan, "output is nan from the definition"),
    ],
)
@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_what_errs_on_the_device_is_not_taken(
    backend: libraries.LibraryBackend, kernel: Kernel, why: str, on_a_hopper: pytest.MonkeyPatch
) -> None:
    install(on_a_hopper, ALL[0], kernel=kernel)
    attend_of("torch 2.13", kernel, on_a_hopper)
    with pytest.raises(Unavailable, match=why.replace(".", r"\.")):
        find(backend, 64, True)


def test_pytorchs_is_taken_where_it_is_right(on_a_hopper: pytest.MonkeyPatch) -> None:
    for release in NAMES[:2]:
        attend_of(release, by_definition, on_a_hopper)
        find.cache_clear()
        with torch.no_grad():  # the small case has gradients all the same
            assert find("varlen", 80, False).name == f"torch {torch.__version__}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_none() -> None:
    assert hindrance("flash", 128, True) == hindrance("varlen", 80, False) == "torch sees no GPU"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "heads", "key_heads"), [(80, 16, 16), (128, 32, 8)])
@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_on_a_gpu_it_is_near_the_definition_and_flash_gives_the_same_bits(
    backend: libraries.LibraryBackend, width: int, heads: int, key_heads: int
) -> None:
    """Alone, and as both ranks of two context-parallel ones see a sample of 1,000 rows between two others."""
    ways = (
        [Piece(0, 700, 0, 700), Piece(700, 701, 700, 701), Piece(701, 1400, 701, 1400)],
        [Piece(0, 200, 0, 200), Piece(200, 350, 200, 350), Piece(350, 500, 200, 1200), Piece(500, 700, 1200, 1400)],
        [Piece(0, 700, 200, 1050)],
    )
    for causal in (True, False):
        if reason := hindrance(backend, width, causal):
            pytest.skip(reason)
    draw = torch.Generator("cuda").manual_seed(1)
    for pieces in ways:
        rows = (pieces[-1].q_end, 1400, 1400)
        qkv = [
            torch.randn(count, number, width, device="cuda", generator=draw).bfloat16()
            for count, number in zip(rows, (heads, key_heads, key_heads), strict=True)
        ]
        d_out = torch.randn(qkv[0].shape, device="cuda", generator=draw).bfloat16()

        def run(attend: Callable[..., Tensor], qkv: list[Tensor] = qkv, d_out: Tensor = d_out) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in qkv]
            out = attend(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

        def by_library(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece] = pieces) -> Tensor:
            return causal_attention(q, k, v, pieces, backend=backend)

        def by_hand(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece] = pieces) -> Tensor:
            return reference_attention(q, k, v, pieces, causal=True)

        got, again, want = run(by_library), run(by_library), run(by_hand)
        for one, other, right in zip(got, again, want, strict=True):
            assert (one.double() - right.double()).norm() < 1e-2 * right.double().norm()
            assert backend == "varlen" or torch.equal(one, other)
