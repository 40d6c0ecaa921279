"""Verbs of golds and scored responses."""

from pathlib import Path

from mimo_megatron.cli.verb import Arguments, Values, Verb, count

_MOST_FINDINGS = 50


def _check_arguments(parser: Arguments) -> None:
    parser.add_argument("file", type=Path, help="JSONL with id, task, gold and meta a line, as of /v1/score")
    parser.add_argument("--out", type=Path, help="write every finding into this file, one JSON object a line")


def _check(values: Values) -> int:
    from rich.console import Console

    from mimo_megatron.reward.console.table import print_golds
    from mimo_megatron.reward.gold_check import check_golds, read_rows, write_findings
    from mimo_megatron.reward.service.offline import Offline

    with Offline() as offline:
        report = check_golds(read_rows(values.file), offline.math_problem)
    print_golds(report, Console(), _MOST_FINDINGS)
    if values.out:
        write_findings(report, values.out)
        print(values.out)
    return 1 if report.num_bad else 0


def _inspect_arguments(parser: Arguments) -> None:
    parser.add_argument("file", type=Path, help="JSONL of items as of /v1/score, with or without their `result`")
    parser.add_argument("--images", type=Path, metavar="ROOT", help="folder of pictures named by their SHA-256")
    parser.add_argument("--out", type=Path, help="the page (default FILE with .html)")
    parser.add_argument("--only", metavar="WORD", help="only rows of this task, status or reason")
    parser.add_argument("--limit", type=count, default=200, help="rows shown, from the first (default 200)")


def _inspect(values: Values) -> int:
    from rich.console import Console

    from mimo_megatron.reward.console.page import write_page
    from mimo_megatron.reward.console.rows import only, read_scored, summarise
    from mimo_megatron.reward.console.table import print_rows, print_summary
    from mimo_megatron.reward.service.offline import Offline

    with Offline() as offline:
        rows = only(read_scored(values.file, offline.score), values.only)
    summary, shown = summarise(rows), rows[: values.limit]
    console = Console()
    print_rows(shown, console)
    print_summary(summary, console)
    out = values.out or values.file.with_suffix(".html")
    print(write_page(shown, summary, out, title=values.file.name, images=values.images))
    return 0


VERBS = (
    Verb(
        "rewards check", "read every gold of a file as its rule will, and list the bad ones", _check_arguments, _check
    ),
    Verb("rewards inspect", "scored responses as a table and a page with pictures", _inspect_arguments, _inspect),
)
