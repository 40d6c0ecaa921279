"""Rules between the keys of a run, and between the run and the number of ranks: all that fail are reported at once.

Each rule is a small function that yields messages: the failed equation with its values, then the remedy. Rules run
before any device is touched.
"""

from collections.abc import Callable, Iterator

from mimo_megatron.config.check_fp8 import fp8_problems
from mimo_megatron.config.check_rl import rl_problems
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.problems import refuse
from mimo_megatron.config.run import ParallelConfig, RunConfig

Rule = Callable[[RunConfig, int], Iterator[str]]
LayoutRule = Callable[[ModelConfig, ParallelConfig, int], Iterator[str]]
VISION_KERNEL_HEAD_WIDTH = 80
TEXT_KERNEL_HEAD_WIDTHS = (16, 32, 64, 128)
WIDEST_FLASH_HEAD = 256


def check(config: RunConfig, world_size: int) -> None:
    """Nothing where the run fits ``world_size`` ranks, else a ``ConfigError`` that lists every failed rule."""
    problems = [message for rule in LAYOUT_RULES for message in rule(config.model, config.parallel, world_size)]
    problems += [message for rule in RULES for message in rule(config, world_size)]
    problems += fp8_problems(config) + rl_problems(config)
    refuse(f"run {config.name!r} on {_ranks(world_size)}", problems)


def check_layout(model: ModelConfig, layout: ParallelConfig, world_size: int) -> None:
    """Nothing where ``model`` can be laid out so, else a ``ConfigError`` that lists every failed rule."""
    problems = [message for rule in LAYOUT_RULES for message in rule(model, layout, world_size)]
    refuse(f"model {model.name!r} on {_ranks(world_size)}", problems)


def _ranks(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}"


def ranks_fill_the_layout(model: ModelConfig, layout: ParallelConfig, world_size: int) -> Iterator[str]:
    if world_size % layout.model_ranks:
        yield (
            f"ranks ({world_size}) % (parallel.tp {layout.tp} * pp {layout.pp} * cp {layout.cp} = "
            f"{layout.model_ranks}) = {world_size % layout.model_ranks}, must be 0: start a multiple of "
            f"{layout.model_ranks} ranks, or lower tp, pp or cp"
        )


def packs_divide_over_data_parallel_ranks(config: RunConfig, world_size: int) -> Iterator[str]:
    dp, rest = divmod(world_size, config.parallel.model_ranks)
    packs = config.train.packs_per_step
    if config.rl is None and not rest and packs % dp:
        yield (
            f"train.packs_per_step ({packs}) % data-parallel ranks ({world_size} / {config.parallel.model_ranks} = "
            f"{dp}) = {packs % dp}, must be 0: set train.packs_per_step={-(-packs // dp) * dp}"
        )


def training_has_data_and_rl_has_questions(config: RunConfig, world_size: int) -> Iterator[str]:
    num_sources = len(config.data.sources)
    if config.rl is None and not num_sources:
        yield "data.sources is empty: name a folder at least, or the section rl with its questions"
    if config.rl is not None and num_sources:
        yield (
            f"data.sources names {num_sources} folders, but the section rl asks its own questions: "
            "set 'data.sources=[]', or rl=null"
        )


def tensor_parallel_divides_the_text_model(
    model: ModelConfig, layout: ParallelConfig, world_size: int
) -> Iterator[str]:
    tp, text = layout.tp, model.text
    sizes = {
        "num_heads": text.num_heads,
        "num_kv_heads": text.num_kv_heads,
        "ffn_width": text.ffn_width,
        "vocab_size": text.vocab_size,
    }
    for name, size in sizes.items():
        if size % tp:
            yield f"model.text.{name} ({size}) % parallel.tp ({tp}) = {size % tp}, must be 0: lower parallel.tp"


def pipeline_divides_the_layers(model: ModelConfig, layout: ParallelConfig, world_size: int) -> Iterator[str]:
    layers, stages, given = model.text.num_layers, layout.num_stages, layout.stage_layers
    product = f"parallel.pp {layout.pp} * vpp {layout.vpp} = {stages}"
    if given is None and layers % stages:
        some, more = divmod(layers, stages)
        share = ", ".join(str(some + (stage >= stages - more)) for stage in range(stages))
        yield (
            f"model.text.num_layers ({layers}) % ({product}) = {layers % stages}, must be 0: "
            f"choose another pp or vpp, or uneven stages such as 'parallel.stage_layers=[{share}]'"
        )
    if given is not None and (len(given), sum(given)) != (stages, layers):
        yield (
            f"parallel.stage_layers {list(given)} has {len(given)} stages and {sum(given)} layers, but {product} and "
            f"model.text.num_layers is {layers}: list {stages} numbers whose sum is {layers}"
        )


def interleaving_needs_a_pipeline(model: ModelConfig, layout: ParallelConfig, world_size: int) -> Iterator[str]:
    if layout.vpp > 1 and layout.pp == 1:
        yield f"parallel.vpp is {layout.vpp} but parallel.pp is 1: raise pp, or set vpp=1"


def interleaving_fills_the_pipeline(config: RunConfig, world_size: int) -> Iterator[str]:
    layout, packs = config.parallel, config.train.packs_per_step
    dp, rest = divmod(world_size, layout.model_ranks)
    if config.rl is None and layout.vpp > 1 and not rest and packs % dp == 0 and packs // dp % layout.pp:
        unit = dp * layout.pp
        yield (
            f"train.packs_per_step ({packs}) / data-parallel ranks ({dp}) % parallel.pp ({layout.pp}) = "
            f"{packs // dp % layout.pp}, must be 0 with parallel.vpp {layout.vpp}: "
            f"set train.packs_per_step={-(-packs // unit) * unit}"
        )


def packs_cut_evenly(config: RunConfig, world_size: int) -> Iterator[str]:
    layout, slots = config.parallel, config.data.pack_tokens
    shared = layout.tp if layout.sequence_parallel or layout.cp > 1 else 1
    unit = shared * (2 * layout.cp if layout.cp > 1 else 1)
    if slots % unit:
        factors = "2 * cp * tp" if layout.cp > 1 else "tp, for sequence_parallel"
        yield (
            f"data.pack_tokens ({slots}) % ({factors} = {unit}) = {slots % unit}, must be 0: "
            f"set data.pack_tokens={-(-slots // unit) * unit}"
        )


def sequence_parallel_needs_tensor_parallel(
    model: ModelConfig, layout: ParallelConfig, world_size: int
) -> Iterator[str]:
    if layout.sequence_parallel and layout.tp == 1:
        yield "parallel.sequence_parallel is true but parallel.tp is 1: raise tp, or set sequence_parallel=false"


def balanced_vision_needs_ranks_that_share(
    model: ModelConfig, layout: ParallelConfig, world_size: int
) -> Iterator[str]:
    if layout.vision_placement != "balanced":
        return
    if layout.tp * layout.cp == 1:
        yield (
            "parallel.vision_placement is balanced but parallel.tp * cp is 1, so no ranks share a pack's images: "
            "raise tp or cp, or set vision_placement=replicated"
        )
    if model.vision is None:
        yield (
            "parallel.vision_placement is balanced but model.vision is null: set vision_placement=replicated, "
            "or model.vision"
        )


def something_is_trained(config: RunConfig, world_size: int) -> Iterator[str]:
    if all(config.train.module(name).is_frozen for name in ("vision", "projector", "text")):
        yield (
            "nothing is trained: train.vision.lr, train.projector.lr and train.text.lr are all null; "
            "give at least one a learning rate"
        )


def trained_modules_exist(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.model.vision is not None:
        return
    for name in ("vision", "projector"):
        if not config.train.module(name).is_frozen:
            yield f"train.{name}.lr is set but model.vision is null: set train.{name}.lr=null, or model.vision"


def warmup_ends_within_the_run(config: RunConfig, world_size: int) -> Iterator[str]:
    warmup, steps = config.train.schedule.warmup_steps, config.train.steps
    if warmup > steps:
        yield f"train.schedule.warmup_steps ({warmup}) > train.steps ({steps}): shorten the warm-up"


def packs_fit_the_positions(config: RunConfig, world_size: int) -> Iterator[str]:
    slots, positions = config.data.pack_tokens, config.model.text.max_positions
    if slots > positions:
        yield f"data.pack_tokens ({slots}) > model.text.max_positions ({positions}): shorten the packs"


def pixel_limits_are_ordered(config: RunConfig, world_size: int) -> Iterator[str]:
    vision, data = config.model.vision, config.data
    if vision is None:
        return
    smallest = vision.pixel_multiple**2
    if data.min_pixels > data.max_pixels:
        yield f"data.min_pixels ({data.min_pixels}) > data.max_pixels ({data.max_pixels}): swap or change them"
    if data.min_pixels > data.video.max_pixels_per_frame:
        yield (
            f"data.min_pixels ({data.min_pixels}) > data.video.max_pixels_per_frame "
            f"({data.video.max_pixels_per_frame}): raise the video limit or lower min_pixels"
        )
    if data.max_pixels < smallest:
        yield (
            f"data.max_pixels ({data.max_pixels}) < {smallest}, the pixels of one vision token "
            f"({vision.pixel_multiple} x {vision.pixel_multiple}): raise it"
        )


def largest_media_fit_a_pack(config: RunConfig, world_size: int) -> Iterator[str]:
    vision, data = config.model.vision, config.data
    if vision is None:
        return
    most_tokens = min(data.pack_tokens - 1, data.pack_patches // vision.merge_factor)
    limit = f"a pack of {data.pack_tokens} slots and {data.pack_patches} patches holds at most {most_tokens}"
    image_tokens = data.max_pixels // vision.pixel_multiple**2
    if image_tokens > most_tokens:
        yield (
            f"an image of data.max_pixels ({data.max_pixels}) is {image_tokens} vision tokens, but {limit}: "
            f"set data.max_pixels={most_tokens * vision.pixel_multiple**2}, or raise pack_tokens and pack_patches"
        )
    if data.video.max_total_tokens > most_tokens:
        yield (
            f"data.video.max_total_tokens ({data.video.max_total_tokens}) vision tokens, but {limit}: "
            f"set data.video.max_total_tokens={most_tokens}"
        )


def a_pack_can_be_made_ahead(config: RunConfig, world_size: int) -> Iterator[str]:
    data = config.data
    needed = data.making_bytes(config.model, data.pack_patches)
    if config.rl is None and needed > data.prefetch_mib << 20:
        yield (
            f"a full pack of data.pack_tokens ({data.pack_tokens}) and data.pack_patches ({data.pack_patches}) takes "
            f"{needed:,} bytes while it is made, more than data.prefetch_mib ({data.prefetch_mib} MiB = "
            f"{data.prefetch_mib << 20:,} bytes): set data.prefetch_mib={-(-needed >> 20)}, better twice that for "
            "each worker"
        )


def the_vision_kernel_has_heads_of_its_width(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.train.vision_attention == "triton":
        vision = config.model.vision
        if vision is None:
            yield "train.vision_attention=triton, and the model has no vision encoder: leave the key out"
        elif vision.head_width != VISION_KERNEL_HEAD_WIDTH:
            yield (
                f"train.vision_attention=triton takes heads {VISION_KERNEL_HEAD_WIDTH} wide, and model.vision.width "
                f"({vision.width}) / num_heads ({vision.num_heads}) = {vision.head_width}: "
                "set train.vision_attention=sdpa"
            )


def what_is_offloaded_exists(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.train.offload_activations == "vision" and config.model.vision is None:
        yield "train.offload_activations=vision, and the model has no vision encoder: leave the key out, or set text"


def the_chunked_head_has_a_vocabulary(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.train.head_loss != "logits" and config.model.text.head == "reward":
        yield (
            f"train.head_loss={config.train.head_loss} cuts a vocabulary, and model.text.head is reward, which has one "
            "number a row: set train.head_loss=logits"
        )


def the_text_kernel_has_heads_of_its_widths(config: RunConfig, world_size: int) -> Iterator[str]:
    width = config.model.text.head_width
    if config.train.text_attention == "triton" and width not in TEXT_KERNEL_HEAD_WIDTHS:
        yield (
            f"train.text_attention=triton takes heads {', '.join(map(str, TEXT_KERNEL_HEAD_WIDTHS))} wide, and "
            f"model.text.head_width is {width}: set train.text_attention=sdpa"
        )


def library_attention_is_possible(config: RunConfig, world_size: int) -> Iterator[str]:
    train, vision = config.train, config.model.vision
    asked = (
        ("train.vision_attention", train.vision_attention, None if vision is None else vision.head_width),
        ("train.text_attention", train.text_attention, config.model.text.head_width),
    )
    for key, backend, width in asked:
        if backend not in ("varlen", "flash"):
            continue
        if width is None:
            yield f"{key}={backend}, and the model has no vision encoder: leave the key out"
        elif width % 8 or width > WIDEST_FLASH_HEAD:
            yield (
                f"{key}={backend} takes heads of a multiple of 8, at most {WIDEST_FLASH_HEAD}, and these are {width} "
                f"wide: set {key}=sdpa"
            )
        if train.precision == "fp32":
            yield f"{key}={backend} takes half precision, and train.precision is fp32: set {key}=sdpa"


def overlap_has_buckets(config: RunConfig, world_size: int) -> Iterator[str]:
    train = config.train
    if train.overlap_grad_reduce:
        return
    if train.overlap_param_gather:
        yield (
            "train.overlap_param_gather is true but overlap_grad_reduce is false, which leaves all parameters in one "
            "bucket, so that the first module would wait for the last one's: set train.overlap_grad_reduce=true"
        )
    if train.ddp_bucket_size is not None:
        yield (
            f"train.ddp_bucket_size is {train.ddp_bucket_size} but overlap_grad_reduce is false, which leaves all "
            "parameters in one bucket: set train.overlap_grad_reduce=true, or leave ddp_bucket_size out"
        )


def special_tokens_differ(config: RunConfig, world_size: int) -> Iterator[str]:
    names: dict[int, str] = {}
    for name, token in config.model.tokens.model_dump().items():
        if token in names:
            yield f"model.tokens.{name} and model.tokens.{names[token]} are both {token}: give each an id of its own"
        names[token] = name


LAYOUT_RULES: tuple[LayoutRule, ...] = (
    ranks_fill_the_layout,
    tensor_parallel_divides_the_text_model,
    pipeline_divides_the_layers,
    interleaving_needs_a_pipeline,
    sequence_parallel_needs_tensor_parallel,
    balanced_vision_needs_ranks_that_share,
)
RULES: tuple[Rule, ...] = (
    training_has_data_and_rl_has_questions,
    packs_divide_over_data_parallel_ranks,
    interleaving_fills_the_pipeline,
    packs_cut_evenly,
    something_is_trained,
    trained_modules_exist,
    warmup_ends_within_the_run,
    packs_fit_the_positions,
    pixel_limits_are_ordered,
    largest_media_fit_a_pack,
    a_pack_can_be_made_ahead,
    special_tokens_differ,
    the_vision_kernel_has_heads_of_its_width,
    what_is_offloaded_exists,
    the_chunked_head_has_a_vocabulary,
    the_text_kernel_has_heads_of_its_widths,
    library_attention_is_possible,
    overlap_has_buckets,
)
