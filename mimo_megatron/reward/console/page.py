"""One self-contained page of scored responses: picture, verdict, response, prompt.

Responses are hostile: everything is escaped, there is no script, the content policy forbids any request, and signs that
are not seen or turn the writing direction are written as their codes.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mimo_megatron.reward.console.pictures import line_of, picture_of
from mimo_megatron.reward.console.rows import Scored, TaskSummary
from mimo_megatron.reward.wire import Meta

TEMPLATE = "page.html.j2"
LONGEST_TEXT = 20_000
"""Characters of a thought or an answer on the page; the middle of a longer one is left out."""


def write_page(
    rows: Sequence[Scored], summary: Sequence[TaskSummary], out: Path, *, title: str, images: Path | None
) -> Path:
    """``out``, now a page of these rows; ``summary`` may be about more of them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=title,
        summary=summary,
        num_rows=sum(one.count for one in summary),
        rows=[_view(row, images) for row in rows],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _view(row: Scored, images: Path | None) -> Mapping[str, Any]:
    return {
        "line": row.line,
        "id": visible(row.item.id),
        "task": row.item.task,
        "verdict": row.verdict,
        "judged": visible(row.verdict.answer),
        "origin": "stored" if row.is_stored else "scored now",
        "picture": picture_of(row.item, images),
        "interval": line_of(row.item),
        "gold": _cut(json.dumps(row.item.gold, ensure_ascii=False)),
        "thought": _cut(row.thought),
        "thought_length": len(row.thought),
        "answer": _cut(row.answer),
        "prompt": _cut(_prompt(row.item.meta)),
        "mode": _mode(row),
    }


def _prompt(meta: Meta) -> str:
    if meta.prompt:
        return meta.prompt
    turns = []
    for message in meta.messages:
        content = message.content
        parts = (
            [content]
            if isinstance(content, str)
            else [part.get("text", f"[{part.get('type', '?')}]") for part in content]
        )
        turns.append(f"{message.role}: {''.join(parts)}")
    return "\n\n".join(turns)


def _mode(row: Scored) -> str:
    meta = row.item.meta
    if row.item.task != "box":
        return ""
    return f"{meta.box_mode} {meta.threshold:g}" if meta.box_mode == "threshold" else meta.box_mode


def visible(text: str) -> str:
    """``text`` with every control, format and surrogate sign but line ends and tabs written as its code."""
    return "".join(
        sign if sign in "\n\t" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs") else f"⟨U+{ord(sign):04X}⟩"
        for sign in text
    )


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return visible(text)
    half = LONGEST_TEXT // 2
    return visible(f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters …]\n\n{text[-half:]}")
