"""The part of a response that is judged, and strict readers for it. Nothing outside the final answer ever counts.

Limits are those of docs/rewards.md. ``Unscorable`` carries the reason code of the verdict ``invalid``.
"""

import json
import math
import re
import unicodedata
from typing import Any

from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import Meta

MAX_ANSWER_CHARS = 8192
MAX_JSON_DEPTH = 4
MAX_JSON_ITEMS = 16
MAX_NUMBER = 1e5

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TO_BRACE = re.compile(r"(?:[^\\{}]|\\.)*+([{}])", re.DOTALL)
"""Up to the next brace; an escaped one is text."""


class Unscorable(Exception):
    """The response holds nothing that can be judged, by its own fault."""

    def __init__(self, reason: Reason, answer: str = "") -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.answer = answer


def final_answer(response: str, meta: Meta) -> str:
    """The text after the last ``</think>``; the whole text where neither tag stands and ``meta.thinking`` is auto."""
    _, closed, answer = response.rpartition(_THINK_CLOSE)
    is_open = _THINK_OPEN in answer or (meta.thinking == "required" and not closed)
    answer = "" if is_open else answer.strip()
    if not answer:
        raise Unscorable(Reason.TRUNCATED if meta.finish_reason == "length" else Reason.NO_ANSWER)
    return answer


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` whose braces balance; None where there is none.

    A last box that is not closed gives None as well: an earlier one is not what the response ended with.
    """
    found = None
    for found in _BOXED.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    depth = 1
    place = found.end()
    while brace := _TO_BRACE.match(text, place):
        place = brace.end()
        depth += 1 if brace.group(1) == "{" else -1
        if depth == 0:
            return text[found.end() : place - 1]
    return None


def plain(text: str) -> str:
    """NFKC, every minus as ``-``, without zero-width and direction marks."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join("-" if sign in "−‐‑‒–﹣－" else sign for sign in text)
    return "".join(sign for sign in text if unicodedata.category(sign) != "Cf").strip()


def strict_json(text: str) -> Any:
    """The JSON value in ``text``: finite numbers, no key twice, bounded depth and length. ``Unscorable`` otherwise."""
    if len(text) > MAX_ANSWER_CHARS:
        raise Unscorable(Reason.TOO_LARGE, text)

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        tree = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Unscorable(Reason.UNREADABLE, text) from error
    _check_size(tree, text, MAX_JSON_DEPTH)
    return tree


def finite_number(value: object) -> bool:
    """A JSON number within the limits; a bool and a number in quotes are none."""
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER and math.isfinite(value)  # type: ignore[arg-type]


def _check_size(tree: Any, text: str, depth: int) -> None:
    if isinstance(tree, dict | list):
        if depth == 0 or len(tree) > MAX_JSON_ITEMS:
            raise Unscorable(Reason.TOO_LARGE, text)
        for value in tree.values() if isinstance(tree, dict) else tree:
            _check_size(value, text, depth - 1)
