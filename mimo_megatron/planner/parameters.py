"""Parameters by pipeline stage and part, exact, from the configurations alone; on one tensor-parallel rank.

Tensor parallelism cuts the embedding, the head, and the weights of the decoder's linear layers (and the bias of the
first attention one); norms are whole on every rank. Vision encoder and projector are whole on every rank of stage 0.
"""

from dataclasses import dataclass

from mimo_megatron.config.model import ModelConfig, TextConfig, VisionConfig
from mimo_megatron.config.run import ModuleName, ParallelConfig


@dataclass(frozen=True)
class StageParameters:
    """Of one stage on one tp rank: the sizes of its tensors, by part."""

    text: tuple[int, ...]
    vision: tuple[int, ...] = ()
    projector: tuple[int, ...] = ()

    def sizes(self, part: ModuleName) -> tuple[int, ...]:
        return {"text": self.text, "vision": self.vision, "projector": self.projector}[part]

    @property
    def total(self) -> int:
        return sum(self.text) + sum(self.vision) + sum(self.projector)


def stage_parameters(model: ModelConfig, layout: ParallelConfig) -> tuple[StageParameters, ...]:
    """One for every stage of the pipeline, in order; stage i lies on pipeline rank i % pp."""
    text, tp, last = model.text, layout.tp, layout.num_stages - 1
    embedding = text.vocab_size * text.width // tp
    stages = []
    for stage, layers in enumerate(layout.layers_of_stages(text.num_layers)):
        sizes = text_layer(text, tp) * layers
        if stage == 0:
            sizes += (embedding,)
        if stage == last:
            sizes += (text.width,)  # the final norm
            if text.head == "reward":
                sizes += (text.width,)
            elif not (text.tie_embeddings and last == 0):  # a tied head on another stage is a copy of the embedding
                sizes += (embedding,)
            sizes += prediction_layer(text, tp) * text.num_mtp_layers
        has_vision = stage == 0 and model.vision is not None
        stages.append(
            StageParameters(
                sizes,
                vision_encoder(model.vision) if has_vision and model.vision else (),
                projector(model.vision, text.width) if has_vision and model.vision else (),
            )
        )
    return tuple(stages)


def text_layer(text: TextConfig, tp: int) -> tuple[int, ...]:
    attention = text.num_heads * text.head_width
    heads = attention + 2 * text.num_kv_heads * text.head_width
    return (
        text.width, heads // tp * text.width, heads // tp, attention // tp * text.width,
        text.width, 2 * text.ffn_width // tp * text.width, text.ffn_width // tp * text.width,
    )  # fmt: skip


def prediction_layer(text: TextConfig, tp: int) -> tuple[int, ...]:
    """A multi-token-prediction layer: three norms and the joining matrix around a decoder layer."""
    return (text.width,) * 3 + (2 * text.width * text.width // tp, *text_layer(text, tp))


def vision_encoder(vision: VisionConfig) -> tuple[int, ...]:
    width, ffn = vision.width, vision.ffn_width
    block = (
        width, 3 * width * width, 3 * width, width * width, width,
        width, ffn * width, ffn, ffn * width, ffn, width * ffn, width,
    )  # fmt: skip
    return (vision.patch_bytes * width, *block * vision.depth)


def projector(vision: VisionConfig, text_width: int) -> tuple[int, ...]:
    merged = vision.width * vision.merge_factor
    return (vision.width, merged * merged, merged, merged * text_width, text_width)
