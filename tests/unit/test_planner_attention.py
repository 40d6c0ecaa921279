"""What the planner says attention keeps, by back end, beside the storages that autograd really keeps.

Triton's kernels run in their interpreter. Libraries' varlen kernels need a GPU: there the shapes are traced, by fake
tensors through the autograd formula of PyTorch's operator, which is what says what is kept; flash-attn's keep the same.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mimo_megatron.attention import libraries, varlen
from mimo_megatron.attention.packed import causal_attention
from mimo_megatron.attention.pieces import causal_pieces
from mimo_megatron.attention.text_kernel import text_kernel
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.mcore.attention import PackedCoreAttention, PackParams
from mimo_megatron.mcore.text import Numerics, transformer_config
from mimo_megatron.model.vision import Attention
from mimo_megatron.planner import attention_memory
from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.setting import Setting
from tests.kernel_cases import ON_GPU
from tests.samples import run_config, tiny_model

pytestmark = pytest.mark.skipif(ON_GPU, reason="the CPU's tensors are counted")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels need triton")
APART, ALONE = (40, 24, 40, 24), (128,)
"""Segments whose equals are not neighbours, which sdpa copies; and one."""
GRIDS = ((1, 16, 12), (1, 8, 8))
BACKENDS = ["sdpa", "varlen", "flash", pytest.param("triton", marks=needs_triton)]


def kept_bytes(run: Callable[[], Any], *others: Tensor) -> int:
    """Bytes of the storages that ``run`` keeps for its backward, each once, without those of ``others`` and without
    indexes. ``run``'s result lives meanwhile, so that no storage is counted twice under one address."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()
    known = {other.untyped_storage()._cdata for other in others}
    total = sum(storage.nbytes() for address, storage in kept.items() if address not in known)
    del alive
    return total


def setting_of(model: ModelConfig, backend: str, tp: int = 1) -> Setting:
    config = run_config(
        model, parallel=ParallelConfig(tp=tp), precision="fp32", text_attention=backend, vision_attention=backend
    )
    return Setting.of(config, "cpu")


@contextmanager
def where_it_runs(backend: str) -> Iterator[None]:
    """No tensor of a fake mode may stay in the caches of lengths."""
    if backend not in ("varlen", "flash"):
        yield
        return
    caches = (varlen._segments, varlen._pieces)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(libraries, "find", lambda *_, **__: libraries.Library("traced", libraries.torch_varlen))
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


def text_attention_keeps(model: ModelConfig, backend: str, runs: tuple[int, ...]) -> int:
    """One layer's core attention over queries, keys and values out of one product, as megatron cuts it."""
    text, slots = model.text, sum(runs)
    groups, heads = text.num_kv_heads, text.num_heads // text.num_kv_heads
    core = PackedCoreAttention(transformer_config(text, ParallelConfig(), Numerics()), 1)
    bounds = [sum(runs[:place]) for place in range(len(runs) + 1)]
    with where_it_runs(backend):
        weight, x = torch.randn(groups * (heads + 2) * text.head_width, 8, requires_grad=True), torch.randn(slots, 1, 8)
        angles = torch.randn(slots, 1, text.head_width // 2)
        cos_sin = angles.cos(), angles.sin()
        params = PackParams(
            pieces=causal_pieces(bounds, [(0, slots)]), cos_sin=cos_sin,
            kernel=text_kernel() if backend == "triton" else None,
            backend="sdpa" if backend == "triton" else backend,  # type: ignore[arg-type]
        )  # fmt: skip

        def run() -> Tensor:
            mixed = (x @ weight.t()).unflatten(-1, (groups, -1))
            query, key, value = mixed.split([heads * text.head_width, text.head_width, text.head_width], dim=3)
            query = query.reshape(slots, 1, -1, text.head_width)
            return core(query, key, value, packed_seq_params=params)

        return kept_bytes(run, x, weight, *cos_sin)


MODELS = {
    "grouped queries": tiny_model(),
    "one group": tiny_model(num_kv_heads=1),
    "a key head for each query head": tiny_model(num_kv_heads=4),
}


def text_pack(runs: tuple[int, ...]) -> PackShape:
    return PackShape("test", sum(runs), runs, (), sum(runs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("runs", [APART, ALONE], ids=["apart", "alone"])
@pytest.mark.parametrize("name", MODELS)
def test_the_decoders_attention_keeps_what_the_planner_says(name, runs, backend):
    model, setting = MODELS[name], setting_of(MODELS[name], backend)
    said = attention_memory.of_text(setting, text_pack(runs), 0)
    qkv, _queries, _keys = attention_memory.text_rows(setting, text_pack(runs))
    assert text_attention_keeps(model, backend, runs) == pytest.approx(said.kept + said.keeps_qkv * qkv, rel=0.01)
    assert said.has_other_output == (backend == "sdpa" and runs == APART)


def vision_attention_keeps(model: ModelConfig, backend: str, *, is_full: bool) -> int:
    vision = model.vision
    assert vision is not None
    layout = vision_layout(GRIDS, vision)
    bounds = layout.frame_bounds if is_full else layout.window_bounds
    with where_it_runs(backend):
        attention = Attention(vision, backend)  # type: ignore[arg-type]
        x_PD, angles = torch.randn(bounds[-1], vision.width), torch.randn(bounds[-1], 1, vision.head_width // 2)
        cos_sin = angles.cos(), angles.sin()
        return kept_bytes(lambda: attention(x_PD, bounds, cos_sin), x_PD, *cos_sin, *attention.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_full", [False, True], ids=["windows", "frames"])
def test_the_encoders_attention_keeps_what_the_planner_says(backend, is_full):
    model = tiny_model()
    model = model.model_copy(update={"vision": model.vision.model_copy(update=dict(width=160, num_heads=2))})
    patches = sum(frames * height * width for frames, height, width in GRIDS)
    pack = PackShape("test", 128, (128,), GRIDS, 128)
    said, _ = attention_memory.of_vision(setting_of(model, backend), pack, patches, is_full=is_full)
    found = vision_attention_keeps(model, backend, is_full=is_full)
    log_sums = patches * 2 * 4
    if backend == "triton" and not is_full:  # left out in the planner: windows keep none where Hopper's plan is taken
        found += log_sums
    assert found == pytest.approx(said, rel=0.01)


def test_counting_one_back_end_as_another_is_found():
    """The mistake that was made before: whatever the recipe names is counted as sdpa."""
    setting = setting_of(MODELS["grouped queries"], "sdpa")
    as_sdpa = attention_memory.of_text(setting, text_pack(ALONE), 0)
    qkv, _queries, _keys = attention_memory.text_rows(setting, text_pack(ALONE))
    found = text_attention_keeps(MODELS["grouped queries"], "varlen", ALONE)
    with pytest.raises(AssertionError):
        assert found == pytest.approx(as_sdpa.kept + as_sdpa.keeps_qkv * qkv, rel=0.1)


@pytest.mark.parametrize("cp_rank", [0, 1])
@pytest.mark.parametrize("runs", [(128,), (40, 24, 40, 24), (8,) * 16], ids=["one sample", "several", "short ones"])
def test_keys_gathered_for_context_parallel_pieces_are_counted(runs, cp_rank):
    """Without the gather over ranks itself: queries of this rank, keys and values of all slots."""
    model = MODELS["grouped queries"]
    config = run_config(model, parallel=ParallelConfig(cp=2), precision="fp32", text_attention="flash")
    said, text = attention_memory.of_text(Setting.of(config, "cpu"), text_pack(runs), cp_rank), model.text
    bounds = [sum(runs[:place]) for place in range(len(runs) + 1)]
    pieces = causal_pieces(bounds, [(32 * cp_rank, 32 * cp_rank + 32), (96 - 32 * cp_rank, 128 - 32 * cp_rank)])
    with where_it_runs("flash"):
        q = torch.randn(64, text.num_heads, text.head_width, requires_grad=True)
        k, v = (torch.randn(128, text.num_kv_heads, text.head_width, requires_grad=True) for _ in range(2))
        found = kept_bytes(lambda: causal_attention(q, k, v, pieces, backend="flash"))
    assert found == pytest.approx(said.kept, rel=0.01) and not said.keeps_qkv


def test_flashs_backward_needs_room_for_sums_of_every_short_segment():
    """By hand, for windows of 64 patches: 2,304 rows of 16 heads of 80, padded to 96, and 128 more for each of 36."""
    vision = tiny_model().vision.model_copy(update=dict(width=1280, num_heads=16, ffn_width=64))
    model = tiny_model().model_copy(update={"vision": vision})
    pack = PackShape("test", 1024, (1024,), ((1, 48, 48),), 1024)
    rows, inside = 2304 * 1280 * 4, (2304 + 128 * 36) * 16 * 97 * 4
    _, needed = attention_memory.of_vision(setting_of(model, "varlen"), pack, 2304, is_full=False)
    assert needed == 5 * rows + inside
    _, of_frame = attention_memory.of_vision(setting_of(model, "varlen"), pack, 2304, is_full=True)
    assert of_frame < needed


def test_same_bits_in_flashs_backward_take_as_many_sums_as_fill_the_gpu():
    """By hand: one frame of 16 heads of 80, padded to 96, is 10 sums for 148 multiprocessors; 36 windows are one."""
    vision = tiny_model().vision.model_copy(update=dict(width=1280, num_heads=16, ffn_width=64))
    model = tiny_model().model_copy(update={"vision": vision})
    pack = PackShape("test", 1024, (1024,), ((1, 48, 48),), 1024)
    of_varlen, of_flash = setting_of(model, "varlen"), setting_of(model, "flash")
    _, frame = attention_memory.of_vision(of_flash, pack, 2304, is_full=True)
    assert frame == 5 * 2304 * 1280 * 4 + (2304 + 128) * 16 * (10 * 96 + 1) * 4
    windows = [attention_memory.of_vision(one, pack, 2304, is_full=False) for one in (of_varlen, of_flash)]
    assert windows[0] == windows[1]
