"""Whether two trees have equal values: exactly where both are rational, else numerically.

Two expressions with variables are equal if they agree at five or more fixed points of rational coordinates (Schwartz-
Zippel: polynomials, which are evaluated exactly, agree by chance with a probability of about degree / 2,000 a point),
among them negative ones. A point where a root or a logarithm leaves the real numbers is passed over, so that both
sides keep their meaning for real variables. All values are bounded before they are computed. 50 digits are carried,
30 compared.
"""

import hashlib
import math
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from mimo_megatron.reward.answer import Unscorable
from mimo_megatron.reward.math_expr import Tree, Unread
from mimo_megatron.reward.verdict import Reason

DIGITS = 50
TOLERANCE = Fraction(1, 10**30)
DECIMAL_TOLERANCE = Fraction(1, 10**6)
"""Between decimals, relative."""
EXACT_TOLERANCE = Fraction(1, 10**9)
"""Of a decimal beside a number that needs no rounding: noise of floating point, no more."""
MAX_BITS = 8192
"""Of an exact number."""
MAX_MAGNITUDE = 20_000
"""Of any other value, as a binary exponent."""
ROUNDED_GOLD_DIGITS = 3
"""A gold with as many digits may be a rounding; 0.5 is a half."""
ROUNDED_ANSWER_DIGITS = 6
POINTS = 5
MORE_POINTS = 16
"""Where any of them is in no domain, so that a root of x does not hide the sign of y in every point that is left."""


class NoValue(Exception):
    """Undefined here: a division by zero, or a root that is not real where it should be."""


ARITHMETIC = threading.RLock()
"""Held while values are computed: mpmath changes the precision of its context meanwhile, and sympy uses mpmath too."""
_CONTEXT = mpmath.MPContext()
_CONTEXT.dps = DIGITS


def _context() -> Any:
    return _CONTEXT


def names(tree: Tree) -> frozenset[str]:
    """Of the variables in it."""
    if tree[0] == "var":
        return frozenset({tree[1]})
    return frozenset().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


def has(tree: Tree, kind: str) -> bool:
    return tree[0] == kind or any(has(part, kind) for part in tree[1:] if isinstance(part, tuple))


def has_decimal(tree: Tree) -> bool:
    if tree[0] == "num":
        return tree[2] is not None
    return any(has_decimal(part) for part in tree[1:] if isinstance(part, tuple))


def equal(gold: Tree, answer: Tree) -> bool:
    """``NoValue`` where either has none, ``Unread`` where points do not decide, ``Unscorable`` beyond the bounds."""
    variables = names(gold) | names(answer)
    if has(gold, "oo") or has(answer, "oo"):
        return _end(gold) == _end(answer)
    if not variables:
        return _equal_numbers(gold, answer)
    loose = DECIMAL_TOLERANCE if has_decimal(gold) or has_decimal(answer) else TOLERANCE
    for is_real in (True, False):
        agreeing = 0
        for point in range(MORE_POINTS):
            if agreeing == point == POINTS:
                break
            try:
                values = [value_at(tree, point, is_real and not has(tree, "i")) for tree in (gold, answer)]
            except NoValue:
                continue
            if not near(values[0], values[1], loose):
                return False
            agreeing += 1
        if agreeing >= 2:
            return True
    raise Unread("no point in both domains")


def proportional(gold: Tree, answer: Tree) -> int:
    """The sign of the constant c for which answer = c * gold, or 0 if there is none: equations of one curve."""
    if names(gold) != names(answer) or has(gold, "oo") or has(answer, "oo"):
        return 0
    loose = DECIMAL_TOLERANCE if has_decimal(gold) or has_decimal(answer) else TOLERANCE
    first: tuple[Any, Any] | None = None
    agreeing = 0
    for point in range(POINTS):
        try:
            true, said = value_at(gold, point, True), value_at(answer, point, True)
        except NoValue:
            continue
        if true == 0 or said == 0:
            return 0
        first = first or (true, said)
        if not near(_product(first[0], said), _product(first[1], true), loose):
            return 0
        agreeing += 1
    if first is None or agreeing < 2:
        raise Unread("no point in both domains")
    return 1 if (_number(first[0]) > 0) == (_number(first[1]) > 0) else -1


def _product(one: Any, other: Any) -> Any:
    exact = isinstance(one, Fraction) and isinstance(other, Fraction)
    return one * other if exact else _number(one) * _number(other)


def _end(tree: Tree) -> int | None:
    r"""1 or -1 for ``\infty`` and ``-\infty``; None for what is neither."""
    if tree == ("oo",):
        return 1
    if tree == ("neg", ("oo",)):
        return -1
    if has(tree, "oo"):
        raise Unread("an expression of infinity")
    return None


def _equal_numbers(gold: Tree, answer: Tree) -> bool:
    said, true = value_at(answer, 0, False), value_at(gold, 0, False)
    if isinstance(said, Fraction) and isinstance(true, Fraction) and said == true:
        return True
    gold_digits, answer_digits = literal(gold), literal(answer)
    if gold_digits is None and answer_digits is None:
        loose = DECIMAL_TOLERANCE if has_decimal(gold) or has_decimal(answer) else TOLERANCE
        exact = isinstance(said, Fraction) and isinstance(true, Fraction) and loose == TOLERANCE
        return not exact and near(true, said, loose)
    if gold_digits is not None and answer_digits is not None:
        coarser = max(gold_digits[1], answer_digits[1])
        return near(true, said, DECIMAL_TOLERANCE) and _gap(true, said) <= 10 * _number(coarser)  # 1234567.89
    digits, ulp = gold_digits or answer_digits or (0, Fraction(0))
    other, least = (said, ROUNDED_GOLD_DIGITS) if gold_digits else (true, ROUNDED_ANSWER_DIGITS)
    if _ends(other):
        return near(true, said, EXACT_TOLERANCE)
    return near(true, said, DECIMAL_TOLERANCE) or (digits >= least and _gap(true, said) <= _number(ulp / 2))


def literal(tree: Tree) -> tuple[int, Fraction] | None:
    """(significant digits, value of the last) of a decimal, also times a power of ten; None for anything else."""
    if tree[0] == "neg":
        return literal(tree[1])
    if tree[0] == "num" and tree[2] is not None:
        return tree[2], Fraction(10) ** -tree[3]
    if tree[0] == "*" and tree[2][0] == "^" and tree[2][1] == ("num", Fraction(10), None, 0):
        inner, power = literal(tree[1]), value_at(tree[2], 0, True)
        return (inner[0], inner[1] * power) if inner and isinstance(power, Fraction) else None
    return None


def _ends(value: Any) -> bool:
    """Whether its decimals end."""
    if not isinstance(value, Fraction):
        return False
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def near(one: Any, other: Any, tolerance: Fraction) -> bool:
    """Relative; next to an exact zero only what is zero to 40 digits is."""
    if one == other:
        return True
    if tolerance == TOLERANCE and isinstance(one, Fraction) and isinstance(other, Fraction):
        return False
    gap, size = _gap(one, other), max(_size(one), _size(other))
    if (one == 0 or other == 0) and not (isinstance(one, Fraction) and isinstance(other, Fraction)):
        return bool(gap <= _number(Fraction(1, 10**40)))
    return bool(gap <= _number(tolerance) * size)


def _size(value: Any) -> Any:
    return abs(_number(value))


def _gap(one: Any, other: Any) -> Any:
    return abs(_number(one) - _number(other))


def _number(value: Any) -> Any:
    if isinstance(value, Fraction):
        context = _context()
        return context.mpf(value.numerator) / value.denominator
    return value


@lru_cache(maxsize=8192)
def value_at(tree: Tree, point: int, is_real: bool) -> Any:
    """A Fraction where the value is rational and found exactly, else an mpmath number."""
    kind = tree[0]
    if kind == "num":
        return tree[1]
    if kind == "var":
        return _coordinate(tree[1], point)
    context = _context()
    if kind in ("pi", "e"):
        return +getattr(context, kind)
    if kind == "i":
        return context.mpc(0, 1)
    if kind == "oo":
        raise NoValue("infinity inside an expression")
    try:
        parts = [value_at(part, point, is_real) for part in tree[1:] if isinstance(part, tuple)]
        return _bounded(_apply(tree, parts, is_real), bool(names(tree)))
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        raise NoValue(kind) from error


def _coordinate(name: str, point: int) -> Fraction:
    """Of size 0.3 to 2.5, the same in every process; all negative at point 2, of mixed signs at points 3 and 4."""
    digest = hashlib.sha256(f"{point} {name}".encode("utf-8", "replace")).digest()
    size = Fraction(300 + int.from_bytes(digest[:4], "big") % 2200, 997)
    return -size if point == 2 or (point > 2 and digest[4] % 2) else size


def _bounded(value: Any, has_variables: bool) -> Any:
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() <= MAX_BITS:
            return value
        if not has_variables:
            raise Unscorable(Reason.TOO_LARGE)
        value = _number(value)
    context = _context()
    if not context.isfinite(value):
        raise NoValue("not finite")
    if value != 0 and abs(context.mag(value)) > MAX_MAGNITUDE:
        raise Unscorable(Reason.TOO_LARGE)
    if isinstance(value, context.mpc) and abs(value.imag) <= abs(value.real) * context.mpf(10) ** -(DIGITS - 5):
        return value.real
    return value


def _apply(tree: Tree, parts: list[Any], is_real: bool) -> Any:
    kind = tree[0]
    exact = all(isinstance(part, Fraction) for part in parts)
    if kind == "neg":
        return -parts[0]
    if kind == "abs":
        return abs(parts[0])
    if kind in ("^", "root"):
        base, power = parts  # of a root the degree stands first
        return _power(base, power, is_real) if kind == "^" else _root(base, power, is_real)
    if kind in ("!", "binom", "perm"):
        return _count(kind, parts)
    numbers = parts if exact else [_number(part) for part in parts]
    if kind == "+":
        return sum(numbers[1:], numbers[0])
    if kind == "*":
        return numbers[0] * numbers[1]
    if kind == "/":
        return numbers[0] / numbers[1]
    if kind == "log":
        return _function("ln", _number(parts[1]), is_real) / _function("ln", _number(parts[0]), is_real)
    assert kind == "fn", kind
    return _function(tree[1], _number(parts[0]), is_real)


_MPMATH = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arsinh": "asinh", "arcosh": "acosh",
           "artanh": "atanh"}  # fmt: skip


def _function(name: str, argument: Any, is_real: bool) -> Any:
    context = _context()
    if argument != 0 and context.mag(argument) > 64:  # sin and exp reduce it by as many bits
        raise Unscorable(Reason.TOO_LARGE)
    if name in ("ln", "log"):
        if argument == 0 or (is_real and argument < 0):
            raise NoValue(name)
        return context.ln(argument) if name == "ln" else context.ln(argument) / context.ln(10)
    if name == "exp":
        return _power(+context.e, argument, is_real)
    value = getattr(context, _MPMATH.get(name, name))(argument)
    if is_real and isinstance(value, context.mpc):
        raise NoValue(name)
    return value


def _power(base: Any, exponent: Any, is_real: bool) -> Any:
    context = _context()
    is_whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if base == 0:
        if is_whole and exponent > 0:
            return Fraction(0)
        raise NoValue("a power of zero")
    if is_whole and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
        if bits <= MAX_BITS:
            return base ** int(exponent)
        if base.denominator == 1 and abs(base) != 1:
            raise Unscorable(Reason.TOO_LARGE)
    number, power = _number(base), _number(exponent)
    if abs(context.mag(number)) * abs(power) > MAX_MAGNITUDE or abs(power) > MAX_MAGNITUDE:
        raise Unscorable(Reason.TOO_LARGE)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and base > 0 and exponent.denominator == 2:
        return _root(Fraction(2), base, is_real) ** int(exponent.numerator)
    if is_real and isinstance(number, context.mpf) and number < 0 and not is_whole:
        raise NoValue("a power of a negative number")
    return number ** (int(exponent) if is_whole else power)


def _root(degree: Any, base: Any, is_real: bool) -> Any:
    """Of whole degree; odd ones of negative numbers are real."""
    context = _context()
    if not (isinstance(degree, Fraction) and degree.denominator == 1 and 2 <= degree <= 1000):
        return _power(base, 1 / degree, is_real)
    order, is_negative = int(degree), not isinstance(base, context.mpc) and base < 0
    if is_negative and order % 2:
        return -_root(degree, -base, is_real)
    if is_negative and is_real:
        raise NoValue("an even root of a negative number")
    if isinstance(base, Fraction) and base >= 0 and order == 2:
        above, below = math.isqrt(base.numerator), math.isqrt(base.denominator)
        if above**2 == base.numerator and below**2 == base.denominator:
            return Fraction(above, below)
    return context.root(_number(base), order)


def _count(kind: str, parts: list[Any]) -> Any:
    """Factorials, binomials and permutations of bounded size; between whole numbers by the gamma function."""
    context = _context()
    if not all(isinstance(part, Fraction | context.mpf) for part in parts):
        raise Unread(kind)
    if any(abs(part) > 200 for part in parts):
        raise Unscorable(Reason.TOO_LARGE)
    if not all(isinstance(part, Fraction) and part.denominator == 1 and part >= 0 for part in parts):
        above, *below = [context.gamma(_number(part) + 1) for part in parts]
        if kind == "!":
            return above
        return above / context.gamma(_number(parts[0] - parts[1]) + 1) / (below[0] if kind == "binom" else 1)
    whole = [int(part) for part in parts]
    if kind == "!":
        return Fraction(math.factorial(whole[0]))
    return Fraction(math.comb(*whole) if kind == "binom" else math.perm(*whole))
