"""Norm and scaling of many tensors at once against megatron's own, tensor after tensor."""

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from mimo_megatron import platform
from mimo_megatron.mcore import many_tensors
from mimo_megatron.platform import Platform

FLAG = torch.zeros(1, dtype=torch.int)


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    buffer = torch.randn(1000, generator=generator)
    return [buffer[:7], buffer[7:500], buffer[500:].view(20, 25)]  # of one buffer, as megatron's shards are


def test_the_norm_is_that_of_all_tensors_together() -> None:
    norm, per_tensor = many_tensors.l2_norm(1, FLAG, [gradients()], False)
    assert norm.shape == (1,) and per_tensor is None
    assert norm.item() == pytest.approx(
        torch.cat([one.flatten() for one in gradients()]).double().norm().item(), rel=1e-6
    )


def test_scaling_is_megatrons_to_the_bit() -> None:
    own, megatrons = gradients(), gradients()
    many_tensors.scale(1, FLAG, [own, own], 0.3)
    utils.local_multi_tensor_scale(1, FLAG, [megatrons, megatrons], 0.3)
    assert all(torch.equal(one, other) for one, other in zip(own, megatrons, strict=True))


def test_two_lists_that_are_not_the_same_are_no_scaling_in_place() -> None:
    with pytest.raises(AssertionError):
        many_tensors.scale(1, FLAG, [gradients(), gradients()], 0.3)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_they_replace_megatrons_fallbacks_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    here = Platform("cuda", "nccl") if kind == "cuda" else Platform("cpu", "gloo")
    monkeypatch.setattr(platform, "current", lambda: here)
    for name in ("l2_norm_impl", "multi_tensor_scale_impl"):
        monkeypatch.setattr(clip_grads, name, getattr(clip_grads, name))  # put back at the end
    many_tensors.install()
    assert (clip_grads.l2_norm_impl is many_tensors.l2_norm) == (kind == "cuda")
    assert (clip_grads.multi_tensor_scale_impl is many_tensors.scale) == (kind == "cuda")


def test_other_kernels_than_the_fallbacks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "current", lambda: Platform("cuda", "nccl"))
    fused = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", fused)
    many_tensors.install()
    assert clip_grads.l2_norm_impl is fused
