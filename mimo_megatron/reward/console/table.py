"""Scored responses in a terminal. What a model wrote is shown with every control sign replaced."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mimo_megatron.reward.console.rows import Scored, TaskSummary
from mimo_megatron.reward.gold_check import MOST_CONSTANT_REWARD, GoldReport

STYLES = {"ok": "green", "invalid": "yellow", "unknown": "magenta"}
_MOST_CHARS = 60
_WIDE = 110
"""Columns of a terminal in which the parts have room."""


def print_rows(rows: Sequence[Scored], console: Console) -> None:
    is_wide = console.width >= _WIDE
    table = Table(
        Column("line", justify="right", no_wrap=True),
        Column("id", no_wrap=True, max_width=24),
        Column("task", no_wrap=True),
        Column("verdict", no_wrap=True, min_width=16),
        Column("reward", justify="right", no_wrap=True),
        *([Column("parts", no_wrap=True, ratio=1)] if is_wide else []),
        Column("judged", no_wrap=True, ratio=1),
        box=SIMPLE_HEAD,
        expand=True,
    )
    for row in rows:
        verdict = row.verdict
        parts = " ".join(f"{name}={part:.3g}" for name, part in verdict.parts.items())
        table.add_row(
            str(row.line),
            printable(row.item.id, 24),
            row.item.task,
            Text(verdict.reason.value, style=STYLES[verdict.status]),
            "–" if verdict.reward is None else f"{verdict.reward:.3f}",
            *([printable(parts, _MOST_CHARS)] if is_wide else []),
            printable(verdict.answer, _MOST_CHARS),
        )
    console.print(table)


def print_summary(summary: Sequence[TaskSummary], console: Console) -> None:
    table = Table("task", "responses", "mean reward", "invalid", "unknown", "reasons", box=SIMPLE_HEAD)
    for one in summary:
        table.add_row(
            one.task,
            f"{one.count:,}",
            "–" if one.mean_reward is None else f"{one.mean_reward:.3f}",
            f"{one.invalid_fraction:.1%}",
            f"{one.unknown_fraction:.1%}",
            ", ".join(f"{count:,} {reason}" for reason, count in one.reasons),
        )
    console.print(table)


def printable(text: str, most: int) -> Text:
    """At most ``most`` characters; control, direction and escape signs as ``·``, never as markup."""
    shown = "".join(sign if sign.isprintable() else "·" for sign in text[: most + 1])
    return Text(shown[: most - 1] + "…" if len(shown) > most else shown)


def print_golds(report: GoldReport, console: Console, most: int) -> None:
    """What was found, at most ``most`` lines of it, the bad ones first; then what constant answers would earn."""
    if report.findings:
        table = Table("row", "id", "task", "kind", "problem", box=SIMPLE_HEAD)
        for finding in sorted(report.findings, key=lambda finding: finding.kind)[:most]:
            table.add_row(
                str(finding.row),
                printable(finding.id, 24),
                finding.task,
                Text(finding.kind, style="red" if finding.kind == "bad" else "yellow"),
                printable(finding.problem, 300),
            )
        console.print(table)
    if (left := len(report.findings) - most) > 0:
        console.print(f"and {left:,} more; --out writes all of them")
    rows = ", ".join(f"{count:,} {task}" for task, count in sorted(report.num_rows.items())) or "no rows"
    num_doubtful = len({finding.row for finding in report.findings if finding.kind == "doubtful"})
    console.print(f"{rows}; {report.num_bad:,} bad, {num_doubtful:,} doubtful", highlight=False)
    for policy, reward in report.constant_rewards.items():
        style = "yellow" if reward > MOST_CONSTANT_REWARD else ""
        console.print(Text(f"answers that never look earn {reward:.3f} ({policy})", style=style))
