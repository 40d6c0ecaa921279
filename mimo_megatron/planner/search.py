"""Every layout of N GPUs that the rules allow, with its memory and predicted step time, best first."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from mimo_megatron.config.check import check
from mimo_megatron.config.run import ParallelConfig, Recompute, RunConfig, VisionPlacement
from mimo_megatron.errors import ConfigError
from mimo_megatron.planner.cost import StepCost, stage_seconds, step_cost
from mimo_megatron.planner.hardware import CONTEXT_BYTES, FRAGMENTATION, Efficiency, Gpu
from mimo_megatron.planner.memory import RankMemory, rank_memory
from mimo_megatron.planner.packs import Packs, PackShape
from mimo_megatron.planner.setting import Setting

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_MOST_VPP = 4
MOST_GPUS = 4096


@dataclass(frozen=True)
class Candidate:
    """One layout on ``num_gpus``."""

    config: RunConfig
    dp: int
    ranks: tuple[RankMemory, ...]
    """The worst over packs, of every pipeline rank."""
    cost: StepCost
    gpu: Gpu

    @property
    def num_microbatches(self) -> int:
        return self.config.train.packs_per_step // self.dp

    @property
    def peaks(self) -> tuple[int, ...]:
        """Bytes that each pipeline rank needs on its GPU."""
        return tuple(gpu_bytes(rank) for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return max(self.peaks) <= self.gpu.memory_bytes


def gpu_bytes(memory: RankMemory) -> int:
    """Counted tensors, with the allocator's loss on what comes and goes, and the context."""
    moving = memory.activations + memory.passing
    return round(memory.total - moving + moving * FRAGMENTATION) + CONTEXT_BYTES


def evaluate(config: RunConfig, num_gpus: int, packs: Packs, gpu: Gpu, efficiency: Efficiency) -> Candidate:
    """The recipe in the layout it names. ``ConfigError`` where a rule of ``config.check`` refuses it."""
    check(config, num_gpus)
    dp = num_gpus // config.parallel.model_ranks
    setting = Setting.of(config)
    num_microbatches = config.train.packs_per_step // dp
    shown = min(num_microbatches, config.parallel.pp * (3 if config.parallel.vpp > 1 else 1) + 1)
    shown -= shown % config.parallel.pp if config.parallel.vpp > 1 else 0  # whole groups
    ranks = tuple(
        _worst(
            rank_memory(config, setting, dp, [pack] * shown, rank, cp_rank=cp_rank, num_microbatches=num_microbatches)
            for pack in packs.worst
            for cp_rank in {0, config.parallel.cp - 1}
        )
        for rank in range(config.parallel.pp)
    )
    return Candidate(config, dp, ranks, step_cost(config, setting, dp, packs.typical, gpu, efficiency), gpu)


def _worst(peaks: Iterable[RankMemory]) -> RankMemory:
    """That of the device, and of the host, which may be of another pack."""
    found = list(peaks)
    return replace(max(found, key=lambda one: one.total), host=max(one.host for one in found))


def with_layout(config: RunConfig, layout: ParallelConfig, recompute: Recompute) -> RunConfig:
    train = config.train.model_copy(update={"recompute": recompute})
    return config.model_copy(update={"parallel": layout, "train": train})


def layouts(config: RunConfig, num_gpus: int, packs: Packs, gpu: Gpu, efficiency: Efficiency) -> Iterator[RunConfig]:
    """Every layout worth a look, before the rules: tp inside a node, sequence parallel wherever tp is above 1, both
    placements of vision, equal stages and stages balanced by their predicted cost."""
    for grid, recompute in product(_grids(config, num_gpus, gpu), _RECOMPUTE):
        plain = with_layout(config, grid, recompute)
        yield from _distinct(plain, _balanced(plain, packs.typical, gpu, efficiency))


def _grids(config: RunConfig, num_gpus: int, gpu: Gpu) -> Iterator[ParallelConfig]:
    num_layers = config.model.text.num_layers
    for tp, cp in product(_powers(min(gpu.gpus_per_node, num_gpus)), _powers(num_gpus)):
        shares = tp * cp > 1 and config.model.vision is not None
        placements: tuple[VisionPlacement, ...] = ("replicated", "balanced") if shares else ("replicated",)
        for pp in range(1, min(num_gpus // (tp * cp), num_layers + 1) + 1):
            if num_gpus % (tp * cp * pp):
                continue
            most_vpp = max(min(_MOST_VPP, num_layers // pp), 1) if pp > 1 else 1
            for vpp, placement in product(range(1, most_vpp + 1), placements):
                yield ParallelConfig(tp=tp, pp=pp, vpp=vpp, cp=cp, sequence_parallel=tp > 1, vision_placement=placement)


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def _distinct(plain: RunConfig, balanced: RunConfig) -> Iterator[RunConfig]:
    layers, stages = plain.model.text.num_layers, plain.parallel.num_stages
    equal = (layers // stages,) * stages if layers % stages == 0 else None
    if equal is not None:
        yield plain
    if plain.parallel.pp > 1 and balanced.parallel.stage_layers != equal:
        yield balanced


def _balanced(config: RunConfig, pack: PackShape, gpu: Gpu, efficiency: Efficiency) -> RunConfig:
    """Layer after layer to the stage that is lightest so far: vision makes the first heavier, the head the last."""
    layout = config.parallel
    if layout.pp == 1:
        return config
    setting = Setting.of(config)
    bare, one_each = (
        [
            one.forward + one.backward
            for one in stage_seconds(setting, pack, gpu, efficiency, [layers] * layout.num_stages)
        ]
        for layers in (0, 1)
    )
    layer = min(full - empty for full, empty in zip(one_each, bare, strict=True))
    counts = [0] * layout.num_stages
    heap = [(seconds, stage) for stage, seconds in enumerate(bare)]
    heapq.heapify(heap)
    for _ in range(config.model.text.num_layers):
        seconds, stage = heapq.heappop(heap)
        counts[stage] += 1
        heapq.heappush(heap, (seconds + layer, stage))
    return with_layout(config, layout.model_copy(update={"stage_layers": tuple(counts)}), config.train.recompute)


def _is_allowed(config: RunConfig, num_gpus: int) -> bool:
    try:
        check(config, num_gpus)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True)
class Found:
    best: tuple[Candidate, ...]
    """The fastest that fit, in order."""
    num_layouts: int
    """Layouts that were weighed."""


def search(config: RunConfig, num_gpus: int, packs: Packs, gpu: Gpu, efficiency: Efficiency, most: int = 8) -> Found:
    """The ``most`` fastest layouts that fit; of those that differ only in vpp, stages or vision placement, the
    fastest.

    Layouts are looked at in the order of a bound, the busiest rank's work without any waiting, and the search ends
    where no further one can be faster than those found.
    """
    bounded = [
        (_least_seconds(one, num_gpus, packs.typical, gpu, efficiency), place, one)
        for place, one in enumerate(layouts(config, num_gpus, packs, gpu, efficiency))
    ]
    fitting: dict[tuple[object, ...], Candidate] = {}
    best: list[Candidate] = []
    for bound, _, one in sorted(bounded, key=lambda entry: entry[:2]):
        if len(best) == most and bound >= best[-1].cost.seconds:
            break
        if not _is_allowed(one, num_gpus):
            continue
        candidate = evaluate(one, num_gpus, packs, gpu, efficiency)
        kind = (one.parallel.tp, one.parallel.pp, one.parallel.cp, one.train.recompute)
        if candidate.fits and (kind not in fitting or candidate.cost.seconds < fitting[kind].cost.seconds):
            fitting[kind] = candidate
            best = sorted(fitting.values(), key=lambda each: each.cost.seconds)[:most]
    return Found(tuple(best), len(bounded))


def _least_seconds(config: RunConfig, num_gpus: int, pack: PackShape, gpu: Gpu, efficiency: Efficiency) -> float:
    layout = config.parallel
    stages = stage_seconds(Setting.of(config), pack, gpu, efficiency)
    busiest = max(sum(one.forward + one.backward for one in stages[rank :: layout.pp]) for rank in range(layout.pp))
    return busiest * config.train.packs_per_step * layout.model_ranks / num_gpus


def smallest_fit(config: RunConfig, num_gpus: int, packs: Packs, gpu: Gpu, efficiency: Efficiency) -> Candidate | None:
    """A layout that fits on the fewest GPUs above ``num_gpus``, of twice, four times, ... as many."""
    more = num_gpus * 2
    while more <= MOST_GPUS:
        if best := search(config, more, packs, gpu, efficiency, most=1).best:
            return best[0]
        more *= 2
    return None


def own_layout(config: RunConfig, num_gpus: int, packs: Packs, gpu: Gpu, efficiency: Efficiency) -> Candidate | str:
    """The recipe as it stands, or what the rules say against it on so many GPUs."""
    try:
        return evaluate(config, num_gpus, packs, gpu, efficiency)
    except ConfigError as error:
        return str(error)


def require_some(
    found: Found, config: RunConfig, num_gpus: int, packs: Packs, gpu: Gpu, efficiency: Efficiency
) -> None:
    """``ConfigError`` with the remedy where no layout fits."""
    if found.best:
        return
    larger = smallest_fit(config, num_gpus, packs, gpu, efficiency)
    if larger is None:
        raise ConfigError(
            f"no layout of {config.name!r} fits {num_gpus} x {gpu.name}, nor up to {MOST_GPUS}: where the rules refuse "
            "them all, `mimo-megatron config show RECIPE --ranks N` says why; else shorten data.pack_tokens and "
            "pack_patches, or take a GPU with more memory"
        )
    enough = larger.dp * larger.config.parallel.model_ranks
    raise ConfigError(
        f"no layout of {config.name!r} fits {num_gpus} x {gpu.name}: take {enough} (the first of twice, four times, "
        "... as many where one fits), shorten data.pack_tokens and pack_patches, or take a GPU with more memory"
    )
