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


def _verify_resume_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--steps", type=count, default=4, help="steps that are read (default 4)")
    parser.add_argument("--kill-at", type=count, default=2, metavar="K", help="killed after this step (default 2)")
    parser.add_argument("--ranks", type=_counts, default=(8, 6, 3, 1), metavar="N,N", help="killed on the first number "
                        "of data-parallel ranks, resumed on each (default 8,6,3,1)")  # fmt: skip
    parser.add_argument("--workers", type=_counts_from_0, default=(0, 1, 4), metavar="N,N", help="data.workers of the "
                        "resumed ranks (default 0,1,4)")  # fmt: skip


def _counts(text: str) -> tuple[int, ...]:
    return tuple(count(one) for one in text.split(","))


def _counts_from_0(text: str) -> tuple[int, ...]:
    return tuple(0 if one == "0" else count(one) for one in text.split(","))


def _verify_resume(values: Values) -> int:
    from mimo_megatron import log
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.data.verify_resume import request_of, verify_resume

    log.set_up()
    config = load_recipe(values.recipe, values.overrides)
    options = dict(steps=values.steps, kill_at=values.kill_at, ranks=values.ranks, workers=values.workers)
    request = request_of(config, **options)
    if request.packs_per_step != config.train.packs_per_step:
        print(
            f"steps of {request.packs_per_step} packs here, not train.packs_per_step {config.train.packs_per_step}: "
            f"the fewest that {', '.join(map(str, request.ranks))} ranks share evenly; the order of packs is the same"
        )
    print(f"{'ranks':>5}  {'workers':>7}  {'steps':>7}  {'packs':>7}  {'samples':>9}")
    for stream in verify_resume(request):
        print(stream.row(), flush=True)
        if stream.difference:
            print(f"differs: {stream.difference}")
            return 1
    print("every pack of every stream is the one of the unbroken stream")
    return 0


def _pack_arguments(parser: Arguments) -> None:
    parser.add_argument("lengths", type=Path, help="an indexed folder, or lengths as .parquet, .npy or text")
    parser.add_argument("--capacity", type=count, required=True, help="tokens of a pack")
    parser.add_argument("--patch-capacity", type=count, help="vision patches of a pack")
    parser.add_argument("--plot", type=Path, help="draw the lengths and the fill into this file")


def _pack(values: Values) -> int:
    from mimo_megatron.data.packing_report import pack_command

    pack_command(values.lengths, values.capacity, values.patch_capacity, values.plot)
    return 0


VERBS = (
    Verb("data index", "measure the samples of every source of a recipe", _data_index_arguments, _data_index),
    Verb("data preview", "one page of what a recipe trains on", _data_preview_arguments, _data_preview),
    Verb(
        "data verify-resume",
        "prove that a recipe's batches survive a kill, on any number of ranks and workers",
        _verify_resume_arguments,
        _verify_resume,
    ),
    Verb("pack", "how samples of given lengths fill packs", _pack_arguments, _pack),
)
