"""The switch train.text_attention: refused by name where the kernel cannot run; where it runs, the same decoder."""

import importlib.util
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from mimo_megatron import offload
from mimo_megatron.attention.cache import KVCache
from mimo_megatron.attention.packed import Piece, causal_attention
from mimo_megatron.attention.rows import Rows
from mimo_megatron.attention.text_kernel import TextBackend, text_kernel
from mimo_megatron.config.check import TEXT_KERNEL_HEAD_WIDTHS
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import Offload, ParallelConfig, Recompute
from mimo_megatron.data.collate import collate
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore import optimizer, weights
from mimo_megatron.mcore.attention import PackedCoreAttention, PackParams
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.mcore.text import Numerics, transformer_config
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.train.step import build_model, local_packs, loss_of
from tests.harness import run_ranks
from tests.kernel_cases import DEVICE, ON_GPU
from tests.library_cases import at_the_top_left, by, by_definition
from tests.parity_rule import assert_named_parity
from tests.samples import random_sample, run_config

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton: pip install triton")
BASE = preset("tiny-base")  # with a layer that predicts the token after the next
MODEL = BASE.model_copy(update={"text": BASE.text.model_copy(update={"num_layers": 1})})
SLOTS = 64


def loss_and_gradients(
    address: RankAddress,
    backend: TextBackend,
    dtype: torch.dtype,
    cp: int,
    recompute: Recompute,
    offloads: Offload = "none",
) -> dict[str, Tensor]:
    parallel = ParallelConfig(cp=cp)
    offload.IN_FLIGHT = 0  # in this rank's process: the model is two layers deep
    with megatron(parallel, address) as mesh:
        numerics = Numerics(dtype, recompute, offload=offloads, text_attention=backend)
        chunks = build_chunks(MODEL, parallel, numerics, mesh)
        weights.draw_weights(chunks, 1, mesh.tp)
        for name, param in weights.global_parameters(chunks):
            if "qkv.weight" in name:
                param.data.mul_(8)  # attention is far from uniform then
        wrapped = optimizer.wrap([chunk.to(DEVICE) for chunk in chunks], dtype_is_bf16=False)
        batch = collate([random_sample(1, 17), random_sample(2, 40)], MODEL, SLOTS)
        packs = [pack.to(DEVICE) for pack in local_packs(MODEL.text, mesh, chunks, [batch])]
        slots, loss = packs[0].num_stream_slots, loss_of(MODEL.text, mesh)
        sums = run_microbatches(wrapped, packs, slots, loss, whole_gradients=True)
        mean = torch.tensor([sums.loss / sums.count]).to(dtype)
        named = weights.global_parameters(chunks)
        return {"loss": mean} | {name: param.main_grad.cpu().clone() for name, param in named}


@cache
def with_pytorchs(dtype: torch.dtype) -> dict[str, Tensor]:
    return run_ranks(loss_and_gradients, 1, "sdpa", dtype, 1, "none")[0]


def assert_same_decoder(
    cp: int, recompute: Recompute, offloads: Offload = "none", backend: TextBackend = "triton"
) -> None:
    eager, oracle = with_pytorchs(torch.float32), with_pytorchs(torch.float64)
    assert any("mtp" in name and "qkv" in name for name in oracle)
    for got in run_ranks(loss_and_gradients, cp, backend, torch.float32, cp, recompute, offloads):
        assert_named_parity(got, eager, oracle, torch.float32)


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="ranks are forked: the parent's CUDA context does not survive it")
@pytest.mark.parametrize(
    ("cp", "recompute", "offloads"), [(1, "none", "none"), (1, "none", "text"), (2, "selective", "none")]
)
def test_the_decoder_is_the_same_with_the_kernel(cp: int, recompute: Recompute, offloads: Offload) -> None:
    """Loss and every gradient, alone, with what it keeps on the host, and on two context-parallel ranks that compute
    attention again in the backward."""
    assert_same_decoder(cp, recompute, offloads)


@pytest.mark.skipif(ON_GPU, reason="ranks are forked: the parent's CUDA context does not survive it")
def test_a_kernel_that_does_not_turn_queries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mimo_megatron.mcore.text.text_kernel",
        lambda: lambda q_TNH, k_TKH, v_TKH, cos_sin, pieces: causal_attention(q_TNH, k_TKH, v_TKH, pieces),
    )
    with pytest.raises(AssertionError, match="exceeds"):
        assert_same_decoder(1, "none")


@pytest.mark.skipif(ON_GPU, reason="ranks are forked: the parent's CUDA context does not survive it")
@pytest.mark.parametrize(("backend", "library"), [("flash", "flash-attn 4"), ("varlen", "torch 2.13")])
@pytest.mark.parametrize(("cp", "recompute"), [(1, "none"), (2, "selective")])
def test_the_decoder_is_the_same_with_a_librarys_kernel(
    cp: int, recompute: Recompute, backend: TextBackend, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a CPU goes: what the kernel is given, by the definition. Two samples of 17 and 40 tokens in 64 slots:
    both context-parallel ranks have pieces behind more keys, one has two pieces that share them."""
    with by(by_definition, monkeypatch, library):
        assert_same_decoder(cp, recompute, backend=backend)


def first_rows(x: Tensor, rows: Rows) -> Tensor:
    """As many as were asked for."""
    return x if rows.index is None else torch.cat((x, x))[: len(rows.index)]


@pytest.mark.skipif(ON_GPU, reason="ranks are forked: the parent's CUDA context does not survive it")
@pytest.mark.parametrize("fault", ["top left", "keys not gathered"])
def test_a_librarys_mask_or_keys_that_do_not_fit_context_parallel_pieces_are_found(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "keys not gathered":
        monkeypatch.setattr("mimo_megatron.attention.varlen.take", first_rows)
    kernel = at_the_top_left if fault == "top left" else by_definition
    with by(kernel, monkeypatch), pytest.raises(AssertionError, match="exceeds"):
        assert_same_decoder(2, "none", backend="flash")


def of_a_recipe(address: RankAddress) -> list[bool]:
    """Whether the kernel is in the model that a recipe builds, without the key and with it."""
    with megatron(ParallelConfig(), address) as mesh:
        recipes = [run_config(MODEL, text_attention=backend) for backend in ("sdpa", "triton")]
        return [build_model(recipe, mesh, torch.device("cpu"))[0].text.kernel is not None for recipe in recipes]


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="ranks are forked: the parent's CUDA context does not survive it")
def test_the_recipe_chooses_it() -> None:
    assert run_ranks(of_a_recipe, 1) == [[False, True]]


def test_generation_with_a_cache_keeps_pytorchs_attention() -> None:
    core = PackedCoreAttention(transformer_config(MODEL.text, ParallelConfig(), Numerics()), 1)
    q, k, v = (torch.randn(5, 1, heads, 32) for heads in (4, 2, 2))
    angles, asked = torch.randn(5, 1, 16), []

    def kernel(q_TNH: Tensor, *_: object) -> Tensor:
        asked.append(1)
        return q_TNH

    plain = PackParams(pieces=(Piece(0, 5, 0, 5),), cos_sin=(angles.cos(), angles.sin()))
    want = core(q, k, v, packed_seq_params=plain)
    caching = replace(plain, kernel=kernel, cache=KVCache((0, 5), 2, torch.device("cpu")))
    assert torch.equal(core(q, k, v, packed_seq_params=caching), want) and not asked
    core(q, k, v, packed_seq_params=replace(plain, kernel=kernel))
    assert asked == [1]


@needs_triton
def test_the_rule_knows_the_widths_that_the_kernel_takes() -> None:
    from mimo_triton_kernels.causal_attention import HEAD_WIDTHS

    assert HEAD_WIDTHS == TEXT_KERNEL_HEAD_WIDTHS and preset("mimo-vl-7b").text.head_width in HEAD_WIDTHS


def test_without_triton_the_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mimo_triton_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r"triton is not installed: .*train\.text_attention=sdpa"):
        text_kernel()


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="there is a GPU here")
def test_without_a_gpu_the_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"torch sees no GPU: set train\.text_attention=sdpa"):
        text_kernel()
