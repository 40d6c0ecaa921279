"""Rules between the section ``train.fp8`` and the rest of a run; ``check.py`` reports them with the others.

Two reasons: Transformer Engine's products want sizes that are multiples of 16 - the decoder's, where it may multiply -
and a result that is the same in every layout wants tiles that no cut between ranks divides.
"""

import math
from collections.abc import Callable, Iterator

from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.model import TextConfig
from mimo_megatron.config.run import RunConfig

Fp8Rule = Callable[[Fp8Config, RunConfig], Iterator[str]]
ALIGNMENT = 16
"""Of every size of a product in FP8, of the GPUs' libraries and of Transformer Engine."""
TILE = 128


def fp8_problems(config: RunConfig) -> list[str]:
    """What is wrong with ``train.fp8``, and between it and the others; nothing where there is none."""
    fp8 = config.train.fp8
    return [] if fp8 is None else [message for rule in FP8_RULES for message in rule(fp8, config)]


def packs_are_aligned(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    if "text" not in fp8.parts:
        return
    layout, slots = config.parallel, config.data.pack_tokens
    shared = layout.tp if layout.sequence_parallel else 1
    unit, factors = ALIGNMENT * layout.cp * shared, f"{ALIGNMENT} * cp" + (" * tp" if shared > 1 else "")
    if fp8.scaling == "blockwise" and layout.cp > 1:
        unit = math.lcm(unit, TILE * 2 * layout.cp)
        factors = f"{TILE} * 2 * cp, tiles of one half slice of a rank"
    if slots % unit:
        yield (
            f"data.pack_tokens ({slots}) % ({factors} = {unit}) = {slots % unit}, must be 0 with train.fp8.scaling "
            f"{fp8.scaling}: set data.pack_tokens={-(-slots // unit) * unit}"
        )


def sizes_are_aligned(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    text, tp = config.model.text, config.parallel.tp
    if "text" not in fp8.parts:
        return
    if text.width % ALIGNMENT:
        yield f"model.text.width ({text.width}) % {ALIGNMENT} = {text.width % ALIGNMENT}, must be 0 with train.fp8"
    is_tiled = fp8.scaling == "blockwise" and tp > 1
    unit = TILE if is_tiled else ALIGNMENT
    reason = f"whole tiles of {TILE} on every rank" if is_tiled else f"multiples of {ALIGNMENT}"
    for name, size in _cut_sizes(text).items():
        if size % tp == 0 and size // tp % unit:
            yield (
                f"model.text: {name} ({size}) / parallel.tp ({tp}) % {unit} = {size // tp % unit}, must be 0: "
                f"train.fp8.scaling {fp8.scaling} takes {reason}; choose another parallel.tp"
                + (" or train.fp8.scaling=current" if is_tiled else ", or leave train.fp8 out")
            )


def _cut_sizes(text: TextConfig) -> dict[str, int]:
    """Sizes of the linear layers that tensor parallelism divides."""
    return {
        "num_heads * head_width": text.num_heads * text.head_width,
        "(num_heads + 2 * num_kv_heads) * head_width": (text.num_heads + 2 * text.num_kv_heads) * text.head_width,
        "ffn_width": text.ffn_width,
    }


def a_layer_is_in_fp8(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    layers = config.model.text.num_layers
    if "text" in fp8.parts and fp8.first_layers + fp8.last_layers >= layers:
        yield (
            f"train.fp8.first_layers ({fp8.first_layers}) + last_layers ({fp8.last_layers}) >= model.text.num_layers "
            f"({layers}), so no layer is in FP8: lower them, or leave train.fp8 out"
        )


def images_are_encoded_whole(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    """A gradient that is still to be summed over cp must not be rounded, and no tile may hold two ranks' patches."""
    layout, parts = config.parallel, ", ".join(fp8.encoder_parts)
    if not parts:
        return
    if config.model.vision is None:
        yield f"train.fp8.parts has {parts}, and model.vision is null: set train.fp8.parts=[text]"
    elif layout.vision_placement == "replicated" and layout.cp > 1:
        yield (
            f"train.fp8.parts has {parts}, and with parallel.vision_placement replicated and cp {layout.cp} the "
            "encoder's gradient is in parts on several ranks: set parallel.vision_placement=balanced, or "
            "train.fp8.parts=[text]"
        )
    elif layout.vision_placement == "balanced" and fp8.scaling == "blockwise":
        yield (
            f"train.fp8.scaling blockwise and train.fp8.parts with {parts}: parallel.vision_placement balanced would "
            f"cut tiles of {TILE} patches: set vision_placement=replicated, train.fp8.scaling=current or parts=[text]"
        )


def parts_are_named_once(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    if len(set(fp8.parts)) < len(fp8.parts):
        yield f"train.fp8.parts ({', '.join(fp8.parts)}) names a part twice: name each once"


def kernels_round_for_pytorchs_product(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    if fp8.rounding != "triton":
        return
    what = "train.fp8.rounding=triton rounds with one scale for torch._scaled_mm"
    if fp8.scaling == "blockwise":
        yield f"{what}, and train.fp8.scaling is blockwise: leave rounding out, or set scaling=current"
    elif fp8.engine == "twin" or (fp8.engine == "transformer-engine" and not fp8.encoder_parts):
        yield f"{what}, and train.fp8.engine is {fp8.engine}: leave rounding out, or set engine=scaled_mm"


def only_delayed_scaling_has_a_history(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    for name in ("history", "margin"):
        value, default = getattr(fp8, name), Fp8Config.model_fields[name].default
        if fp8.scaling != "delayed" and value != default:
            yield (
                f"train.fp8.{name} ({value}) is of delayed scaling, and train.fp8.scaling is {fp8.scaling}: "
                f"leave {name} out, or set scaling=delayed"
            )


def a_policy_is_not_in_fp8(fp8: Fp8Config, config: RunConfig) -> Iterator[str]:
    if config.rl is not None:
        yield (
            "train.fp8 with the section rl: a token's log-probability would depend on what shares its pack, and differ "
            "from the one it was sampled with: leave train.fp8 out"
        )


FP8_RULES: tuple[Fp8Rule, ...] = (
    packs_are_aligned,
    sizes_are_aligned,
    a_layer_is_in_fp8,
    images_are_encoded_whole,
    parts_are_named_once,
    kernels_round_for_pytorchs_product,
    only_delayed_scaling_has_a_history,
    a_policy_is_not_in_fp8,
)
