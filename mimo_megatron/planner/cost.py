"""How long a step may take: FLOPs of every stage, the pipeline's schedule, and bytes over stated links.

A prediction, not a measurement. Products in FP8 run at their own peak, and rounding takes no time. Communication is
counted as if nothing hid it, except that between pipeline stages, which delays the stage behind. FLOPs are those of
``train/flops.py``; recomputation is added here.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import ModuleName, RunConfig
from mimo_megatron.planner import schedule
from mimo_megatron.planner.hardware import LINK_FRACTION, Efficiency, Gpu, group_bandwidth
from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.parameters import stage_parameters
from mimo_megatron.planner.setting import WIDE, Setting
from mimo_megatron.train.flops import FlopCount, step_flops


@dataclass(frozen=True)
class StageSeconds:
    """Of one microbatch on one stage; backward includes what is computed again."""

    forward: float
    backward: float
    vision: float
    """The part of both that the vision encoder and the projector take."""
    communication: float
    """The part of both that waits for tensor- and context-parallel collectives."""


@dataclass(frozen=True)
class StepCost:
    seconds: float
    stages: tuple[StageSeconds, ...]
    pipeline: schedule.Timeline
    update_seconds: float
    """Gradient reduce-scatter, parameter all-gather and the optimizer's pass over its shard."""
    tokens_per_second_per_gpu: float
    model_flops_share: float
    """MFU of the whole step: the model's FLOPs without recomputation / (seconds x GPUs x peak)."""

    @property
    def vision_share(self) -> float:
        """Vision's share of all seconds of work."""
        return sum(one.vision for one in self.stages) / sum(one.forward + one.backward for one in self.stages)

    @property
    def communication_share(self) -> float:
        """Of the step, on the busiest rank: tensor- and context-parallel waits, and the update."""
        pace = max(self.pipeline.busy)
        worst = sum(one.communication for one in self.stages) / sum(one.forward + one.backward for one in self.stages)
        return (worst * pace + self.update_seconds) / self.seconds


def flop_counts(setting: Setting, pack: PackShape) -> tuple[FlopCount, FlopCount]:
    """(forward, forward and backward) of one pack, over all ranks."""
    return _counted(setting.model, pack, frozenset()), _counted(setting.model, pack, setting.trained)


@lru_cache(maxsize=64)
def _counted(model: ModelConfig, pack: PackShape, trained: frozenset[ModuleName]) -> FlopCount:
    return step_flops(model, pack.runs, pack.grids, trained, num_head_rows=pack.num_rows)


def stage_seconds(
    setting: Setting, pack: PackShape, gpu: Gpu, efficiency: Efficiency, layers: Sequence[int] | None = None
) -> tuple[StageSeconds, ...]:
    """One microbatch of ``pack`` on every stage; ``layers`` replaces the layout's decoder layers of each."""
    text, layout = setting.model.text, setting.layout
    forward, both = flop_counts(setting, pack)
    shards = layout.tp * layout.cp
    text_rate, vision_rate = gpu.flops * efficiency.text, gpu.flops * efficiency.vision
    depth = text.num_layers + text.num_mtp_layers
    layer_forward = (forward.text_linear + forward.text_attention) / depth / shards / text_rate
    layer_both = (both.text_linear + both.text_attention) / depth / shards / text_rate
    layer_both += sum(_again(setting, forward)) / depth / shards / text_rate
    fp8_forward, fp8_both = (
        linear / depth / shards * _fp8_gain(setting, gpu) / text_rate
        for linear in (forward.text_linear, both.text_linear + _again(setting, forward)[0])
    )
    head_forward, head_both = (one.head / shards / text_rate for one in (forward, both))
    head_both += head_forward * (setting.head_logits is not None)  # the logits' product, again
    share = setting.vision_share(pack)
    vision_forward, vision_both = (
        (one.vision_linear + one.vision_attention + one.projector) * share / vision_rate for one in (forward, both)
    )
    if setting.recompute_vision and "vision" in setting.trained:
        vision_both += (forward.vision_linear + forward.vision_attention) * share / vision_rate
    layer_out, layer_back = _layer_communication(setting, pack, gpu)
    given = layers if layers is not None else layout.layers_of_stages(text.num_layers)
    stages = []
    for stage, number in enumerate(given):
        first = sum(given[:stage])
        num_fp8 = sum(setting.is_in_fp8(layer) for layer in range(first, first + number))
        is_first, is_last = stage == 0, stage == len(given) - 1
        gather = is_first * _gather_seconds(setting, pack, gpu)
        number += text.num_mtp_layers * is_last
        out = number * layer_forward + is_first * vision_forward + is_last * head_forward
        back = number * (layer_both - layer_forward) + is_first * (vision_both - vision_forward)
        back += is_last * (head_both - head_forward)
        out -= num_fp8 * fp8_forward
        back -= num_fp8 * (fp8_both - fp8_forward)
        stages.append(
            StageSeconds(
                out + number * layer_out + gather,
                back + number * layer_back + gather,
                is_first * vision_both,
                number * (layer_out + layer_back) + 2 * gather,
            )
        )
    return tuple(stages)


def _fp8_gain(setting: Setting, gpu: Gpu) -> float:
    """Share of a product's time that FP8 saves by the data sheet; nothing with the twin, which is slower than bf16."""
    if setting.fp8 is None or setting.engine == "twin" or gpu.fp8_flops is None:
        return 0.0
    return 1 - gpu.flops / gpu.fp8_flops


def _again(setting: Setting, forward: FlopCount) -> tuple[float, float]:
    """FLOPs of the decoder that recomputation adds, over all its layers: of (linear layers, attention)."""
    if setting.recompute == "full":
        return forward.text_linear, forward.text_attention
    if setting.recompute == "selective":
        text = setting.model.text
        mlp = 3 * text.ffn_width
        heads = 2 * (text.num_heads + text.num_kv_heads) * text.head_width
        return forward.text_linear * mlp / (mlp + heads), forward.text_attention
    return 0.0, 0.0


def _layer_communication(setting: Setting, pack: PackShape, gpu: Gpu) -> tuple[float, float]:
    """Seconds that one decoder layer waits in its forward and backward.

    tp: two all-reduces of the hidden states each way; with sequence parallelism two all-gathers and two
    reduce-scatters, and in the backward the inputs of both column-parallel layers are gathered once more. cp: keys
    and values are gathered, and their gradients summed over all slots.
    """
    layout, text, b = setting.layout, setting.model.text, setting.value_bytes
    whole = setting.local_slots(pack) * text.width * b
    out = back = 0.0
    if layout.tp > 1:
        pass_seconds = whole * (layout.tp - 1) / layout.tp / group_bandwidth(gpu, 1, layout.tp)
        out += 4 * pass_seconds
        back += (6 if layout.sequence_parallel and "text" in setting.trained else 4) * pass_seconds
    if layout.cp > 1:
        keys = 2 * pack.num_slots * text.num_kv_heads * text.head_width // layout.tp * b
        pass_seconds = keys * (layout.cp - 1) / layout.cp / group_bandwidth(gpu, layout.tp, layout.cp)
        out += pass_seconds
        back += 2 * pass_seconds
    again = {"none": 0.0, "selective": 0.5 * out, "full": out}[setting.recompute]
    return out, back + again


def _gather_seconds(setting: Setting, pack: PackShape, gpu: Gpu) -> float:
    """Shared-out images: the features of all tp and cp ranks are gathered; their gradient takes the same way back."""
    vision, layout, ranks = setting.model.vision, setting.layout, setting.layout.tp * setting.layout.cp
    if vision is None or not setting.shares_vision:
        return 0.0
    num_bytes = pack.num_patches // vision.merge_factor * setting.model.text.width * setting.value_bytes
    return num_bytes * (ranks - 1) / ranks / group_bandwidth(gpu, 1, ranks if layout.tp > 1 else layout.cp)


def hop_seconds(setting: Setting, pack: PackShape, gpu: Gpu, dp: int) -> float:
    """One microbatch's stream from a pipeline rank to the next."""
    layout, text = setting.layout, setting.model.text
    num_bytes = setting.stream_slots(pack) * text.width * setting.value_bytes * (1 + text.num_mtp_layers)
    stride = layout.tp * layout.cp * dp
    is_inside = stride * layout.pp <= gpu.gpus_per_node
    return num_bytes / ((gpu.node_bandwidth if is_inside else gpu.network_bandwidth) * LINK_FRACTION)


def update_seconds(config: RunConfig, setting: Setting, gpu: Gpu, dp: int) -> float:
    """The end of a step on the slowest pipeline rank."""
    layout, shards = config.parallel, dp * config.parallel.cp
    stages = stage_parameters(config.model, layout)
    trained = max(
        sum(sum(stage.sizes(part)) for stage in stages[rank :: layout.pp] for part in setting.trained)
        for rank in range(layout.pp)
    )
    moved = trained * (WIDE + setting.value_bytes) * (shards - 1) / shards / group_bandwidth(gpu, layout.tp, shards)
    # Gradient, weight and two moments are read, the last three written; then the whole gradient buffer is zeroed.
    touched = trained / shards * 7 * WIDE + trained * WIDE
    return moved + touched / gpu.memory_bandwidth + _tp_sum_seconds(config, setting, gpu)


def _tp_sum_seconds(config: RunConfig, setting: Setting, gpu: Gpu) -> float:
    """Shared-out images: the encoder's gradients are summed over tp, once a step, in fp32."""
    layout = config.parallel
    if not setting.shares_vision or layout.tp == 1:
        return 0.0
    first = stage_parameters(config.model, layout)[0]
    numbers = sum(sum(first.sizes(part)) for part in setting.trained & {"vision", "projector"})
    return 2 * numbers * WIDE * (layout.tp - 1) / layout.tp / group_bandwidth(gpu, 1, layout.tp)


def step_cost(
    config: RunConfig, setting: Setting, dp: int, pack: PackShape, gpu: Gpu, efficiency: Efficiency
) -> StepCost:
    """A step whose microbatches are all like ``pack``."""
    layout = config.parallel
    num_gpus = dp * layout.model_ranks
    num_microbatches = config.train.packs_per_step // dp
    stages = stage_seconds(setting, pack, gpu, efficiency)
    pipeline = schedule.step_timeline(
        [one.forward for one in stages],
        [one.backward for one in stages],
        layout.pp,
        num_microbatches,
        transfer=hop_seconds(setting, pack, gpu, dp),
    )
    update = update_seconds(config, setting, gpu, dp)
    seconds = pipeline.total + update
    _, flops = flop_counts(setting, pack)
    packs = config.train.packs_per_step
    return StepCost(
        seconds,
        stages,
        pipeline,
        update,
        packs * pack.num_tokens / seconds / num_gpus,
        sum(astuple(flops)) * packs / (seconds * num_gpus * gpu.flops),
    )
