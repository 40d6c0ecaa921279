r"""The shape of an answer: value, quantity, list, tuple, set, interval, union, relation, matrix, words, choice.

Shapes are read here, by brackets and separators, so that only leaves are ever compared as algebra: a set is no pair,
a relation is no value, and (1000, 2) costs no grammar. Time is linear in the text at every level of brackets.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from mimo_megatron.reward.math_text import closing, split_top, tokens, trim
from mimo_megatron.reward.math_units import KNOWN, Unit, read_unit


@dataclass(frozen=True)
class Value:
    text: str


@dataclass(frozen=True)
class Quantity:
    text: str
    unit: Unit
    more: tuple["Quantity", ...] = ()
    """Of 2 hours 30 minutes, the minutes."""


@dataclass(frozen=True)
class Based:
    digits: str
    base: str


@dataclass(frozen=True)
class Words:
    text: str
    """Lower case, single spaces."""


@dataclass(frozen=True)
class Choice:
    letter: str
    rest: "Form | None"


@dataclass(frozen=True)
class Sequence:
    brackets: str
    r"""``()``, ``[]``, ``[)``, ``(]``, ``{}``, ``<>``, or empty for a bare list."""
    parts: tuple["Form", ...]
    is_ordered: bool = False
    """Of a bare list: its parts are labelled (a), (b), ..."""
    joint: str = ","
    """Of a bare list: ``or`` and ``and`` where words stand between its parts."""


@dataclass(frozen=True)
class Union:
    parts: tuple["Form", ...]


@dataclass(frozen=True)
class Without:
    whole: "Form"
    hole: "Form"


@dataclass(frozen=True)
class Relation:
    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple["Form", ...], ...]


Form = Value | Quantity | Based | Words | Choice | Sequence | Union | Without | Relation | Matrix

SIGNS = frozenset({"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx", r"\lt", r"\gt"})
EMPTY = Words("no solution")
REALS = Words("all real numbers")
_JOINTS = frozenset({",", ";", r"\orword", r"\andword"})
_JOINT = re.compile(r"\\text\{\s*,?\s*(or|and)\s*\}|(?<![A-Za-z\\])(or|and)(?![A-Za-z])")
_LABEL = re.compile(r"(?:^|(?<=[,;] )|(?<=[,;]))(?:\\text)?\{?\(([a-h])\)\}?\s*")
_CHOICE = re.compile(
    r"(?:\\text\s*)?\{?\s*(?:\(\s*(?:\\text\{)?([A-Ja-j])\}?\s*\)|([A-J])(?=\s*[.:)]))\s*\}?\s*[.:)]?\s*(.*)", re.DOTALL
)
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BUILDER = re.compile(r"\s*[a-z](?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]\s*(.*[<>=\\].*)", re.DOTALL)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_BASED = re.compile(r"([0-9A-Za-z]+)_(?:\{\s*(?:\\text\{)?\s*(\w+)\s*\}?\s*\}|(\d))")
_MEASURED = re.compile(
    r"((?:-\s?)?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?:\s?\\(?:times|cdot)\s?10\s?\^\s?(?:\{-?\d+\}|\d))?"
    r"(?:/\d+|\s?\\frac\{\d+\}\{\d+\})?)\s*((?:\\text|\\degree|\\mu|[A-Za-zµΩ€£¥¢$\u4e00-\u9fff\\]).*)",
    re.DOTALL,
)
_UNIT_TAIL = re.compile(r"(.*?[^\s\\])\s*((?:\\degree\s*)?\\text\s*\{[^{}]*\}(?:.*)|\\degree)", re.DOTALL)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_CURRENCY = re.compile(r"(-?)\s*(?:\\\$|([€£¥]))\s*(.+)", re.DOTALL)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_NUMBERS = _NUMBER_WORDS.split()
_SAME_WORDS = {
    **dict.fromkeys(("no solutions", "no real solution", "no real solutions", "empty set", "none"), EMPTY.text),
    **dict.fromkeys(("the empty set", "no such solution", "no solution exists"), EMPTY.text),
    **dict.fromkeys(("all reals", "all real values", "the real numbers", "real numbers"), REALS.text),
    "无解": EMPTY.text, "does not exist": "dne", "doesn't exist": "dne", "t": "true", "f": "false",
}  # fmt: skip


@lru_cache(maxsize=4096)
def read_form(text: str) -> Form:
    """The form of a cleaned text. Never fails: what has no other shape is a ``Value``."""
    text = trim(text)
    labels = [found.group(1) for found in _LABEL.finditer(text)]
    is_labelled = len(labels) > 1 and labels == list("abcdefgh"[: len(labels)])
    if is_labelled:
        text = _LABEL.sub("", text)
    text = _JOINT.sub(lambda found: rf" \{found.group(1) or found.group(2)}word ", text)
    parts = [(trim(part), joint) for part, joint in split_top(text, _JOINTS)]
    if len(parts) > 1 and not parts[-1][0]:
        parts.pop()
    if len(parts) > 1:
        forms = tuple(read_form(part) for part, _ in parts if part)
        joints = {joint[1:-4] if joint.endswith("word") else "," for _, joint in parts[1:]}
        return Sequence("", forms, is_labelled, joints.pop() if len(joints) == 1 else ",")
    return _read_one(trim(text))


def _read_one(text: str) -> Form:
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return EMPTY
    if text == r"\mathbb{R}":
        return REALS
    choice = _CHOICE.fullmatch(text)
    rest = choice.group(3) if choice else ""
    is_two = _CHOICE.fullmatch(rest) or re.fullmatch(r"[A-J]|.*\b(?:wrong|not|incorrect|false)\b.*", trim(rest))
    if choice and not rest.startswith(("+", "-", "(", "^", "_", "/", "=")) and not is_two:
        return Choice((choice.group(1) or choice.group(2)).upper(), read_form(rest) if rest else None)
    for separator, join in ((frozenset({r"\cup"}), Union), (frozenset({r"\setminus", r"\backslash"}), None)):
        parts = [part for part, _ in split_top(text, separator)]
        if len(parts) > 1:
            forms = tuple(read_form(part) for part in parts)
            return Union(forms) if join else Without(forms[0], forms[1])
    sides = split_top(text, SIGNS)
    if len(sides) > 1:
        return Relation(tuple(side for side, _ in sides), tuple(sign for _, sign in sides[1:]))
    if enclosed := _read_brackets(text):
        return enclosed
    if r"\pm" in text or r"\mp" in text:
        return Sequence("", tuple(Value(_with_sign(text, upper)) for upper in ("+", "-")))
    if (based := _BASED.fullmatch(text)) and text[0].isdigit():
        return Based(based.group(1), based.group(2) or based.group(3))
    return _read_words(text) or _read_quantity(text) or Value(text)


def _with_sign(text: str, upper: str) -> str:
    lower = "-" if upper == "+" else "+"
    return re.sub(r"\\pm(?![A-Za-z])", upper, re.sub(r"\\mp(?![A-Za-z])", lower, text))


_BRACKETS = {
    "(": ({")": "()", "]": "(]"}),
    "[": ({")": "[)", "]": "[]"}),
    r"\{": ({r"\}": "{}"}),
    r"\langle": ({r"\rangle": "<>"}),
}


def _read_brackets(text: str) -> Form | None:
    if matrix := _MATRIX.fullmatch(text):
        if matrix.group(1) in ("vmatrix", "Vmatrix"):
            return None
        rows = [row for row in re.split(r"\\\\|\\cr", matrix.group(2)) if row.strip()]
        return Matrix(tuple(tuple(read_form(cell) for cell in row.split("&")) for row in rows))
    first = next(tokens(text), None)
    if first is None or first[0] not in _BRACKETS or closing(text, 0) != len(text) - 1:
        return None
    ends = _BRACKETS[first[0]]
    end = next((sign for sign in (r"\rangle", r"\}", ")", "]") if text.endswith(sign) and sign in ends), None)
    if end is None:
        return None
    inner = text[first[2] : len(text) - len(end)]
    if first[0] == r"\{" and (builder := _BUILDER.fullmatch(inner)):
        return read_form(builder.group(1))
    parts = [part for part, _ in split_top(inner, frozenset({",", ";"}))]
    if len(parts) == 1 and first[0] != r"\{":
        return None
    if len(parts) == 1 and not parts[0]:
        return EMPTY
    return Sequence(ends[end], tuple(read_form(part) for part in parts))


def _read_words(text: str) -> Form | None:
    if re.fullmatch(r"[\u4e00-\u9fff]+", _TEXT.sub(r"\1", text).strip()):
        word = _TEXT.sub(r"\1", text).strip()
        return Words(_SAME_WORDS.get(word, word))
    if text in KNOWN or (len(text) < 2 and text):
        return None
    bare = " ".join(_TEXT.sub(r" \1 ", text).replace("*", "").split()).strip(" .!\"'")
    is_marked = bool(_TEXT.match(text)) and not re.search(r"[\d\\^_{}+=]", bare)
    if not bare or not (is_marked or re.fullmatch(r"[A-Za-z][a-z']+(?:[ -][A-Za-z][a-z']*)*", bare)):
        return None
    if len(bare) == 1:
        return Value(bare)
    if not is_marked and len(bare) == 2:
        return None  # ab is a product of two variables
    word = bare.lower()
    sign, _, digits = word.rpartition(" ")
    if digits in _NUMBERS and sign in ("", "minus", "negative"):
        return Value(f"{'-' if sign else ''}{_NUMBERS.index(digits)}")
    return Words(_SAME_WORDS.get(word, word))


def _read_quantity(text: str) -> Form | None:
    if money := _CURRENCY.fullmatch(text):
        unit = read_unit(money.group(2) or "$")
        inner = _read_quantity(trim(money.group(3)))
        if unit and isinstance(inner, Quantity) and not inner.unit.dimension:  # $3 million
            return Quantity(money.group(1) + inner.text, Unit(unit.dimension, inner.unit.size * unit.size))
        return Quantity(money.group(1) + trim(money.group(3)), unit) if unit else None
    if (measured := _MEASURED.fullmatch(text)) and (found := _measured(*measured.groups())):
        return found
    if (
        (tail := _UNIT_TAIL.fullmatch(text))
        and not _FUNCTION.search(tail.group(1))
        and (unit := read_unit(tail.group(2)))
    ):
        return Quantity(trim(tail.group(1)), unit)
    return None


def _measured(number: str, words: str) -> Form | None:
    """A number with a unit: in ``\\text``, of a known name after a space, or a plain word of three letters or more."""
    more: tuple[Quantity, ...] = ()
    if split := re.match(r"((?:\\text\{[^{}]*\}|[a-z ])+?)\s*(\d.*)", words):
        rest = _read_quantity(split.group(2))
        words, more = split.group(1), (rest,) if isinstance(rest, Quantity) else ()
        if not more:
            return None
    unit = read_unit(words)
    is_marked = words.startswith((r"\text", r"\degree", "$", "€", "£", "¥", "¢")) or words in KNOWN
    first = re.match(r"[A-Za-zµΩ]+", words)
    word = first.group() if first else ""
    is_word = len(word) > 1 and (word in KNOWN or (len(word) > 2 and word.islower()))
    if unit is None or not (is_marked or is_word):
        return None
    return Quantity(number.strip(), unit, more)
