"""What the planner found, as text of at most 120 columns and as JSON."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mimo_megatron.config.run import RunConfig
from mimo_megatron.planner.hardware import CONTEXT_BYTES, FRAGMENTATION, GIB, LINK_FRACTION, Efficiency, Gpu
from mimo_megatron.planner.packs import Packs
from mimo_megatron.planner.search import Candidate
from mimo_megatron.planner.setting import Setting

COLUMNS = 120
DAY = 86_400.0
_TERMS = {
    "weights": "weights",
    "gradients": "gradient buffers",
    "optimizer": "optimizer state",
    "inputs": "the step's packs on the device",
    "activations": "activations that wait for their backward",
    "passing": "temporaries",
}


def layout_name(candidate: Candidate) -> str:
    layout = candidate.config.parallel
    parts = [f"tp {layout.tp}", f"pp {layout.pp}", f"cp {layout.cp}", f"dp {candidate.dp}"]
    if layout.vpp > 1:
        parts.insert(2, f"vpp {layout.vpp}")
    recompute = candidate.config.train.recompute
    return ", ".join([*parts, f"recompute {recompute}"])


def stage_layers_text(candidate: Candidate) -> str:
    """``0, 12 x3``: three equal stages in succession after an empty one."""
    stages = candidate.config.parallel.layers_of_stages(candidate.config.model.text.num_layers)
    runs = [(layers, len(list(group))) for layers, group in groupby(stages)]
    return ", ".join(f"{layers} x{times}" if times > 1 else str(layers) for layers, times in runs)


def verdict(candidate: Candidate) -> str:
    """Whether the layout fits, by how much, and what takes most."""
    room, need = candidate.gpu.memory_bytes, max(candidate.peaks)
    rank = candidate.peaks.index(need)
    name, most = max(candidate.ranks[rank].by_name.items(), key=lambda item: item[1])
    where = f" on pipeline rank {rank}" if candidate.config.parallel.pp > 1 else ""
    answer = (
        f"fits, with {(room - need) / GIB:.1f} GiB to spare" if candidate.fits
        else f"does NOT fit: {(need - room) / GIB:.1f} GiB too much"
    )  # fmt: skip
    return f"{answer} (needs {need / GIB:.1f} of {room / GIB:.1f} GiB{where}; {most / GIB:.1f} GiB are {_TERMS[name]})"


def memory_table(candidate: Candidate) -> Table:
    table = _table("Memory of a GPU by pipeline rank, GiB at the worst moment")
    for name in ("rank", "layers", "weights", "gradients", "optimizer", "inputs", "activations", "temporaries"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("overhead", justify="right")
    table.add_column("needs", justify="right")
    layout = candidate.config.parallel
    stages = layout.layers_of_stages(candidate.config.model.text.num_layers)
    for rank, (memory, peak) in enumerate(zip(candidate.ranks, candidate.peaks, strict=True)):
        own = "+".join(map(str, stages[rank :: layout.pp])) + (
            " +vision" if rank == 0 and _has_vision(candidate) else ""
        )
        values = [*memory.by_name.values(), peak - memory.total]
        style = "red" if peak > candidate.gpu.memory_bytes else "green"
        table.add_row(str(rank), own, *(f"{one / GIB:.1f}" for one in values), Text(f"{peak / GIB:.1f}", style))
    return table


def _table(title: str) -> Table:
    return Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip


def _has_vision(candidate: Candidate) -> bool:
    return candidate.config.model.vision is not None


def prediction(candidate: Candidate) -> str:
    cost, config = candidate.cost, candidate.config
    return (
        f"predicted step {seconds_text(cost.seconds)}: {candidate.num_microbatches} microbatches, pipeline idle "
        f"{cost.pipeline.bubble:.0%}, vision {cost.vision_share:.0%} of the work, waiting for communication "
        f"{cost.communication_share:.0%}\n"
        f"{cost.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {cost.model_flops_share:.0%}, "
        f"{run_text(cost.seconds * config.train.steps)} for {config.train.steps:,} steps"
    )


def seconds_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def run_text(seconds: float) -> str:
    """The time of a whole run, in the unit that a reader would choose."""
    for unit, name in ((DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return seconds_text(seconds)


def best_table(candidates: Sequence[Candidate]) -> Table:
    table = _table("Best layouts that fit, fastest first (predictions; tok/s of one GPU)")
    table.add_column("", justify="right")
    table.add_column("layout", no_wrap=True)
    table.add_column("recompute", no_wrap=True)
    for name in ("GiB", "idle", "vision", "step", "tok/s", "run"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, one in enumerate(candidates, 1):
        layout, cost, steps = one.config.parallel, one.cost, one.config.train.steps
        low, high = min(one.peaks) / GIB, max(one.peaks) / GIB
        table.add_row(
            str(place), layout_text(one), one.config.train.recompute,
            f"{low:.0f}-{high:.0f}" if layout.pp > 1 else f"{high:.0f}",
            f"{cost.pipeline.bubble:.0%}", f"{cost.vision_share:.0%}",
            seconds_text(cost.seconds), f"{cost.tokens_per_second_per_gpu:,.0f}",
            run_text(cost.seconds * steps),
        )  # fmt: skip
    return table


def layout_text(candidate: Candidate) -> str:
    """Axes above 1, how vision is placed where that differs from the plain way, and uneven stages below."""
    layout = candidate.config.parallel
    axes = dict(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, cp=layout.cp, dp=candidate.dp)
    words = [f"{name}{size}" for name, size in axes.items() if size > 1 or name == "dp"]
    if layout.vision_placement == "balanced":
        words.append("balanced")
    stages = f"\n  stages {stage_layers_text(candidate)}" if layout.stage_layers else ""
    return " ".join(words) + stages


def overrides(candidate: Candidate) -> str:
    """The layout as command-line overrides of any recipe."""
    layout = candidate.config.parallel
    stages = f"[{','.join(map(str, layout.stage_layers))}]" if layout.stage_layers else "null"
    sizes = [f"parallel.{name}={getattr(layout, name)}" for name in ("tp", "pp", "vpp", "cp")]
    return " ".join(
        [
            *sizes,
            f"parallel.sequence_parallel={str(layout.sequence_parallel).lower()}",
            f"parallel.stage_layers={stages}",
            f"parallel.vision_placement={layout.vision_placement}",
            f"train.recompute={candidate.config.train.recompute}",
        ]
    )


def page(
    config: RunConfig,
    num_gpus: int,
    gpu: Gpu,
    packs: Packs,
    efficiency: Efficiency,
    own: Candidate | str,
    best: Sequence[Candidate],
    num_layouts: int,
) -> Iterator[RenderableType]:
    """``own`` is the recipe's layout, or why the rules refuse it."""
    yield Text(f"Plan of {config.name} on {num_gpus} x {gpu.name}", "bold")
    for note in packs.notes:
        yield Text(f"- {note}")
    for note in counted(config, gpu):
        yield Text(f"- {note}")
    if config.train.offload_activations != "none":
        yield Text("- the time of the copies of train.offload_activations is not modelled")
    yield Text("")
    if isinstance(own, str):
        yield Text(f"The recipe's own layout is refused:\n{own}\n", "red")
    else:
        yield Text.assemble(("The recipe's own layout: ", "bold"), layout_name(own))
        yield Text(verdict(own), "green" if own.fits else "bold red")
        yield Text("")
        yield memory_table(own)
        if host := max(rank.host for rank in own.ranks):
            yield Text(f"On the host, for each GPU: {host / GIB:.1f} GiB of activations (train.offload_activations)")
        yield Text("\n" + prediction(own) + "\n")
    if best:
        yield best_table(best)
        yield Text(
            f"\n{num_layouts} layouts weighed; of those that differ only in vpp, stages or vision placement, the "
            "fastest. GiB: least and "
            f"most loaded rank.\nThe first as overrides: {overrides(best[0])}\n"
        )
    yield Text(
        f"Times are predictions: compute at {efficiency.text:.0%} of the peak in the decoder, {efficiency.vision:.0%} "
        f"in vision (--mfu, --vision-mfu), links at {LINK_FRACTION:.0%}, nothing overlapped, all packs alike.\n"
        f"Memory counts tensors; CPU runs confirm it to 10 %. Assumed on top: {FRAGMENTATION - 1:.0%} of what comes "
        f"and goes for the allocator, {CONTEXT_BYTES / GIB:.0f} GiB for CUDA and NCCL. See docs/planner.md.",
        "dim",
    )


def counted(config: RunConfig, gpu: Gpu) -> Iterator[str]:
    """What is taken for attention and for FP8, where that is not plain."""
    train, setting = config.train, Setting.of(config)
    kinds = dict(vision=setting.vision_attention, text=setting.text_attention)
    if config.model.vision is None:
        del kinds["vision"]
    if set(kinds.values()) != {"sdpa"}:
        yield "attention: " + ", ".join(f"{kind} of the {part} model" for part, kind in kinds.items())
    if "auto" in (train.vision_attention, train.text_attention):
        yield "attention that is auto is counted as sdpa, which it is where nothing has been timed"
    if train.fp8 is None:
        return
    layers = config.model.text.num_layers
    num_fp8 = sum(setting.is_in_fp8(layer) for layer in range(layers))
    products = f"products at {(gpu.fp8_flops or 0) / 1e12:,.0f} TFLOP/s by the data sheet, rounding not timed"
    if setting.engine == "twin":
        products = "products in fp32, slower than without FP8; times are counted as without it"
    rounding = f", rounded by {setting.rounding}" if setting.engine == "scaled_mm" else ""
    is_open = train.fp8.engine == "auto" and setting.engine != "transformer-engine"
    but = ", not as with Transformer Engine, which auto takes where it is installed" if is_open else ""
    yield f"FP8 in {num_fp8} of {layers} decoder layers: {products}; memory as with {setting.engine}{rounding}{but}"
    if parts := " and ".join(train.fp8.encoder_parts):
        yield f"FP8 of {parts} is not counted: times and memory are those of {train.precision}"


def show(parts: Iterable[RenderableType]) -> None:
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width, and rich's 80 columns would cut tables
        console = Console(width=COLUMNS)
    console.print(Group(*parts))


def as_json(candidate: Candidate) -> dict[str, Any]:
    cost = candidate.cost
    return {
        "parallel": candidate.config.parallel.model_dump(),
        "dp": candidate.dp,
        "recompute": candidate.config.train.recompute,
        "microbatches": candidate.num_microbatches,
        "fits": candidate.fits,
        "gpu_memory_bytes": candidate.gpu.memory_bytes,
        "ranks": [
            {**memory.by_name, "tensor_bytes": memory.total, "gpu_bytes": peak, "host_bytes": memory.host}
            for memory, peak in zip(candidate.ranks, candidate.peaks, strict=True)
        ],
        "predicted": {
            "step_seconds": cost.seconds,
            "tokens_per_second_per_gpu": cost.tokens_per_second_per_gpu,
            "mfu": cost.model_flops_share,
            "bubble": cost.pipeline.bubble,
            "vision_share": cost.vision_share,
            "communication_share": cost.communication_share,
            "days": cost.seconds * candidate.config.train.steps / DAY,
        },
    }
