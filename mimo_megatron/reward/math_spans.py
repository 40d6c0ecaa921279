r"""Subsets of the real line, however written: intervals, unions, inequalities, ``\mathbb{R}`` without points."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise

from mimo_megatron.reward.math_forms import REALS, Form, Relation, Sequence, Union, Value, Without, read_form
from mimo_megatron.reward.math_leaves import leaf_equal, number

_SYMBOL = re.compile(
    r"(?:\([a-z](?:, ?[a-z])+\)|\\frac\{d\w?\}\{d\w\}|\\text\s*\{[^{}]*\}"
    r"|[A-Za-z][A-Za-z ]{0,40}|\\(?!sum|int|prod|lim|frac|sqrt|sin|cos|tan|ln|log)[A-Za-z]+)"
    r"(?:_(?:\w|\{[^{}]*\}))?'*(?:\([^()=]{1,20}\))?(?:\s?[A-Z]{1,4})?"
)
_LOWER = r"-\infty"
_UPPER = r"\infty"


def is_symbol(text: str) -> bool:
    r"""A name that a value may be given to: ``x``, ``x_1``, ``f(2)``, ``\angle ABC``, ``\text{Area}``."""
    return bool(_SYMBOL.fullmatch(text.strip())) and not re.search(r"\b(?:not|or|never)\b", text)


@dataclass(frozen=True)
class Span:
    low: str
    high: str
    has_low: bool = False
    has_high: bool = False


def spans(form: Form) -> list[Span] | None:
    """The parts of the line, as written; None for what is no such subset. A pair in round brackets is one."""
    if form == REALS:
        return [Span(_LOWER, _UPPER)]
    if isinstance(form, Sequence) and form.brackets == "":
        return _joined(form)
    if isinstance(form, Sequence) and form.brackets in ("()", "[]", "[)", "(]"):
        if len(form.parts) != 2 or not all(isinstance(part, Value) for part in form.parts):
            return None
        low, high = (part.text for part in form.parts if isinstance(part, Value))
        return [Span(low, high, form.brackets[0] == "[", form.brackets[1] == "]")]
    if isinstance(form, Sequence) and form.brackets == "{}":
        points = [part.text for part in form.parts if isinstance(part, Value)]
        return [Span(point, point, True, True) for point in points] if len(points) == len(form.parts) else None
    if isinstance(form, Union):
        parts = [spans(part) for part in form.parts]
        return None if any(part is None for part in parts) else [span for part in parts for span in part or []]
    if isinstance(form, Without):
        holes = spans(form.hole)
        if spans(form.whole) != [Span(_LOWER, _UPPER)] or not holes or any(span.low != span.high for span in holes):
            return None
        return _around(sorted((span.low for span in holes), key=lambda text: number(text) or 0.0))
    return _inequality(form) if isinstance(form, Relation) else None


def _around(points: list[str]) -> list[Span]:
    """The line without these points, which are in order."""
    ends = [_LOWER, *points, _UPPER]
    return [Span(low, high) for low, high in pairwise(ends)]


def _inequality(form: Relation) -> list[Span] | None:
    sides, signs = form.sides, tuple({r"\lt": "<", r"\gt": ">"}.get(sign, sign) for sign in form.signs)
    if signs == (r"\in",):
        return spans(read_form(sides[1])) if is_symbol(sides[0]) else None
    if signs == (r"\ne",):
        return _around([sides[1]]) if is_symbol(sides[0]) and number(sides[1]) is not None else None
    if not set(signs) <= {"<", ">", r"\le", r"\ge"} or len(sides) > 3:
        return None
    if signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], tuple({">": "<", r"\ge": r"\le"}.get(sign, sign) for sign in signs[::-1])
    if any(sign in (">", r"\ge") for sign in signs):
        return None
    closed = [sign == r"\le" for sign in signs]
    if len(sides) == 3 and is_symbol(sides[1]) and all(number(side) is not None for side in sides[::2]):
        return [Span(sides[0], sides[2], closed[0], closed[1])]
    if len(sides) == 2 and is_symbol(sides[0]) and number(sides[1]) is not None:
        return [Span(_LOWER, sides[1], False, closed[0])]
    if len(sides) == 2 and is_symbol(sides[1]) and number(sides[0]) is not None:
        return [Span(sides[0], _UPPER, closed[0], False)]
    return None


def _joined(form: Sequence) -> list[Span] | None:
    """``x < 1 or x > 3``; ``x > 1 and x < 3``. Only inequalities, so that a list of numbers stays a list."""
    parts = [_inequality(part) if isinstance(part, Relation) else None for part in form.parts]
    if any(part is None for part in parts) or len(parts) < 2:
        return None
    found = [span for part in parts for span in part or []]
    if form.joint != "and":
        return found
    lower = [span for span in found if span.high == _UPPER]
    upper = [span for span in found if span.low == _LOWER]
    if len(found) != 2 or len(lower) != 1 or len(upper) != 1:
        return None
    return [replace(lower[0], high=upper[0].high, has_high=upper[0].has_high)]


def spans_equal(gold: Form, answer: Form) -> bool:
    """Part by part, from left to right; parts that touch are not merged."""
    true, said = spans(gold), spans(answer)
    if true is None or said is None or len(true) != len(said):
        return False
    pairs = zip(_sorted(true), _sorted(said), strict=True)
    return all(
        (one.has_low, one.has_high) == (other.has_low, other.has_high)
        and leaf_equal(one.low, other.low)
        and leaf_equal(one.high, other.high)
        for one, other in pairs
    )


def _sorted(parts: list[Span]) -> list[Span]:
    keys = [number(part.low) for part in parts]
    if any(key is None for key in keys):
        return parts
    return [part for _, part in sorted(zip(keys, parts, strict=True), key=lambda pair: pair[0])]
