"""Comparing two formulas without structure of their own: by their signs, by our own reader, last by Math-Verify."""

import re
from fractions import Fraction
from typing import Any

from mimo_megatron.reward.answer import Unscorable
from mimo_megatron.reward.math_expr import Tree, Unread, read_tree
from mimo_megatron.reward.math_library import library_equal, parse
from mimo_megatron.reward.math_value import NoValue, equal, names, proportional, value_at
from mimo_megatron.reward.verdict import Reason

_DOTS = re.compile(r"\\[lc]?dots")
_FIGURE = re.compile(r"\\(?:triangle|angle)(?![A-Za-z])\s*")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")


def leaf_equal(gold: str, answer: str) -> bool:
    """``Unscorable`` where the answer is unreadable or too large, ``LibraryError`` where the library gave up."""
    if same_signs(gold, answer):
        return True
    if is_name(gold) or is_name(answer):
        return gold.startswith(r"\angle") and _signs(gold) == [r"\angle", *_signs(answer)[:0:-1]]
    if ":" in gold + answer:
        if _CLOCK.fullmatch(gold):
            return gold.lstrip("0") == answer.strip().lstrip("0")
        if max(gold.count(":"), answer.count(":")) > 1:
            return _ratios_equal(gold.split(":"), answer.split(":"))
        gold, answer = gold.replace(":", "/"), answer.replace(":", "/")
    if _DOTS.search(answer) and not _DOTS.search(gold):  # the library reads over them
        return False
    try:
        return equal(read_tree(gold), read_tree(answer))
    except NoValue:
        return False
    except Unread:
        pass
    try:
        return library_equal(gold, answer)
    except ValueError as error:
        raise Unscorable(Reason.UNREADABLE, answer) from error


def _ratios_equal(gold: list[str], answer: list[str]) -> bool:
    """3:4:5 is 6:8:10, as every part is to the first."""
    return len(gold) == len(answer) and all(
        leaf_equal(f"({gold[0]})/({true})", f"({answer[0]})/({said})")
        for true, said in zip(gold[1:], answer[1:], strict=True)
    )


def check_readable(text: str) -> None:
    """``ValueError`` where neither our reader nor the library reads it; ``NoValue`` where it is undefined."""
    if _CLOCK.fullmatch(text):  # 12:00 is no division
        return
    try:
        tree = read_tree(text.replace(":", "/"))
        if not names(tree) and tree[-1] != ("oo",) and tree != ("oo",):
            value_at(tree, 0, False)
    except Unread:
        if not is_name(text):
            parse(text)


def same_signs(one: str, other: str) -> bool:
    """The same tokens, spaces apart."""
    return _signs(one) == _signs(other)


def _signs(text: str) -> list[str]:
    return re.findall(r"\d+|\\[A-Za-z]+|\S", text)


def is_name(text: str) -> bool:
    """Letters alone that are no product: with a capital (points of a figure), or three and more (a word)."""
    text = _FIGURE.sub("", text)
    return len(text) > 1 and text.isascii() and text.isalpha() and (len(text) > 2 or text != text.lower())


def proportional_sides(gold: tuple[str, str], answer: tuple[str, str]) -> int:
    """The sign of c where answer's left - right = c * (gold's left - right); 0 where there is no such constant."""
    try:
        return proportional(_difference(*gold), _difference(*answer))
    except (Unread, NoValue):
        return 0


def _difference(left: str, right: str) -> Tree:
    return ("+", read_tree(left), ("neg", read_tree(right)))


def number(text: str) -> Any:
    """A comparable value, infinity included; None where the text is no real number."""
    try:
        tree = read_tree(text)
    except Unread:
        return None
    if tree in (("oo",), ("neg", ("oo",))):
        return float("inf") if tree == ("oo",) else float("-inf")
    try:
        value = value_at(tree, 0, True) if not names(tree) else None
    except NoValue:
        return None
    try:
        return None if value is None else float(value)
    except (TypeError, OverflowError):  # complex or huge
        return None


def substituted(tree: Tree, name: str, whole: int) -> Tree:
    """The tree with a variable set to a whole number."""
    if tree == ("var", name):
        return ("num", Fraction(whole), None, 0)
    return tuple(substituted(part, name, whole) if isinstance(part, tuple) else part for part in tree)


def family(text: str, name: str) -> tuple[Any, Any] | None:
    """(start, step) of values that are linear in a whole number ``name``; None where they are not."""
    try:
        tree = read_tree(text)
        if names(tree) != {name}:
            return None
        first, second, third = (float(value_at(substituted(tree, name, whole), 0, True)) for whole in (0, 1, 2))
    except (Unread, NoValue, TypeError, OverflowError):  # float() of a complex or a huge value
        return None
    start, step = first, second - first
    return (start, step) if step and abs(third - second - step) < 1e-9 * abs(step) else None


def only_variable(text: str) -> str | None:
    """The one variable in a formula."""
    try:
        found = names(read_tree(text))
    except Unread:
        return None
    return next(iter(found)) if len(found) == 1 else None
