"""The attention back ends of a run: what the recipe names, or what ``auto`` chooses for this device."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mimo_megatron import log, platform
from mimo_megatron.attention import libraries
from mimo_megatron.attention.choice import DEFAULT, Choice, Op, choose, measured
from mimo_megatron.attention.text_kernel import TextBackend, text_kernel
from mimo_megatron.attention.vision_kernel import VisionBackend, vision_kernel
from mimo_megatron.config.check import TEXT_KERNEL_HEAD_WIDTHS, VISION_KERNEL_HEAD_WIDTH
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import RunConfig
from mimo_megatron.errors import ConfigError

_LIBRARIES: tuple[libraries.LibraryBackend, ...] = ("varlen", "flash")
_MASKED = (
    "train.text_attention=sdpa masks pieces of context-parallel ranks. With masks and grouped heads PyTorch takes "
    "cuDNN, which plans every new length on the host, on compute capabilities 9.0 and 10.0; elsewhere, and in fp32, it "
    "makes whole tables of scores. varlen, flash and triton need no masks"
)


def device_name() -> str | None:
    """As torch names this process's GPU; None where there is none."""
    return None if platform.current().is_cpu else torch.cuda.get_device_name()


def chosen(config: RunConfig) -> tuple[VisionBackend, TextBackend]:
    """(encoder's, decoder's) back end; what ``auto`` chose, and whose kernels varlen and flash are, is logged once.

    ``ConfigError`` where one of these two is named and cannot run here; encoder and decoder refuse triton themselves.
    """
    train, model, slots = config.train, config.model, config.data.pack_tokens
    vision, text, half = train.vision_attention, train.text_attention, train.precision != "fp32"
    if vision == "auto":
        vision = _told("vision", vision_choice(model, slots, device_name(), half))
    if text == "auto":
        text = _told("text", text_choice(model, slots, device_name(), half))
    if model.vision is not None:
        _find("vision", vision, model.vision.head_width, causal=False)
    _find("text", text, model.text.head_width, causal=True)
    is_grouped = model.text.num_heads != model.text.num_kv_heads
    if text == "sdpa" and is_grouped and config.parallel.cp > 1 and device_name() is not None:
        log.once(_MASKED, logging.WARNING)
    return vision, text


def _told(which: str, choice: Choice) -> Any:
    log.once(f"train.{which}_attention=auto: {choice.backend} ({choice.why})")
    return choice.backend


def _find(which: str, backend: str, head_width: int, *, causal: bool) -> None:
    if backend != "varlen" and backend != "flash":
        return
    key = f"train.{which}_attention"
    try:
        library = libraries.find(backend, head_width, causal)
    except libraries.Unavailable as reason:
        install = "install flash-attn-4 or flash-attn for this torch and GPU, or " if backend == "flash" else ""
        raise ConfigError(f"{key}={backend}, and {reason}: {install}set {key}=sdpa, which runs anywhere") from None
    log.once(f"{key}={backend}: {library.name}" + (f" ({library.passed_over})" if library.passed_over else ""))


def vision_choice(model: ModelConfig, slots: int, device: str | None, half: bool) -> Choice:
    """Of the encoder: its windows and frames count as many times as it has such layers."""
    vision = model.vision
    if vision is None:
        return Choice(DEFAULT, "the model has no vision encoder")
    num_full = len(set(vision.full_attention_layers))
    layers: dict[Op, int] = {"vision windows": vision.depth - num_full, "vision frames": num_full}
    kernel = _kernel_hindrance(vision.head_width, (VISION_KERNEL_HEAD_WIDTH,), vision_kernel)
    hindrances = {"sdpa": None, **_library_hindrances(half, vision.head_width, causal=False), "triton": kernel}
    return choose(layers, vision.head_width, slots, device, hindrances, measured())


def text_choice(model: ModelConfig, slots: int, device: str | None, half: bool) -> Choice:
    kernel = _kernel_hindrance(model.text.head_width, TEXT_KERNEL_HEAD_WIDTHS, text_kernel)
    hindrances = {"sdpa": None, **_library_hindrances(half, model.text.head_width, causal=True), "triton": kernel}
    return choose({"text causal": model.text.num_layers}, model.text.head_width, slots, device, hindrances, measured())


def _library_hindrances(half: bool, head_width: int, *, causal: bool) -> dict[str, str | None]:
    if not half:
        return dict.fromkeys(_LIBRARIES, "it takes half precision only")
    return {backend: libraries.hindrance(backend, head_width, causal) for backend in _LIBRARIES}


def _kernel_hindrance(head_width: int, widths: Sequence[int], load: Callable[[], Any]) -> str | None:
    if head_width not in widths:
        return f"it takes heads {', '.join(map(str, widths))} wide"
    try:
        load()
    except ConfigError as error:
        return str(error)
    return None
