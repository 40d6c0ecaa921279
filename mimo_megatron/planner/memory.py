"""The memory peak of one rank of every pipeline stage: what stays, and what the schedule holds at its worst moment."""

from collections.abc import Sequence
from dataclasses import dataclass

from mimo_megatron.config.run import ModuleName, RunConfig
from mimo_megatron.planner import fp8_memory, schedule
from mimo_megatron.planner.activations import stage_parts
from mimo_megatron.planner.offload import Moment, Row
from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.parameters import StageParameters, stage_parameters
from mimo_megatron.planner.setting import WIDE, Setting

_PARTS: tuple[ModuleName, ...] = ("vision", "projector", "text")
_ALIGNED = 64  # megatron starts every parameter of a buffer at a multiple of this


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage, by what they are for; ``total`` is the peak of counted tensors."""

    weights: int
    gradients: int
    optimizer: int
    inputs: int
    """This step's packs, pixels above all, and buffers that are kept between steps."""
    activations: int
    """Saved by microbatches in flight, at the moment of the peak."""
    passing: int
    """What the operation at the peak needs beside, gradients of activations and of single weights above all."""
    host: int = 0
    """At most, of activations that wait on the host; not part of the device's peak."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.inputs + self.activations + self.passing

    @property
    def by_name(self) -> dict[str, int]:
        """What ``total`` is the sum of."""
        return {name: value for name, value in vars(self).items() if name != "host"}


def rank_memory(
    config: RunConfig,
    setting: Setting,
    dp: int,
    packs: Sequence[PackShape],
    rank: int,
    *,
    cp_rank: int = 0,
    num_microbatches: int = 0,
) -> RankMemory:
    """The peak on pipeline rank ``rank`` in a step over ``packs``, its microbatches in order.

    ``num_microbatches`` where there are more of them, alike: what is in flight does not grow with them, the inputs do.
    """
    weights, gradients, optimizer, largest = _state(config, setting, dp, rank)
    (saved, passing), host = _worst_moment(setting, packs, rank, cp_rank)
    inputs = _inputs(setting, packs, max(num_microbatches, len(packs)), has_media=rank == 0)
    inputs += _kept_buffer(setting, packs)
    update = _update(setting, largest)
    if update > saved + passing:
        saved, passing = 0, update
    return RankMemory(weights, gradients, optimizer, inputs, saved, passing, host)


def _state(config: RunConfig, setting: Setting, dp: int, rank: int) -> tuple[int, int, int, int]:
    """Bytes of weights, gradient buffers and optimizer shards, and elements of the largest trained tensor's shard.

    Trained weights lie in megatron's padded buffers with a gradient each, in 4 bytes. The optimizer divides both
    moments, and 4-byte weights where training is in bf16, over dp x cp. Frozen parts have weights only. What FP8 holds
    all the time is counted with the weights.
    """
    layout = config.parallel
    stages = stage_parameters(config.model, layout)[rank :: layout.pp]
    frozen = sum(sum(stage.sizes(part)) for stage in stages for part in _PARTS if part not in setting.trained)
    padded = sum(_buffer(stage, setting, dp * layout.cp) for stage in stages)
    largest = max((max(stage.sizes(part), default=0) for stage in stages for part in setting.trained), default=0)
    copies = 2 + (setting.value_bytes < WIDE)
    shards = dp * layout.cp
    of_fp8 = sum(fp8_memory.weight_bytes(setting, stage) for stage in range(rank, layout.num_stages, layout.pp))
    return (
        (padded + frozen) * setting.value_bytes + of_fp8,
        padded * WIDE,
        padded // shards * copies * WIDE,
        min(largest, padded // shards),
    )


def _buffer(stage: StageParameters, setting: Setting, shards: int) -> int:
    sizes = [size for part in _PARTS if part in setting.trained for size in stage.sizes(part)]
    aligned = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)
    unit = max(shards, 1) * 128
    return -(-aligned // unit) * unit


def _update(setting: Setting, largest: int) -> int:
    """What AdamW's step needs beside: nothing on CUDA, where one kernel does it in place (``mcore/adam.py``)."""
    return 0 if setting.device == "cuda" else 2 * largest * WIDE


def _inputs(setting: Setting, packs: Sequence[PackShape], num_microbatches: int, *, has_media: bool) -> int:
    """On CUDA a pack comes when its turn does, while the one before may still be there, and inner stages get no pixels;
    on the CPU the step's packs are simply all there."""
    if setting.device == "cuda":
        return 2 * max(_input(setting, pack, has_media=has_media) for pack in packs)
    return sum(_input(setting, pack) for pack in packs) * num_microbatches // len(packs)


def _input(setting: Setting, pack: PackShape, *, has_media: bool = True) -> int:
    """One pack, whole on every rank: pixels, coordinates, and the indexes and labels of its slots."""
    vision, t = setting.model.vision if has_media else None, setting.local_slots(pack)
    pixels = pack.pixel_bytes(vision) + pack.num_patches * (2 * 8 + 8 // vision.merge_factor) if vision else 0
    merged = pack.num_patches // vision.merge_factor if vision else 0
    lanes = 1 + setting.model.text.num_mtp_layers
    rows = pack.num_rows // setting.layout.cp
    local = lanes * (8 * t + (8 + 8 + 4) * rows + 16 * merged // setting.layout.cp)
    return pixels + 3 * 8 * pack.num_slots + local + (8 * pack.num_slots if setting.layout.cp > 1 else 0)


def _kept_buffer(setting: Setting, packs: Sequence[PackShape]) -> int:
    """Megatron gathers a layer's whole input into one buffer that it keeps, under sequence parallelism."""
    if not setting.layout.sequence_parallel:
        return 0
    return max(setting.local_slots(pack) for pack in packs) * setting.model.text.width * setting.value_bytes


def _worst_moment(setting: Setting, packs: Sequence[PackShape], rank: int, cp_rank: int) -> tuple[Moment, int]:
    """(saved by other microbatches and this one, needed beside) when their sum is largest over the schedule; and the
    most that waits on the host."""
    layout = setting.layout
    rows = {
        (pack, chunk): Row(tuple(stage_parts(setting, chunk * layout.pp + rank, pack, cp_rank)), setting.offload)
        for pack in set(packs)
        for chunk in range(layout.vpp)
    }
    held = host = most_on_host = 0
    worst: Moment = (0, 0)
    newest: dict[int, tuple[int, list[int]]] = {}
    """By chunk: the last microbatch to run forward, and its newest layers, which are still on the device."""
    for kind, microbatch, chunk in schedule.order(layout.pp, layout.vpp, rank, len(packs)):
        row, (last, leaving) = rows[packs[microbatch], chunk], newest.get(chunk, (-1, []))
        others = sum(sum(sizes) for other, (_, sizes) in newest.items() if other != chunk)
        if kind == "forward":
            moments = row.forward(leaving)
            newest[chunk] = microbatch, row.leaving_after(leaving)
            host += row.on_host
        else:
            held -= row.stays
            is_newest = last == microbatch
            others += 0 if is_newest else sum(leaving)
            moments = row.backward(leaving if is_newest else ())
            if is_newest:
                newest[chunk] = -1, []
        for saved, passing in moments:
            worst = max(worst, (held + others + saved, passing), key=sum)
        most_on_host = max(most_on_host, host)
        if kind == "forward":
            held += row.stays
        else:
            host -= row.on_host
    return worst, most_on_host
