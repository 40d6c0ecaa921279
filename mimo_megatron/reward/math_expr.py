r"""A small reader of LaTeX arithmetic and algebra: text -> tree of tuples, or ``Unread``.

It knows numbers, letters, fractions, roots, powers, the common functions and implicit products; whatever else there is
goes to Math-Verify. Recursive descent: time linear in the text, depth bounded by the guard's depth of brackets.
A tree is ``(kind, ...)``: ``("num", value, digits, places)`` with digits None for a whole number, ``("var", name)``,
``("pi",)``, ``("e",)``, ``("i",)``, ``("oo",)`` and operators over trees.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

Tree = tuple[Any, ...]

_TOKEN = re.compile(
    r"(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.]))?)|(?P<cmd>\\[A-Za-z]+|\\[{}|%])|(?P<sign>\S)",
    re.ASCII,
)
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar"
)
_GREEK = frozenset(_GREEK_NAMES.split())
_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp ln log arsinh arcosh artanh"
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_STOPS = frozenset({"", "+", "-", ")", "]", "}", ",", r"\}"})


class Unread(Exception):
    """Not in the language of this reader; nothing is said about whether it is right."""


@lru_cache(maxsize=4096)
def read_tree(text: str) -> Tree:
    """The tree of ``text``; ``Unread`` where any part is not understood."""
    reader = _Reader(text)
    tree = reader.sum()
    if reader.peek():
        raise Unread(text)
    return tree


def _is_number(token: str) -> bool:
    return token[0] in "0123456789" or (token[0] == "." and len(token) > 1)


class _Reader:
    def __init__(self, text: str) -> None:
        if r"\frac{d" in text or r"\frac{\mathrm{d" in text:  # a derivative
            raise Unread(text)
        self.tokens = [found.group() for found in _TOKEN.finditer(text)]
        self.place = 0
        self.bars = 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unread(token)

    def sum(self) -> Tree:
        terms = [self.term()]
        while self.peek() in ("+", "-"):
            is_minus = self.take() == "-"
            term = self.term()
            terms.append(("neg", term) if is_minus else term)
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def term(self) -> Tree:
        signs = 0
        while self.peek() in ("+", "-"):
            signs += self.take() == "-"
        tree = self.factor()
        while self.peek() not in _STOPS:
            token = self.peek()
            if token == "|" and self.bars:
                break
            if token in ("*", r"\cdot", r"\times", r"\ast"):
                self.take()
                tree = ("*", tree, self.signed())
            elif token in ("/", r"\div"):
                self.take()
                tree = ("/", tree, self.signed())
            else:
                if _is_number(token):
                    raise Unread("a number right after a factor")
                tree = ("*", tree, self.factor())
        return ("neg", tree) if signs % 2 else tree

    def signed(self) -> Tree:
        if self.peek() == "-":
            self.take()
            return ("neg", self.factor())
        return self.factor()

    def factor(self) -> Tree:
        """An atom with what is written after it: powers, factorials, degrees."""
        tree = self.atom()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                tree = ("^", tree, self.exponent())
            elif token == "!":
                self.take()
                tree = ("!", tree)
            elif token == r"\degree":
                self.take()
                tree = ("*", tree, ("/", ("pi",), ("num", Fraction(180), None, 0)))
            elif token in ("%", r"\%"):
                self.take()
                tree = ("/", tree, ("num", Fraction(100), None, 0))
            else:
                return tree

    def exponent(self) -> Tree:
        """A group, or one token; a sign is let pass, and further powers bind first."""
        if self.peek() == "{":
            tree = self.group()
        elif self.peek() == "-":
            self.take()
            tree = ("neg", self.atom())
        else:
            tree = self.atom()
        if self.peek() == "^":
            self.take()
            tree = ("^", tree, self.exponent())
        return tree

    def group(self) -> Tree:
        """``{...}``, or a single token in its place, as in ``\\frac12``."""
        if self.peek() != "{":
            return self.atom()
        return self.enclosed("}")

    def enclosed(self, end: str) -> Tree:
        self.take()
        bars, self.bars = self.bars, 0
        tree = self.sum()
        self.bars = bars
        self.expect(end)
        return tree

    def atom(self) -> Tree:
        token = self.peek()
        if not token:
            raise Unread("ends early")
        if _is_number(token):
            return self.number()
        if token in ("(", "[", "{"):
            return self.enclosed({"(": ")", "[": "]", "{": "}"}[token])
        if token == "|" and not self.bars:
            self.take()
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.expect("|")
            return ("abs", tree)
        if token.isalpha() and token.isascii():
            return self.letter()
        if token.startswith("\\"):
            return self.command()
        raise Unread(token)

    def number(self) -> Tree:
        text = self.take()
        if self.peek() == r"\overline" and "." in text:
            return self.repeating(text)
        mantissa, _, power = text.lower().partition("e")
        _, point, decimals = mantissa.partition(".")
        value = Fraction(text) if mantissa[-1] != "." else Fraction(mantissa[:-1]) * Fraction(10) ** int(power or 0)
        digits = len(mantissa.replace(".", "").lstrip("0")) if decimals or (power and not point) else None
        if self.peek() == r"\frac" and digits is None and not point:
            return self.mixed(value)
        if self.peek() == "_":
            return self.in_base(text)
        return ("num", value, digits, len(decimals) - int(power or 0))

    def repeating(self, text: str) -> Tree:
        self.take()
        self.expect("{")
        period = self.take()
        self.expect("}")
        if not period.isdigit():
            raise Unread(period)
        places = len(text.partition(".")[2])
        value = Fraction(text + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
        return ("num", value, None, 0)

    def mixed(self, whole: Fraction) -> Tree:
        """``2\\frac{1}{2}`` is two and a half; before any other fraction a number is a factor."""
        fraction = self.atom()
        if fraction[0] == "/" and fraction[1][0] == fraction[2][0] == "num" and fraction[1][1] < fraction[2][1]:
            return ("num", whole + fraction[1][1] / fraction[2][1], None, 0)
        return ("*", ("num", whole, None, 0), fraction)

    def in_base(self, digits: str) -> Tree:
        base = self.subscript()
        if not (digits.isdigit() and base.isdigit() and 2 <= int(base[:3]) <= 36):
            raise Unread("a number with an index")
        try:
            return ("num", Fraction(int(digits, int(base))), None, 0)
        except ValueError as error:
            raise Unread("digits beyond the base") from error

    def subscript(self) -> str:
        self.take()
        if self.peek() != "{":
            return self.take()
        self.take()
        parts = []
        while self.peek() not in ("}", ""):
            parts.append(self.take())
        self.expect("}")
        return "".join(parts)

    def letter(self) -> Tree:
        name = self.take()
        if name == "e" and self.peek() != "_":
            return ("e",)
        if name == "i" and self.peek() != "_":
            return ("i",)
        if name in "CP" and self.peek() == "(" and self.tokens[self.place + 2 : self.place + 3] == [","]:
            self.take()
            upper = self.sum()
            self.expect(",")
            lower = self.sum()
            self.expect(")")
            return ("binom", upper, lower) if name == "C" else ("perm", upper, lower)
        if name in "fghFGHP" and self.peek() == "(":
            raise Unread("a function's value")
        return self.variable(name)

    def variable(self, name: str) -> Tree:
        if self.peek() == "_":
            name += "_" + self.subscript()
        while self.peek() in ("'", r"\prime"):
            name += self.take()
        return ("var", name)

    def command(self) -> Tree:
        name = self.take()[1:]
        if name == "pi":
            return ("pi",)
        if name == "infty":
            return ("oo",)
        if name in ("frac", "binom"):
            return ("/" if name == "frac" else name, self.group(), self.group())
        if name == "sqrt":
            if self.peek() != "[":
                return ("root", ("num", Fraction(2), None, 0), self.group())
            degree = self.enclosed("]")
            return ("root", degree, self.group())
        if name in FUNCTIONS:
            return self.function(name)
        if name in _GREEK:
            return self.variable(name)
        raise Unread(name)

    def function(self, name: str) -> Tree:
        base: Tree | None = None
        power: Tree | None = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                power = self.exponent()
            else:
                base = self.group()
        if power == ("neg", ("num", Fraction(1), None, 0)) and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        if self.peek() in ("(", "{", "["):
            argument = self.enclosed({"(": ")", "{": "}", "[": "]"}[self.peek()])
        else:
            argument = self.bare_argument()
        tree: Tree = ("fn", name, argument) if base is None else ("log", base, argument)
        return tree if power is None else ("^", tree, power)

    def bare_argument(self) -> Tree:
        """Factors up to the next sign or function: ``\\sin 2x \\cos x`` is a product of two."""
        tree = self.signed()
        while (token := self.peek()) not in _STOPS and token not in ("/", "*", r"\cdot", r"\times", "|"):
            if token[1:] in FUNCTIONS or _is_number(token):
                break
            tree = ("*", tree, self.factor())
        return tree
