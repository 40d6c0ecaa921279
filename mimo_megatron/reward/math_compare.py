r"""Whether an answer's form matches a gold's. Equal shapes are compared part by part, leaves as algebra.

What an answer may leave out, because the question fixes it: a unit, a base, the braces of a set, ``x =``. What it may
not: a border, a sign, the order of a tuple, percent.
"""

import re
from collections.abc import Callable
from typing import Any, TypeGuard

from mimo_megatron.reward.math_forms import (
    REALS,
    Based,
    Choice,
    Form,
    Matrix,
    Quantity,
    Relation,
    Sequence,
    Union,
    Value,
    Without,
    Words,
    read_form,
)
from mimo_megatron.reward.math_leaves import family, leaf_equal, only_variable, proportional_sides, same_signs
from mimo_megatron.reward.math_spans import is_symbol, spans, spans_equal
from mimo_megatron.reward.math_units import DEGREE, RADIAN, read_unit

_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_BARE_QUANTITY = re.compile(r"(-?\d+(?:\.\d+)?) ?([A-Za-zΩ])")
_BASES = {"two": "2", "three": "3", "eight": "8", "ten": "10", "sixteen": "16"}
_EQUALS = frozenset({"=", r"\approx"})
_ORDERED = ("()", "<>", "[]")


def texts_match(gold: str, answer: str) -> bool:
    """The verdict on two cleaned texts; raises as ``leaf_equal`` does."""
    if same_signs(_TEXT.sub(r"\1", gold), _TEXT.sub(r"\1", answer)):
        return True
    form = read_form(gold)
    if isinstance(form, Value) and _DECIMAL_COMMA.fullmatch(answer):
        return leaf_equal(gold, answer.replace(",", "."))
    return matches(form, read_form(answer))


def matches(gold: Form, answer: Form) -> bool:
    """By the rule for the gold's form, after an assignment is taken off the answer."""
    if isinstance(answer, Relation) and not isinstance(gold, Relation) and is_symbol(answer.sides[0]):
        if set(answer.signs) <= _EQUALS:
            exact = answer.signs[0] == "="  # in x = \pi \approx 3.1 the first side is meant
            sides = [
                side for side, sign in zip(answer.sides[1:], answer.signs, strict=True) if not exact or sign == "="
            ]
            return all(matches(gold, read_form(side)) for side in sides)
        if answer.signs == (r"\in",) and not isinstance(gold, Value):
            return matches(gold, read_form(answer.sides[1]))
    rule: Callable[[Any, Form], bool] = _RULES[type(gold)]
    return rule(gold, answer)


def _value(gold: Value, answer: Form) -> bool:
    if isinstance(answer, Value):
        return leaf_equal(gold.text, answer.text)
    if isinstance(answer, Words):
        return answer.text == gold.text.lower() and len(gold.text) > 1
    if isinstance(answer, Quantity):
        measured = _as_quantity(gold)
        return matches(measured, answer) if measured else not answer.more and _number_of(gold.text, answer)
    if isinstance(answer, Based):
        return leaf_equal(gold.text, f"{answer.digits}_{{{_base(answer)}}}")
    if isinstance(answer, Choice):
        if len(gold.text) == 1 and gold.text in "ABCDEFGHIJ":
            return answer.letter == gold.text
        return answer.rest is not None and matches(gold, answer.rest)
    return False


def _number_of(gold: str, answer: Quantity) -> bool:
    """A quantity beside a bare number: its unit was left out of the gold; million and degree are part of the number."""
    if not answer.unit.dimension:
        return leaf_equal(gold, _scaled(answer))
    if "%" in gold:
        return False
    return leaf_equal(gold, answer.text) or (answer.unit.dimension == DEGREE and leaf_equal(gold, _radians(answer)))


def _scaled(one: Quantity) -> str:
    size = one.unit.size
    return f"({one.text})*{size.numerator}/{size.denominator}" if size != 1 else one.text


def _radians(one: Quantity) -> str:
    return f"({one.text})\\degree"


def _as_quantity(one: Value) -> Quantity | None:
    """``5 m`` where the other side has a unit; alone it is five times a variable."""
    found = _BARE_QUANTITY.fullmatch(one.text)
    unit = read_unit(found.group(2)) if found else None
    return Quantity(found.group(1), unit) if found and unit else None


def _quantity(gold: Quantity, answer: Form) -> bool:
    if isinstance(answer, Value):
        answer = _as_quantity(answer) or answer
    if isinstance(answer, Quantity):
        kinds = (gold.unit.dimension, answer.unit.dimension)
        if kinds == (DEGREE, RADIAN):
            return leaf_equal(_radians(gold), answer.text)
        if kinds == (RADIAN, DEGREE):
            return leaf_equal(gold.text, _radians(answer))
        if kinds[0] != kinds[1] or any(part.unit.dimension != kinds[0] for part in gold.more + answer.more):
            return False
        if gold.unit.size == answer.unit.size and not gold.more + answer.more:
            return leaf_equal(gold.text, answer.text)
        return leaf_equal(_total(gold), _total(answer))
    if isinstance(answer, Value) and not gold.more:
        return _number_of(answer.text, gold)
    return False


def _total(one: Quantity) -> str:
    return "+".join([_scaled(one), *(_scaled(part) for part in one.more)])


def _based(gold: Based, answer: Form) -> bool:
    if isinstance(answer, Based):
        return gold.digits.lower() == answer.digits.lower() and _base(gold) == _base(answer)
    return isinstance(answer, Value) and answer.text.lower() == gold.digits.lower()


def _base(one: Based) -> str:
    return _BASES.get(one.base.lower(), one.base)


def _words(gold: Words, answer: Form) -> bool:
    if isinstance(answer, Choice):
        return answer.rest is not None and matches(gold, answer.rest)
    if gold == REALS:
        return answer == REALS or spans_equal(gold, answer)
    return answer == gold or (isinstance(answer, Value) and answer.text.lower() == gold.text)


def _choice(gold: Choice, answer: Form) -> bool:
    if isinstance(answer, Choice):
        both = gold.rest is not None and answer.rest is not None
        return gold.letter == answer.letter and (not both or matches(gold.rest, answer.rest))  # type: ignore[arg-type]
    if isinstance(answer, Value) and answer.text == gold.letter:
        return True
    return gold.rest is not None and matches(gold.rest, answer)


def _sequence(gold: Sequence, answer: Form) -> bool:
    if bound := _bound_variable(gold):
        return _families(gold, bound, answer)
    if gold.brackets == "{}":
        return _set(gold, answer)
    if gold.brackets == "":
        return _list(gold, answer)
    if isinstance(answer, Matrix):
        is_vector = gold.brackets in ("()", "<>") or (gold.brackets == "[]" and len(gold.parts) != 2)
        return is_vector and _in_order(gold.parts, _vector(answer))
    if isinstance(answer, Sequence):
        if gold.brackets in ("()", "<>") and answer.brackets in ("()", "<>", ""):
            return answer.joint == "," and _in_order(gold.parts, answer.parts)
        if len(gold.parts) != 2 and gold.brackets in _ORDERED and answer.brackets in (*_ORDERED, ""):
            return _in_order(gold.parts, answer.parts)
    return len(gold.parts) == 2 and spans_equal(gold, answer)


def _set(gold: Sequence, answer: Form) -> bool:
    if not isinstance(answer, Sequence):
        return len(gold.parts) == 1 and matches(gold.parts[0], answer)
    if answer.brackets not in ("{}", "") or len(_symbols(answer)) > 1:
        return False
    return _in_any_order(_once(gold.parts), _once(_unassigned(answer)))


def _once(parts: tuple[Form, ...]) -> tuple[Form, ...]:
    kept: list[Form] = []
    for part in parts:
        if not any(matches(other, part) for other in kept):
            kept.append(part)
    return tuple(kept)


def _list(gold: Sequence, answer: Form) -> bool:
    """Solutions side by side: without order, unless labels or the brackets of a tuple give them one."""
    if spans(gold):
        return spans_equal(gold, answer)
    if not isinstance(answer, Sequence):
        return False
    named, said = _by_symbol(gold), _by_symbol(answer)
    if named and said:
        return named.keys() == said.keys() and all(matches(named[name], said[name]) for name in named)
    parts = tuple(named.values()) if named else _unassigned(gold)
    is_tuple = answer.brackets in ("()", "<>")
    if (named and _symbols(answer)) or (is_tuple and not named and (_symbols(gold) or gold.joint != ",")):
        return False  # other names than the gold's; a pair for two solutions of one unknown
    if named or gold.is_ordered or answer.is_ordered or is_tuple or len(_symbols(answer)) > 1:
        return answer.brackets in ("", "()", "<>") and _in_order(parts, answer.parts)
    return answer.brackets in ("", "{}") and _in_any_order(parts, _unassigned(answer))


def _unassigned(answer: Sequence) -> tuple[Form, ...]:
    """``x = 1 or x = 2`` and ``x = 1, 2`` as 1 and 2, where one symbol is meant."""
    if len(_symbols(answer)) != 1:
        return answer.parts
    return tuple(read_form(part.sides[1]) if _is_assignment(part) else part for part in answer.parts)


def _is_assignment(part: Form) -> TypeGuard[Relation]:
    return isinstance(part, Relation) and part.signs == ("=",) and is_symbol(part.sides[0])


def _symbols(one: Sequence) -> set[str]:
    """That values are given to; ``x_1`` and ``x_2`` are one unknown."""
    return {re.sub(r"_(?:\w|\{\w+\})$", "", part.sides[0]) for part in one.parts if _is_assignment(part)}


def _by_symbol(one: Sequence) -> dict[str, Form] | None:
    """Values by name, where every part is ``symbol = value`` with a name of its own."""
    pairs = {part.sides[0]: read_form(part.sides[1]) for part in one.parts if _is_assignment(part)}
    return pairs if len(pairs) == len(one.parts) else None


def _in_order(gold: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
    return len(gold) == len(answer) and all(matches(*pair) for pair in zip(gold, answer, strict=True))


def _in_any_order(gold: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
    """Equality of leaves is transitive but for the rounding of decimals, so the first match may be taken."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for part in gold:
        found = next((place for place, other in enumerate(left) if matches(part, other)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _vector(matrix: Matrix) -> tuple[Form, ...]:
    is_row = len(matrix.rows) == 1
    cells = matrix.rows[0] if is_row else tuple(row[0] for row in matrix.rows)
    return cells if is_row or all(len(row) == 1 for row in matrix.rows) else ()


def _matrix(gold: Matrix, answer: Form) -> bool:
    if isinstance(answer, Matrix):
        return len(gold.rows) == len(answer.rows) and all(map(_in_order, gold.rows, answer.rows))
    return isinstance(answer, Sequence) and answer.brackets in _ORDERED and _in_order(_vector(gold), answer.parts)


def _relation(gold: Relation, answer: Form) -> bool:
    has_symbol = is_symbol(gold.sides[0]) and set(gold.signs) <= _EQUALS
    if not isinstance(answer, Relation):
        if has_symbol:
            return matches(read_form(gold.sides[-1]), answer)
        if gold.signs == (r"\in",):
            return matches(read_form(gold.sides[1]), answer)
        return spans_equal(gold, answer)
    if has_symbol and set(answer.signs) <= _EQUALS and same_signs(gold.sides[0], answer.sides[0]):
        true = read_form(gold.sides[-1])
        return all(matches(true, read_form(side)) for side in answer.sides[1:])
    if spans(gold) or spans(answer):
        return _unknowns(gold) == _unknowns(answer) and spans_equal(gold, answer)
    if len(gold.sides) == len(answer.sides) == 2:
        sign = proportional_sides(gold.sides, answer.sides)
        return bool(sign) and answer.signs[0] == (gold.signs[0] if sign > 0 else _FLIPPED.get(gold.signs[0]))
    if gold.signs != answer.signs:  # a < b < c and c > b > a
        answer = Relation(answer.sides[::-1], tuple(_FLIPPED.get(sign, sign) for sign in answer.signs[::-1]))
    return gold.signs == answer.signs and all(map(leaf_equal, gold.sides, answer.sides))


def _unknowns(one: Relation) -> set[str]:
    """The letters that are bounded: a > 2 is not b > 2."""
    return {side.strip() for side in one.sides if is_symbol(side)}


_FLIPPED = {"=": "=", r"\ne": r"\ne", "<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def _region(gold: Union | Without, answer: Form) -> bool:
    if spans(gold):
        return spans_equal(gold, answer)
    if type(gold) is not type(answer):
        return False
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _in_any_order(gold.parts, answer.parts)
    assert isinstance(gold, Without) and isinstance(answer, Without)
    return matches(gold.whole, answer.whole) and matches(gold.hole, answer.hole)


# ---- families: x = a + b k for every whole number k ------------------------------------------------------------------


def _bound_variable(one: Sequence) -> str | None:
    last = one.parts[-1]
    if one.brackets == "" and isinstance(last, Relation) and last.signs == (r"\in",):
        is_whole = last.sides[1] in (r"\mathbb{Z}", r"\Z", r"\text{integers}")
        return last.sides[0] if is_whole and is_symbol(last.sides[0]) else None
    return None


def _families(gold: Sequence, bound: str, answer: Form) -> bool:
    said: tuple[Form, ...] = (answer,)
    name: str | None = None
    if isinstance(answer, Sequence) and answer.brackets == "":
        name = _bound_variable(answer)
        said = answer.parts[:-1] if name else answer.parts
    true = [family(text, bound) for text in _formulas(gold.parts[:-1])]
    texts = _formulas(said)
    found = [family(text, name or only_variable(text) or "") for text in texts]
    if not all(true) or not all(found) or len(true) != len(found):
        return False
    left = [one for one in found if one]
    for start, step in (one for one in true if one):
        match = next((one for one in left if _same_family(start, step, *one)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _formulas(parts: tuple[Form, ...]) -> list[str]:
    texts: list[str] = []
    for part in parts:
        if _is_assignment(part):
            part = read_form(part.sides[1])
        texts.extend(_formulas(part.parts) if isinstance(part, Sequence) else [getattr(part, "text", "")])
    return texts


def _same_family(start: float, step: float, other: float, other_step: float) -> bool:
    turns = (other - start) / step
    return abs(abs(step) - abs(other_step)) < 1e-9 * abs(step) and abs(turns - round(turns)) < 1e-9


_RULES: dict[type, Callable[[Any, Form], bool]] = {
    Value: _value, Quantity: _quantity, Based: _based, Words: _words, Choice: _choice, Sequence: _sequence,
    Matrix: _matrix, Relation: _relation, Union: _region, Without: _region,
}  # fmt: skip
