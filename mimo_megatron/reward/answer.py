"""The part of a response that is judged, and strict readers for it. Nothing outside the final answer ever counts.

Limits are those of docs/rewards.md. ``Unscorable`` carries the reason code of the verdict ``invalid``.
"""

import itertools
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
MAX_MARKS = 30

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACKET = re.compile(r"[\[\]{}]")
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

    A last box that is not closed gives None as well: an earlier one is not what the response ended with. ``Unscorable``
    where it holds more than an answer may.
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
        if place - found.end() > MAX_ANSWER_CHARS:
            raise Unscorable(Reason.TOO_LARGE)
    return None


def plain(text: str) -> str:
    """NFKC, every minus as ``-``, without zero-width and direction marks."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join("-" if sign in "−‐‑‒–﹣－" else sign for sign in text)
    return "".join(sign for sign in text if unicodedata.category(sign) != "Cf").strip()


def readable_answer(response: str, meta: Meta) -> str:
    """``final_answer`` within the limits, ``plain``: what tasks with short answers read."""
    answer = final_answer(response, meta)
    check_length(answer)
    return plain(answer)


def check_length(text: str, most: int = MAX_ANSWER_CHARS) -> None:
    """``Unscorable`` beyond ``most`` characters, as they are and after NFKC, which makes 18 of one.

    Also beyond the 30 combining marks in a row of Unicode's stream-safe format: NFKC sorts such a run in quadratic time
    (8,192 marks: 90 ms).
    """
    if len(text) > most:
        raise Unscorable(Reason.TOO_LARGE, text)
    if not text.isascii():
        runs = itertools.groupby(text, lambda sign: unicodedata.combining(sign) > 0)
        if any(is_mark and len(list(run)) > MAX_MARKS for is_mark, run in runs):
            raise Unscorable(Reason.TOO_LARGE, text)
        if len(unicodedata.normalize("NFKC", text)) > most:
            raise Unscorable(Reason.TOO_LARGE, text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once)


def strict_json(text: str) -> Any:
    """The JSON value in ``text``: finite numbers, no key twice, bounded depth and length. ``Unscorable`` otherwise."""
    check_length(text)
    try:
        tree = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Unscorable(Reason.UNREADABLE, text) from error
    _check_size(tree, text, MAX_JSON_DEPTH)
    return tree


def one_json(text: str) -> Any:
    """The one JSON object or list that stands in ``text``, as strict as ``strict_json``.

    Words and a code fence may stand around it, brackets and braces may not: nothing is picked out of an answer of
    which another part cannot be read. The same value twice counts once; two that differ are ``several``.
    """
    check_length(text)
    values: list[Any] = []
    place = 0
    while (bracket := _BRACKET.search(text, place)) is not None:
        try:
            value, place = _DECODER.raw_decode(text, bracket.start())
        except (ValueError, RecursionError) as error:
            raise Unscorable(Reason.UNREADABLE, text) from error
        _check_size(value, text, MAX_JSON_DEPTH)
        values.append(value)
    if not values:
        raise Unscorable(Reason.NO_ANSWER, text)
    if any(value != values[0] for value in values):
        raise Unscorable(Reason.SEVERAL, text)
    return values[0]


def finite_number(value: object) -> bool:
    """A JSON number within the limits; a bool and a number in quotes are none."""
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER and math.isfinite(value)  # type: ignore[arg-type]


def _check_size(tree: Any, text: str, depth: int) -> None:
    if isinstance(tree, dict | list):
        if depth == 0 or len(tree) > MAX_JSON_ITEMS:
            raise Unscorable(Reason.TOO_LARGE, text)
        for value in tree.values() if isinstance(tree, dict) else tree:
            _check_size(value, text, depth - 1)
