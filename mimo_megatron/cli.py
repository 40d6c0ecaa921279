"""The ``mimo-megatron`` command: a table of verbs, each a few lines that call the package.

Every verb imports what it needs when it runs, so that ``--help`` and a misspelt option answer at once: this file is the
one place where imports stand inside functions. To add a verb, write its two functions and a line in ``VERBS``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mimo_megatron import __version__
from mimo_megatron.errors import MimoError

if TYPE_CHECKING:
    import torch

Arguments = argparse.ArgumentParser
Values = argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """``name`` may be two words: verbs that share the first are shown under it."""

    name: str
    help: str
    add_arguments: Callable[[Arguments], object]
    run: Callable[[Values], int]


def count(text: str) -> int:
    """A whole number from 1; argparse names this function in its complaint."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _doctor_arguments(parser: Arguments) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(values: Values) -> int:
    from itertools import groupby

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mimo_megatron.doctor import TOPICS, as_json, examine, has_fault

    findings = examine()
    if values.json:
        print(as_json(findings))
        return int(has_fault(findings))
    table = Table(
        "", "name", "found", "why, and -> remedy", box=SIMPLE, title="mimo-megatron doctor", title_justify="left"
    )
    colours = {"ok": "green", "note": "yellow", "fault": "bold red"}
    for topic, group in groupby(sorted(findings, key=lambda one: TOPICS.index(one.topic)), key=lambda one: one.topic):
        table.add_section()
        table.add_row("", Text(topic, "bold"))
        for one in group:
            remark = one.why + (f"\n-> {one.remedy}" if one.remedy else "")
            table.add_row(Text(one.status, colours[one.status]), Text(one.name), Text(one.found), Text(remark))
    Console().print(table)
    return int(has_fault(findings))


def _recipe_arguments(parser: Arguments) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file, see docs/recipes.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of the recipe: train.steps=20"
    )


def _config_show_arguments(parser: Arguments) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--ranks", type=count, help="check also that the run fits this many ranks")


def _config_show(values: Values) -> int:
    from mimo_megatron.config.check import check
    from mimo_megatron.config.load import load_recipe, resolved_text

    config = load_recipe(values.recipe, values.overrides)
    if values.ranks:
        check(config, values.ranks)
    print(resolved_text(config), end="")
    return 0


def _config_explain_arguments(parser: Arguments) -> None:
    parser.add_argument("key", nargs="?", help="a dotted path such as train.schedule; all keys if left out")
    parser.add_argument("--markdown", action="store_true", help="as the table of docs/recipes.md")


def _config_explain(values: Values) -> int:
    from mimo_megatron.config.keys import explain, markdown_table

    found = explain(values.key)
    print(markdown_table(found) if values.markdown else "\n".join(map(str, found)))
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


def _data_index_arguments(parser: Arguments) -> None:
    _recipe_arguments(parser)
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
    _recipe_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the page (default preview.html)")
    parser.add_argument("--packs", type=count, default=4, help="packs shown, from the first step on (default 4)")


def _data_preview(values: Values) -> int:
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.data.preview import write_preview

    config = load_recipe(values.recipe, values.overrides)
    print(write_preview(config.data, config.model, values.out, values.packs, seed=config.seed))
    return 0


def _train_arguments(parser: Arguments) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--ranks", type=count, help="processes on this machine (default: tp * pp * cp of the recipe)")


def _train(values: Values) -> int:
    from mimo_megatron.config.check import check
    from mimo_megatron.config.load import load_recipe

    config = load_recipe(values.recipe, values.overrides)
    num_ranks = values.ranks or config.parallel.model_ranks
    check(config, num_ranks)  # before torch and megatron load, which takes seconds

    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.loop import pretrain

    run_local(pretrain, num_ranks, config)
    return 0


def _add_layout(parser: Arguments) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of ours, or a Hugging Face folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the layout: parallel.tp=2 parallel.pp=2")
    parser.add_argument("--ranks", type=count, help="processes on this machine (default: tp * pp * cp)")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer (default: the checkpoint's own)")


def _score_arguments(parser: Arguments) -> None:
    _add_layout(parser)
    parser.add_argument("--samples", type=Path, required=True, help='JSONL of {"id", "messages"} with image paths')
    parser.add_argument("--out", type=Path, required=True, help='JSONL of {"id", "token_ids", "logprobs"}')
    parser.add_argument("--pack-tokens", type=count, default=8192, help="slots of a pack (default 8192)")


def _score(values: Values) -> int:
    from mimo_megatron.config.load import load_layout
    from mimo_megatron.evaluation.score import ScoreRequest, score
    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.start import read_encoding

    layout = load_layout(values.overrides)
    encoding = read_encoding(values.checkpoint, values.tokenizer)
    with TemporaryDirectory() as scratch:
        where = values.checkpoint, values.samples, values.out
        request = ScoreRequest(*where, layout, encoding, Path(scratch), values.pack_tokens)
        run_local(score, values.ranks or layout.model_ranks, request)
    print(values.out)
    return 0


def _generate_arguments(parser: Arguments) -> None:
    _add_layout(parser)
    parser.add_argument("--prompt", help="one question")
    parser.add_argument("--image", type=Path, action="append", default=[], help="shown before the question; repeatable")
    parser.add_argument("--prompts", type=Path, help='JSONL of {"id", "messages"} instead of --prompt')
    parser.add_argument("--out", type=Path, help='JSONL of {"id", "answer"} (default: printed)')
    parser.add_argument("--max-new-tokens", type=count, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)


def _generate(values: Values) -> int:
    from mimo_megatron.config.load import load_layout
    from mimo_megatron.evaluation.answer import AnswerRequest, answer, read_prompts
    from mimo_megatron.evaluation.generate import Sampling
    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.start import read_encoding

    layout = load_layout(values.overrides)
    prompts = read_prompts(values.prompt, values.image, values.prompts)
    sampling = Sampling(values.max_new_tokens, values.temperature, values.top_p, values.seed)
    encoding = read_encoding(values.checkpoint, values.tokenizer)
    with TemporaryDirectory() as scratch:
        request = AnswerRequest(values.checkpoint, prompts, values.out, layout, encoding, sampling, Path(scratch))
        run_local(answer, values.ranks or layout.model_ranks, request)
    return 0


def _add_dtype(parser: Arguments) -> None:
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the written weights (default: as they are)")


def _dtype(values: Values) -> "torch.dtype | None":
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[values.dtype]


def _from_hf_arguments(parser: Arguments) -> None:
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("checkpoint", type=Path, help="the folder to write")
    _add_dtype(parser)


def _from_hf(values: Values) -> int:
    from mimo_megatron.convert.verbs import from_hf

    print(f"{values.checkpoint}: {from_hf(values.hf_dir, values.checkpoint, _dtype(values)).name}")
    return 0


def _to_hf_arguments(parser: Arguments) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("hf_dir", type=Path, help="the folder to write")
    parser.add_argument("--tokenizer-from", type=Path, help="a folder whose tokenizer files are copied")
    _add_dtype(parser)


def _to_hf(values: Values) -> int:
    from mimo_megatron.convert.verbs import to_hf

    model = to_hf(values.checkpoint, values.hf_dir, _dtype(values), values.tokenizer_from)
    print(f"{values.hf_dir}: {model.name}")
    return 0


def _verify_arguments(parser: Arguments) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("hf_dir", type=Path)


def _verify(values: Values) -> int:
    from mimo_megatron.convert.verbs import verify

    verification = verify(values.checkpoint, values.hf_dir)
    print(verification)
    return int(not verification.is_equal)


def _assemble_arguments(parser: Arguments) -> None:
    parser.add_argument("text_from", type=Path, help="Hugging Face folder of the text model (the report: MiMo-7B-Base)")
    parser.add_argument("vision_from", type=Path, help="of the model whose vision encoder is taken (Qwen2.5-VL-72B)")
    parser.add_argument("checkpoint", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the random projector (default 1)")
    parser.add_argument("--name", help="of the model (default: both names)")
    _add_dtype(parser)


def _assemble(values: Values) -> int:
    from mimo_megatron.convert.verbs import assemble

    chosen = values.text_from, values.vision_from, values.checkpoint
    print(f"{values.checkpoint}: {assemble(*chosen, values.seed, _dtype(values), values.name).name}")
    return 0


def _report_arguments(parser: Arguments) -> None:
    parser.add_argument("run_dir", type=Path, nargs="+", help="one run, or the stages of a journey in their order")
    parser.add_argument("--out", type=Path, help="the page of several runs (default journey.html beside the last)")


def _report(values: Values) -> int:
    from mimo_megatron.report.run_report import write_journey, write_report

    for run_dir in values.run_dir:
        print(write_report(run_dir))
    if len(values.run_dir) > 1:
        print(write_journey(values.run_dir, values.out or values.run_dir[-1].parent / "journey.html"))
    return 0


VERBS: tuple[Verb, ...] = (
    Verb("doctor", "what this machine offers, which backends follow, what to mend", _doctor_arguments, _doctor),
    Verb("config show", "every key of a recipe with the value it resolves to", _config_show_arguments, _config_show),
    Verb("config explain", "what a key of a recipe means", _config_explain_arguments, _config_explain),
    Verb("data index", "measure the samples of every source of a recipe", _data_index_arguments, _data_index),
    Verb("data preview", "one page of what a recipe trains on", _data_preview_arguments, _data_preview),
    Verb("pack", "how samples of given lengths fill packs", _pack_arguments, _pack),
    Verb("train", "run a recipe on this machine", _train_arguments, _train),
    Verb("score", "log-probabilities of chat samples, token by token", _score_arguments, _score),
    Verb("generate", "answers to prompts with images", _generate_arguments, _generate),
    Verb("convert from-hf", "a Hugging Face folder into a checkpoint", _from_hf_arguments, _from_hf),
    Verb("convert to-hf", "a checkpoint into a Hugging Face folder", _to_hf_arguments, _to_hf),
    Verb("convert verify", "compare a checkpoint and a Hugging Face folder bit for bit", _verify_arguments, _verify),
    Verb("convert assemble", "a text model, a vision encoder and a random projector", _assemble_arguments, _assemble),
    Verb("report", "one HTML page of a run, or of several in their order", _report_arguments, _report),
)
_GROUPS = {
    "config": "recipes: show, explain",
    "data": "data sets: index, preview",
    "convert": "checkpoints: from-hf, to-hf, verify, assemble",
}


def build_parser(verbs: Sequence[Verb] = VERBS) -> argparse.ArgumentParser:
    """The parser of the whole command line; the chosen verb is ``values.verb``."""
    parser = argparse.ArgumentParser(
        prog="mimo-megatron", description="Train MiMo-VL-7B-class models on Megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"mimo-megatron {__version__}")
    first_words = parser.add_subparsers(required=True, metavar="VERB")
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for verb in verbs:
        first, _, second = verb.name.partition(" ")
        if second and first not in groups:
            group = first_words.add_parser(first, help=_GROUPS[first])
            groups[first] = group.add_subparsers(required=True, metavar="VERB")
        sub = (groups[first] if second else first_words).add_parser(
            second or first, help=verb.help, description=verb.help
        )
        verb.add_arguments(sub)
        sub.set_defaults(verb=verb, parser=sub)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Values:
    """The values of the command line. ``key=value`` overrides may stand before, between and after options."""
    values, rest = build_parser().parse_known_args(arguments)
    strangers = [text for text in rest if "=" not in text or text.startswith("-") or not hasattr(values, "overrides")]
    if strangers:
        values.parser.error(f"not understood: {' '.join(strangers)}")
    if rest:
        values.overrides += rest
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where the answer is bad news, 2 for a mistake that the user can mend."""
    values = parse(arguments)
    try:
        return values.verb.run(values)
    except MimoError as error:
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text

        title = f"{type(error).__name__} in mimo-megatron {values.verb.name}"
        Console(stderr=True).print(Panel(Text(str(error)), title=title, title_align="left", border_style="red"))
        return 2


if __name__ == "__main__":
    sys.exit(main())
