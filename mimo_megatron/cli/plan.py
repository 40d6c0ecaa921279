"""The verb that looks ahead: what a recipe needs on so many GPUs, and which layouts are best."""

from pathlib import Path

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_recipe, count


def _plan_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--gpus", type=count, required=True, help="how many")
    parser.add_argument("--gpu", default="h100", help="of which kind: h100 (default), h200, a100, b200")
    parser.add_argument("--mfu", type=float, help="share of the peak that the decoder's computation reaches")
    parser.add_argument("--vision-mfu", type=float, help="the same of the vision encoder")
    parser.add_argument("--top", type=count, default=8, help="layouts to show (default 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")


def _plan(values: Values) -> int:
    import json

    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.planner import report
    from mimo_megatron.planner.hardware import Efficiency, check_fp8, efficiency_of, gpu_named
    from mimo_megatron.planner.packs import assumed_packs
    from mimo_megatron.planner.search import own_layout, require_some, search

    config, gpu = load_recipe(values.recipe, values.overrides), gpu_named(values.gpu)
    check_fp8(gpu, config.train.fp8)
    efficiency: Efficiency = efficiency_of(values.mfu, values.vision_mfu)
    if all((source.path / "index.json").is_file() for source in config.data.sources):
        from mimo_megatron.planner.from_index import packs_of_index  # torch loads with it, which takes seconds

        packs = packs_of_index(config)
    else:
        packs = assumed_packs(config.model, config.data)
    own = own_layout(config, values.gpus, packs, gpu, efficiency)
    found = search(config, values.gpus, packs, gpu, efficiency, most=values.top)
    report.show(report.page(config, values.gpus, gpu, packs, efficiency, own, found.best, found.num_layouts))
    if values.json:
        answer = {
            "recipe": config.name,
            "gpus": values.gpus,
            "gpu": gpu.name,
            "packs": list(packs.notes),
            "own": {"refused": own} if isinstance(own, str) else report.as_json(own),
            "best": [report.as_json(one) for one in found.best],
        }
        values.json.write_text(json.dumps(answer, indent=1), encoding="utf-8")
    require_some(found, config, values.gpus, packs, gpu, efficiency)
    return int(isinstance(own, str) or not own.fits)


VERBS = (Verb("plan", "what a recipe needs on N GPUs, and its best layouts; takes none", _plan_arguments, _plan),)
