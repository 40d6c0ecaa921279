"""The switch train.vision_attention: refused by name where the kernel cannot run; where it runs, the same encoder."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import Tensor

from mimo_megatron.attention.vision_kernel import VisionBackend, vision_kernel
from mimo_megatron.config.check import VISION_KERNEL_HEAD_WIDTH, the_vision_kernel_has_heads_of_its_width
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.model import VisionConfig
from mimo_megatron.data.vision_layout import vision_layout
from mimo_megatron.errors import ConfigError
from mimo_megatron.model.vision import VisionEncoder
from tests.kernel_cases import DEVICE, ON_GPU
from tests.library_cases import by, by_definition
from tests.parity_rule import assert_named_parity
from tests.repository import ROOT

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton: pip install triton")
GRIDS = [(1, 10, 8), (1, 2, 4)]  # 80 patches, more than a tile of 64, in two windows; and 8
VISION = VisionConfig(
    depth=2, width=80, num_heads=1, ffn_width=96, full_attention_layers=(1,), window_size=112, patch_size=14
)


def assert_same_encoder(backend: VisionBackend) -> None:
    """Features and all gradients, in fp32, beside PyTorch's in fp64."""
    layout = vision_layout(GRIDS, VISION)
    pixels = torch.randint(0, 256, (88, 1176), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    plain = VisionEncoder(VISION).to(DEVICE)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 2:  # large enough that attention is far from uniform
                parameter.normal_(std=parameter.shape[1] ** -0.5)

    def run(backend: VisionBackend, dtype: torch.dtype) -> dict[str, Tensor]:
        encoder = VisionEncoder(VISION, backend=backend).to(DEVICE)
        encoder.load_state_dict(copy.deepcopy(plain.state_dict()))
        encoder.to(dtype)
        hidden_PD = encoder(pixels.to(DEVICE), layout)
        hidden_PD.square().sum().backward()
        return {"hidden": hidden_PD.detach(), **{name: p.grad for name, p in encoder.named_parameters()}}

    got, eager, oracle = run(backend, torch.float32), run("sdpa", torch.float32), run("sdpa", torch.float64)
    assert_named_parity(got, eager, oracle, torch.float32)


@needs_triton
def test_the_encoder_is_the_same_with_the_kernel() -> None:
    assert_same_encoder("triton")


@pytest.mark.skipif(ON_GPU, reason="by the definition, in place of a library")
@pytest.mark.parametrize(("backend", "library"), [("flash", "flash-attn 3"), ("varlen", "torch 2.11")])
def test_the_encoder_is_the_same_with_a_librarys_kernel(
    backend: VisionBackend, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with by(by_definition, monkeypatch, library):
        assert_same_encoder(backend)


def test_a_library_that_is_told_of_too_few_segments_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last border left out."""

    def joined(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, _q: int, _k: int, causal: bool) -> Tensor:
        cu_q, cu_k = (torch.cat((cu[:-2], cu[-1:])) for cu in (cu_q, cu_k))
        return by_definition(q, k, v, cu_q, cu_k, int(cu_q.diff().max()), int(cu_k.diff().max()), causal)

    with by(joined, monkeypatch), pytest.raises(AssertionError, match="exceeds"):
        assert_same_encoder("flash")


def test_heads_of_the_released_models_are_taken() -> None:
    recipe = ROOT / "examples" / "recipes" / "tiny" / "stage2.yaml"
    wide = ["train.vision_attention=triton", "model.vision.width=160", "model.vision.num_heads=2"]
    config = load_recipe(recipe, wide)
    assert config.model.vision is not None and config.model.vision.head_width == VISION_KERNEL_HEAD_WIDTH
    assert not list(the_vision_kernel_has_heads_of_its_width(config, 1))


def test_without_triton_the_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mimo_triton_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r"triton is not installed: .*train\.vision_attention=sdpa"):
        VisionEncoder(VISION, backend="triton")


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="there is a GPU here")
def test_without_a_gpu_the_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"torch sees no GPU: set train\.vision_attention=sdpa"):
        vision_kernel()
