"""Ways to compute the same training step, put into one trainer by turns, and the check that they do compute the same.

Three billion weights take ten CPU seconds and more to draw, so the ways of a built model are changed in place: the
result is what the recipe's keys would have built (a test compares the two). Where the decoder's layers would be others,
those of Transformer Engine, nothing is changed in place: a trainer is built. Every variant starts from the seed's
weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu.packs import PackClass
from mimo_megatron.attention.text_kernel import TextBackend, text_kernel
from mimo_megatron.attention.vision_kernel import VisionBackend, vision_kernel
from mimo_megatron.config.check import check
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.run import HeadLoss, Recompute, RunConfig
from mimo_megatron.fp8.linear import PRODUCTS, Fp8Linear
from mimo_megatron.loss.chunk_softmax import chunk_softmax
from mimo_megatron.loss.cross_entropy import token_losses
from mimo_megatron.loss.implicit_logits import Chunking
from mimo_megatron.mcore import adam
from mimo_megatron.mcore.boot import current_mesh
from mimo_megatron.mcore.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, scaling_of
from mimo_megatron.mcore.layers import encoder_product, fp8_engine, uses_engine
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.parallel.mesh import ALONE
from mimo_megatron.train.step import DTYPES, Trainer, local_packs, numerics_of
from mimo_megatron.types import PackedBatch

Fp8Way = Literal["scaled_mm", "scaled_mm in all parts", "transformer-engine", "twin", "twin in all parts"]
_ALL_PARTS = " in all parts"


@dataclass(frozen=True)
class Ways:
    """Values of the recipe's keys ``train.vision_attention``, ``text_attention``, ``head_loss``; and of ``fp8``."""

    vision: VisionBackend = "sdpa"
    text: TextBackend = "sdpa"
    head: HeadLoss = "logits"
    fp8: Fp8Way | None = None
    """Of the decoder, or of encoder and projector too, by that engine; with current scaling."""

    @property
    def name(self) -> str:
        changed = [f"{one.name} {getattr(self, one.name)}" for one in fields(self) if self.changes(one.name)]
        return ", ".join(changed) or "baseline"

    def changes(self, key: str) -> bool:
        return getattr(self, key) != getattr(BASELINE, key)


BASELINE = Ways()
SINGLE = (
    Ways(vision="triton"), Ways(text="flash"), Ways(head="triton"), Ways(text="varlen"), Ways(vision="flash"),
    Ways(vision="varlen"), Ways(text="triton"), Ways(head="chunked"),
)  # fmt: skip
"""Each change by itself, in order of value."""


@dataclass(frozen=True)
class Variant:
    packs: PackClass
    recompute: Recompute
    ways: Ways

    @property
    def name(self) -> str:
        return f"{self.packs.name}, {self.ways.name}, recompute {self.recompute}"

    @property
    def config(self) -> RunConfig:
        """``ConfigError`` where the keys do not go together."""
        fp8 = None
        if self.ways.fp8 is not None:
            parts = ["vision", "projector", "text"] if self.ways.fp8.endswith(_ALL_PARTS) else ["text"]
            fp8 = Fp8Config.model_validate({"engine": self.ways.fp8.removesuffix(_ALL_PARTS), "parts": parts})
        ways = {
            "vision_attention": self.ways.vision, "text_attention": self.ways.text, "head_loss": self.ways.head,
            "fp8": fp8,
        }  # fmt: skip
        train = self.packs.config.train.model_copy(update={"recompute": self.recompute, **ways})
        config = self.packs.config.model_copy(update={"train": train})
        check(config, 1)
        return config


def best_of(rows: Sequence[dict[str, Any]]) -> Ways:
    """Of each key the value whose row is the fastest, where that is right and faster than the baseline. ``rows`` are
    those of one class: the baseline's, and of single changes."""
    right = [row for row in rows if "tokens_per_second" in row and not row["wrong"]]
    found = BASELINE
    for key in ("vision", "text", "head"):
        single = [row for row in right if all(name == key for name in _changed(row["ways"]))]
        if single:
            fastest = max(single, key=lambda row: row["tokens_per_second"])
            found = replace(found, **{key: fastest["ways"][key]})
    return found


def _changed(ways: dict[str, Any]) -> list[str]:
    return [name for name, value in ways.items() if value != getattr(BASELINE, name)]


FP8_LINEARS = (Fp8ColumnParallelLinear, Fp8RowParallelLinear)


# ---- in place --------------------------------------------------------------------------------------------------------


def can_be_put_into(trainer: Trainer, config: RunConfig) -> bool:
    """Whether the decoder's layers stay those of the same library, and recomputation what it was."""
    same_layers = uses_engine(trainer.config.train.fp8) == uses_engine(config.train.fp8)
    keeps_fp8 = trainer.config.train.fp8 == config.train.fp8 or not uses_engine(config.train.fp8)
    return same_layers and keeps_fp8 and trainer.config.train.recompute == config.train.recompute


def put_into(trainer: Trainer, config: RunConfig) -> Trainer:
    """The trainer as ``build_trainer(config)`` would give it, over the same weights. ``ConfigError`` as there."""
    numerics, fp8 = numerics_of(config, DTYPES[config.train.precision]), config.train.fp8
    product = None if fp8 is None or uses_engine(fp8) else fp8_engine(fp8)
    encoder = encoder_product(fp8) if fp8 is not None and fp8.encoder_parts else None
    vision = vision_kernel() if numerics.vision_attention == "triton" else None
    text = text_kernel() if numerics.text_attention == "triton" else None
    chunking = None
    if numerics.head_loss != "logits":
        kernels = chunk_softmax("triton" if numerics.head_loss == "triton" else "torch")
        chunking = Chunking(numerics.head_logits, kernels)
    for model in trainer.bare_chunks:
        for block in model.vision.blocks if model.vision is not None else ():
            block.attn.kernel = vision
            block.attn.backend = "sdpa" if vision is not None else numerics.vision_attention
        model.text.numerics, model.text.kernel, model.text.chunking = numerics, text, chunking
        model.text.backend = "sdpa" if text is not None else numerics.text_attention
        if not uses_engine(fp8):
            _put_fp8_into(model, config, product)
        _put_fp8_into_encoder(model, fp8, encoder)
        model.encodes_in_fp8 = encoder is not None
    return replace(trainer, config=config)


def _put_fp8_into(model: VisionLanguageModel, config: RunConfig, product: Any) -> None:
    """Megatron's linear layers, and ours in FP8: they differ in their class and in two attributes."""
    fp8, num_layers = config.train.fp8, config.model.text.num_layers
    axis = current_mesh().tp_cp
    for number, layer in enumerate(model.text.decoder.layers):
        attention, mlp = layer.self_attention, layer.mlp
        for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
            of_fp8 = next(kind for kind in FP8_LINEARS if isinstance(linear, _megatrons(kind)))
            if fp8 is not None and fp8.covers(number, num_layers):
                _become(linear, of_fp8, scaling_of(fp8, axis, product), product)
            elif isinstance(linear, of_fp8):
                _become(linear, _megatrons(of_fp8))


def _put_fp8_into_encoder(model: VisionLanguageModel, fp8: Fp8Config | None, product: Any) -> None:
    """PyTorch's linear layers of the blocks, and of the projector."""
    if model.vision is None or model.projector is None:
        return
    for part, layers in (("vision", model.vision.blocks), ("projector", model.projector)):
        for linear in (one for one in layers.modules() if isinstance(one, torch.nn.Linear)):
            if fp8 is not None and part in fp8.parts:
                _become(linear, Fp8Linear, scaling_of(fp8, ALONE, product), PRODUCTS[product])
            elif isinstance(linear, Fp8Linear):
                _become(linear, torch.nn.Linear)


def _become(linear: Any, kind: type, scaling: Any = None, product: Any = None) -> None:
    for name in ("scaling", "product"):
        vars(linear).pop(name, None)
    linear.__class__ = kind
    if scaling is not None:
        linear.scaling, linear.product = scaling, product


def _megatrons(of_fp8: type) -> type:
    """The class before which an FP8 layer puts its products."""
    return of_fp8.__bases__[-1]


# ---- the seed's weights ----------------------------------------------------------------------------------------------


class Start:
    """The weights a trainer was built with, in host memory: on the device they would be counted as memory of a step."""

    def __init__(self, trainer: Trainer) -> None:
        pin = trainer.device.type == "cuda"
        self._params = [param for chunk in trainer.bare_chunks for param in chunk.parameters()]
        self._values = [torch.empty(one.shape, dtype=one.dtype, pin_memory=pin) for one in self._params]
        for value, param in zip(self._values, self._params, strict=True):
            value.copy_(param.detach(), non_blocking=True)

    @torch.no_grad()
    def restore(self, trainer: Trainer) -> None:
        """Weights as they were drawn, the optimizer without any history."""
        for value, param in zip(self._values, self._params, strict=True):
            param.copy_(value, non_blocking=True)
        trainer.optimizer.reload_model_params()
        for one in trainer.optimizer.chained_optimizers:
            for state in one.optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
            adam.set_step_count(one.optimizer, 0)


# ---- the same numbers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """How far a right variant may be from the baseline, from the same weights on the same packs."""

    loss: float
    """Relative, of the mean loss of the first step."""
    tokens: float
    """Of the loss of each token of the first pack: the root of the mean square difference over the losses' spread."""
    gradient: float
    """Relative, of the gradient norm of the first step."""


# Through 32 encoder and 8 decoder layers of narrow width, on a CPU, bf16 moves the losses of tokens by 0.018 of their
# spread, FP8 in 6 of the 8 by 0.079; keys read backwards move them by 0.042 in 3 layers there, and more where weights
# are wider: a small fault may hide in the noise, which is why every kernel is checked by itself before.
NOISE = {"fp32": Noise(1e-5, 1e-3, 1e-3), "bf16": Noise(2e-3, 0.05, 0.02), "fp8": Noise(1e-2, 0.3, 0.1)}


def noise_of(config: RunConfig) -> Noise:
    return NOISE["fp8" if config.train.fp8 is not None else config.train.precision]


@torch.no_grad()
def losses_of_tokens(trainer: Trainer, batch: PackedBatch) -> Tensor:
    """[R] of the pack's trained tokens, on the CPU."""
    (model,) = trainer.bare_chunks
    pack = local_packs(trainer.config.model.text, trainer.mesh, [model], [batch])[0].to(trainer.device)
    return token_losses(model(pack), pack.lanes[0].labels_R, trainer.mesh.tp, overwrite=True).float().cpu()


def differences(found: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """Of two variants' ``first_losses``, ``first_gradient_norms`` and ``losses_R``; see ``Noise``."""
    spread = baseline["losses_R"].std(unbiased=False).item()
    moved = (found["losses_R"] - baseline["losses_R"]).square().mean().sqrt().item()
    loss, norm = found["first_losses"][0], found["first_gradient_norms"][0]
    of_loss, of_norm = baseline["first_losses"][0], baseline["first_gradient_norms"][0]
    return {"loss": abs(loss / of_loss - 1), "tokens": moved / spread, "gradient": abs(norm / of_norm - 1)}


def why_wrong(found: dict[str, float], noise: Noise) -> str:
    """Empty where every difference, a number, is within the noise."""
    limits = {one.name: getattr(noise, one.name) for one in fields(noise)}
    return "; ".join(
        f"{name} {found[name]:.2e} over {limit:.0e}" for name, limit in limits.items() if not found[name] <= limit
    )
