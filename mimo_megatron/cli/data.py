"""Verbs of data sets and packs."""

from pathlib import Path

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_recipe, count


def _data_index_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--held-out", type=float, default=0.0, help="share of samples for the split `validation`")


def _data_index(values: Values) -> int:
    from mimo_megatron import log
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.data.index import build_index
    from mimo_megatron.data.tokenizer import load_tokenizer

    log.set_up()
    config = load_recipe(values.recipe, values.overrides)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.tokens, config.model.text.vocab_size)
    for source in config.data.sources:
        report = build_index(source.path, tokenizer, config.model, config.data, held_out_fraction=values.held_out)
        splits = ", ".join(f"{count:,} {split}" for split, count in sorted(report.num_samples.items()))
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.skipped.items()))
        print(f"{source.path}: {splits or 'no samples'}; {report.num_tokens:,} tokens, {report.num_patches:,} patches")
        if reasons:
            print(f"  skipped: {reasons}")
        if report.num_over_capacity:
            print(f"  larger than a pack of this recipe: {report.num_over_capacity:,}")
    return 0


def _data_preview_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the page (default preview.html)")
    parser.add_argument("--packs", type=count, default=4, help="packs shown, from the first step on (default 4)")


def _data_preview(values: Values) -> int:
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.data.preview import write_preview

    config = load_recipe(values.recipe, values.overrides)
    print(write_preview(config.data, config.model, values.out, values.packs, seed=config.seed))
    return 0


def _calibrate_arguments(parser: Arguments) -> None:
    parser.add_argument("run_dir", type=Path, help="the folder of a run that trained on samples of many lengths")
    parser.add_argument("--skip", type=int, default=3, help="first steps left out, which warm up (default 3)")


def _calibrate(values: Values) -> int:
    from mimo_megatron.data.calibrate import calibrate, page, read_steps

    print(page(calibrate(read_steps(values.run_dir), values.skip)))
    return 0


def _pack_arguments(parser: Arguments) -> None:
    parser.add_argument("lengths", type=Path, help="an indexed folder, or lengths as .parquet, .npy or text")
    parser.add_argument("--capacity", type=count, required=True, help="tokens of a pack")
    parser.add_argument("--patch-capacity", type=count, help="vision patches of a pack")
    parser.add_argument("--plot", type=Path, help="draw the lengths and the fill into this file")
    parser.add_argument("--model", default="mimo-vl-7b", help="preset whose FLOPs are the cost (default mimo-vl-7b)")
    parser.add_argument("--ranks", type=count, default=8, help="data-parallel ranks (default 8)")
    parser.add_argument("--packs-per-rank", type=count, default=4, help="packs of a rank in a step (default 4)")
    parser.add_argument("--what-if", type=Path, help="draw fill and balance against capacity and window into this file")


def _pack(values: Values) -> int:
    from mimo_megatron.config.presets import preset
    from mimo_megatron.data.balance_report import Step
    from mimo_megatron.data.packing_report import pack_command

    step = Step(values.ranks, values.packs_per_rank)
    pack_command(
        values.lengths, values.capacity, values.patch_capacity, preset(values.model), step, values.plot, values.what_if
    )
    return 0


VERBS = (
    Verb("data index", "measure the samples of every source of a recipe", _data_index_arguments, _data_index),
    Verb("data preview", "one page of what a recipe trains on", _data_preview_arguments, _data_preview),
    Verb("data calibrate", "the cost of samples from a run's measured steps", _calibrate_arguments, _calibrate),
    Verb("pack", "how samples of given lengths fill packs", _pack_arguments, _pack),
)
