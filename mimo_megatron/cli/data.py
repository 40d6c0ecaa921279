"""Verbs of data sets and packs."""

from pathlib import Path

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_recipe, count

_FORMATS = ("llava", "sharegpt", "qwen-vl", "hf-parquet", "folder")  # written out: --help must not load the formats
_BOX_FRAMES = ("stored", "resized", "thousandths", "square", "keep")


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
        if report.num_long_texts:
            what = "cut into" if source.long_samples == "split" else "which long_samples=split would cut into"
            print(f"  texts among them: {report.num_long_texts:,}, {what} {report.num_parts:,} parts")
    return 0


def _data_lint_arguments(parser: Arguments) -> None:
    parser.add_argument("path", type=Path, metavar="RECIPE|FOLDER", help="a recipe, or a folder of tar shards")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the recipe")
    parser.add_argument("--decode", action="store_true", help="decode every image and video to its end")
    parser.add_argument(
        "--aspect", type=float, default=20.0, help="sides of an image that differ more are doubted (20)"
    )
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="write every finding there, one a line")


def _data_lint(values: Values) -> int:
    import contextlib
    import json
    from dataclasses import asdict

    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.data.lint import Limits, Linter, Summary
    from mimo_megatron.data.tokenizer import load_tokenizer

    limits, folders = None, [values.path]
    if not values.path.is_dir():
        config = load_recipe(values.path, values.overrides)
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.tokens, config.model.text.vocab_size)
        limits, folders = Limits(tokenizer, config.model, config.data), [one.path for one in config.data.sources]
    linter, summary = Linter(limits, decodes=values.decode, most_aspect=values.aspect), Summary()
    with contextlib.ExitStack() as stack:
        lines = values.jsonl and stack.enter_context(values.jsonl.open("w", encoding="utf-8"))
        for folder in folders:
            for finding in linter.lint(folder):
                summary.add(finding)
                if lines:
                    lines.write(json.dumps(asdict(finding)) + "\n")
    print(summary.text(linter.num_samples))
    return int(summary.is_bad)


def _data_stats_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--out", type=Path, default=Path("stats.html"), help="the page (default stats.html)")
    parser.add_argument("--samples", type=count, default=2000, help="samples read of each source (default 2000)")
    parser.add_argument("--packs", type=count, default=256, help="packs that are planned (default 256)")


def _data_stats(values: Values) -> int:
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.data.stats import collect, summary, write_page

    config = load_recipe(values.recipe, values.overrides)
    stats = collect(config.data, config.model, seed=config.seed, num_samples=values.samples, num_packs=values.packs)
    print(summary(stats, config.data, config.train.packs_per_step))
    print(write_page(stats, config.data, config.model, values.out))
    return 0


def _data_preview_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the page (default preview.html)")
    parser.add_argument("--packs", type=count, default=4, help="packs shown, from the first step on (default 4)")
    parser.add_argument("--tokens", type=count, default=2000, help="pieces of text shown of a sample (default 2000)")


def _data_preview(values: Values) -> int:
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.data.preview import write_preview

    config = load_recipe(values.recipe, values.overrides)
    packs, tokens = values.packs, values.tokens
    print(write_preview(config.data, config.model, values.out, packs, seed=config.seed, shown_tokens=tokens))
    return 0


def _data_convert_arguments(parser: Arguments) -> None:
    parser.add_argument("source", type=Path, metavar="FROM", help="a file or folder of another format")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of shards to be made")
    parser.add_argument("--format", choices=_FORMATS, help="(default: told from the content, and said)")
    parser.add_argument(
        "--media", type=Path, action="append", default=[], help="folder that paths of images and videos count from"
    )
    parser.add_argument("--boxes", choices=_BOX_FRAMES, help="what boxes in answers count in; see docs/data-formats.md")
    parser.add_argument(
        "--box-pixels", type=count, nargs=2, metavar=("MIN", "MAX"), help="pixel limits of --boxes resized"
    )
    parser.add_argument("--prompt", help="question put to pictures that only have a caption")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    parser.add_argument("--samples-per-shard", type=count, default=10_000, help="(default 10000, and 1 GiB at most)")


def _data_convert(values: Values) -> int:
    from mimo_megatron import log
    from mimo_megatron.data.formats.boxes import RESIZED_PIXELS
    from mimo_megatron.data.formats.convert import REPORT_FILE, convert
    from mimo_megatron.data.formats.detect import FORMATS, detect
    from mimo_megatron.data.formats.sample import Reading

    log.set_up()
    if values.box_pixels and values.boxes != "resized":
        values.parser.error("--box-pixels are the limits of --boxes resized")
    if values.format:
        form = FORMATS[values.format]
    else:
        form, reason = detect(values.source)
        print(f"{values.source}: {form.name}, for {reason}")
    reading = Reading(
        tuple(values.media), values.boxes, tuple(values.box_pixels or RESIZED_PIXELS), values.prompt or None
    )
    done = convert(
        values.source,
        values.out,
        form,
        reading,
        is_strict=values.strict,
        samples_per_shard=values.samples_per_shard,
    )
    print(f"{values.out}: {done.num_samples:,} samples of {done.rows_done:,} rows in {done.num_shards:,} shards")
    if done.num_renamed:
        print(f"  given an id of their own, since an earlier row has theirs: {done.num_renamed:,}")
    if done.left_out:
        print(f"  keys that JSON cannot hold, left out: {', '.join(sorted(done.left_out))}")
    if done.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in done.skipped.most_common())
        print(f"  rows left out: {reasons}; each is in {values.out / REPORT_FILE}")
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


def _calibrate_arguments(parser: Arguments) -> None:
    parser.add_argument("run_dir", type=Path, help="the folder of a run that trained on samples of many lengths")
    parser.add_argument("--skip", type=int, default=3, help="first steps left out, which warm up (default 3)")


def _calibrate(values: Values) -> int:
    from mimo_megatron.data.calibrate import calibrate, page, read_steps

    print(page(calibrate(read_steps(values.run_dir), values.skip)))
    return 0


def _pack_arguments(parser: Arguments) -> None:
    parser.add_argument("lengths", type=Path, help="an indexed folder, or lengths as .parquet, .npy or text")
    parser.add_argument("--recipe", type=Path, help="take capacities, model and data.cost from this recipe")
    parser.add_argument("--capacity", type=count, help="tokens of a pack (default: the recipe's)")
    parser.add_argument("--patch-capacity", type=count, help="vision patches of a pack (default: the recipe's)")
    parser.add_argument("--plot", type=Path, help="draw the lengths and the fill into this file")
    parser.add_argument("--model", help="without a recipe: preset whose FLOPs are the cost (default mimo-vl-7b)")
    parser.add_argument("--ranks", type=count, default=8, help="data-parallel ranks (default 8)")
    parser.add_argument("--packs-per-rank", type=count, default=4, help="packs of a rank in a step (default 4)")
    parser.add_argument("--what-if", type=Path, help="draw fill and balance against capacity and window into this file")


def _pack(values: Values) -> int:
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.config.presets import preset
    from mimo_megatron.data.balance_report import Step
    from mimo_megatron.data.packing_report import pack_command

    if values.recipe and values.model:
        values.parser.error("the model is the recipe's: give --model, or --recipe")
    if not values.capacity and not values.recipe:
        values.parser.error("give --capacity, or --recipe")
    recipe = load_recipe(values.recipe) if values.recipe else None
    pack_command(
        values.lengths,
        values.capacity,
        values.patch_capacity,
        recipe.model if recipe else preset(values.model or "mimo-vl-7b"),
        Step(values.ranks, values.packs_per_rank),
        values.plot,
        values.what_if,
        recipe.data if recipe else None,
    )
    return 0


VERBS = (
    Verb(
        "data convert",
        "LLaVA, ShareGPT, Qwen-VL, parquet or a folder of pictures into shards",
        _data_convert_arguments,
        _data_convert,
    ),
    Verb("data index", "measure the samples of every source of a recipe", _data_index_arguments, _data_index),
    Verb("data lint", "every sample looked at; exit code 1 where something is wrong", _data_lint_arguments, _data_lint),
    Verb("data stats", "one page of what a recipe's data are", _data_stats_arguments, _data_stats),
    Verb("data preview", "one page of what a recipe trains on", _data_preview_arguments, _data_preview),
    Verb(
        "data verify-resume",
        "prove that a recipe's batches survive a kill, on any number of ranks and workers",
        _verify_resume_arguments,
        _verify_resume,
    ),
    Verb("data calibrate", "the cost of samples from a run's measured steps", _calibrate_arguments, _calibrate),
    Verb("pack", "how samples of given lengths fill packs", _pack_arguments, _pack),
)
