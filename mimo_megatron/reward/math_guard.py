r"""What is refused before any algebra: by length, depth, size of numbers, and constructs that have no size bound.

The limits are far above honest answers and far below what hurts: ``\operatorname{eye}(20000)`` costs 3 GB,
``9^{9^9}`` never ends. Invariant: every check is linear in its input, and ends in under 50 ms for 256 KB.
"""

import re

from mimo_megatron.reward.answer import Unscorable
from mimo_megatron.reward.verdict import Reason

MAX_CHARS = 512
MAX_CLEAN_CHARS = 1024
MAX_DEPTH = 64
MAX_DIGITS = 40
MAX_TOWER = 2
"""``2^{3^2}`` is a tower of two; one more only where the gold has as many."""
MAX_FACTORIAL = 50
MAX_SCIENTIFIC = 999
MAX_LIBRARY_CHARS = 256
MAX_LIBRARY_BARS = 8
"""The grammar tries every pairing of bars: 300 of them take seconds."""
MAX_LIBRARY_EXPONENT = 200
"""Of what is given to the computer algebra system, which expands powers of sums."""

OPEN_ENDED = frozenset({r"\sum", r"\prod", r"\int", r"\iint", r"\oint", r"\lim", r"\det", r"\max", r"\min"})
"""Evaluated by search or in a loop; allowed only where the gold has the same one."""
_OPERATORS = frozenset({"gcd", "lcm", "arsinh", "arcosh", "artanh", "floor", "ceil", "Re", "Im", "sgn", "cis"})
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_OPERATOR = re.compile(r"\\operatorname\s*\*?\s*(\{\s*\\?\w*\s*\}|.)?")
_DIGITS = re.compile(r"\d(?:[\d,. ]*\d)?")
_FACTORIALS = re.compile(r"!\s*[)}\]]*\s*!")
_NUMBERS_FACTORIAL = re.compile(r"[({\[][^()a-zA-Z]*[)}\]]\s*!")
_FACTORIAL = re.compile(r"(\d+)\s*!")
_EXPONENT = re.compile(r"\^\s*\{?\s*-?\s*(\d+)")
_SCIENTIFIC = re.compile(r"[\d.][eE][+-]?(\d+)")
_BINOMIAL = re.compile(r"\\binom\s*\{?\s*(\d+)")
_LIBRARY_MISREADS = re.compile(r"(?<![\^_\d])\d+\s*_|(?:^|[-+*/=(,])\s*\d+(?:\.\d+)?\s+\d")
"""5_{abc} would be 5, and 5 6 the mixed number 11."""
_NEVER = frozenset({r"\Gamma", r"\gammafn", r"\xrightarrow", r"\input", r"\include", r"\def", r"\newcommand"})


def check_characters(text: str) -> None:
    """Length and depth of brackets of any kind; ``Unscorable`` beyond the limits."""
    if len(text) > MAX_CHARS:
        raise Unscorable(Reason.TOO_LARGE, text)
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth > MAX_DEPTH:
            raise Unscorable(Reason.TOO_LARGE, text)


def check(text: str, gold: str = "") -> None:
    """Constructs and sizes of a cleaned answer, beside those of the gold."""
    if len(text) > MAX_CLEAN_CHARS:
        raise Unscorable(Reason.TOO_LARGE, text)
    for run in _DIGITS.finditer(text):
        if sum(sign.isdigit() for sign in run.group()) > MAX_DIGITS:
            raise Unscorable(Reason.TOO_LARGE, text)
    commands = {found.group() for found in _COMMAND.finditer(text)}
    allowed = {found.group() for found in _COMMAND.finditer(gold)}
    operators = {(found.group(1) or "").strip(" {}") for found in _OPERATOR.finditer(text)} - _OPERATORS
    if commands & (_NEVER | (OPEN_ENDED - allowed)) or operators:
        raise Unscorable(Reason.REFUSED, text)
    if _FACTORIALS.search(text) and not _FACTORIALS.search(gold):
        raise Unscorable(Reason.REFUSED, text)
    if tower(text) > max(MAX_TOWER, tower(gold)):
        raise Unscorable(Reason.REFUSED, text)
    for pattern, limit in ((_FACTORIAL, MAX_FACTORIAL), (_SCIENTIFIC, MAX_SCIENTIFIC)):
        if any(_above(found.group(1), limit) for found in pattern.finditer(text)):
            raise Unscorable(Reason.TOO_LARGE, text)


def check_library(text: str) -> None:
    """Stricter limits for what reaches the computer algebra system. Each is a size it may have to expand."""
    for pattern, limit in ((_EXPONENT, MAX_LIBRARY_EXPONENT), (_BINOMIAL, 1000)):
        if any(_above(found.group(1), limit) for found in pattern.finditer(text)):
            raise Unscorable(Reason.TOO_LARGE, text)
    if len(text) > MAX_LIBRARY_CHARS or text.count("|") > MAX_LIBRARY_BARS or text.count("&") > 64:
        raise Unscorable(Reason.TOO_LARGE, text)
    if _NUMBERS_FACTORIAL.search(text):
        raise Unscorable(Reason.REFUSED, text)
    if _LIBRARY_MISREADS.search(text):
        raise Unscorable(Reason.UNREADABLE, text)
    if any(text.count(opening) != text.count(closing) for opening, closing in ("{}", "()", "[]")):
        raise Unscorable(Reason.UNREADABLE, text)


def tower(text: str) -> int:
    """The most powers that stand on one another: 1 for ``x^2``, 3 for ``9^{9^{9^9}}`` and ``9^9^9^9``."""
    most = level = 0
    outer: list[tuple[int, int]] = []  # of each open bracket: the level and the chain around it
    chain = 0  # of powers without brackets between them, as in 9^9^9
    previous = ""
    for sign in text.replace(" ", ""):
        if sign == "^":
            chain += 1
            most = max(most, level + chain)
        elif sign in "([{":
            outer.append((level, chain))
            level += chain if previous == "^" else 0
            chain = 0
        elif sign in ")]}":
            level, chain = outer.pop() if outer else (level, chain)
        elif previous != "^" and not (sign.isdigit() and previous.isdigit()):
            chain = 0  # another base begins
        previous = sign
    return most


def _above(digits: str, limit: int) -> bool:
    return len(digits) > 6 or int(digits) > limit
