r"""From a response to the one short text that is judged, in one spelling.

Every function here is linear in the length of its input: responses reach it unchecked, up to 256 KB. Invariant:
``clean(clean(text)) == clean(text)``.
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import islice

from mimo_megatron.reward.answer import Unscorable, final_answer, last_boxed, plain
from mimo_megatron.reward.math_guard import check_characters
from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import Meta

MAX_MARKS = 64
"""Dollar signs in an answer without a box."""

_HAS_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_DOLLARS = re.compile(r"(?<!\\)\$\$?")

# Characters that NFKC would turn into something else than is meant (x² into x2), or that are commands in TeX.
_SIGNS = {
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ",
    "°": r"^\circ ", "±": r"\pm ", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "℃": r"^\circ C", "℉": r"^\circ F", "。": ".", "、": ",", "或": " or ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
}  # fmt: skip
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "₀₁₂₃₄₅₆₇₈₉₊₋"
_TO_ASCII = str.maketrans(_RAISED + _LOWERED, "0123456789+-" * 2)
_SCRIPTS = re.compile(f"([{_RAISED}]+)|[{_LOWERED}]+")
"""NFKC makes digits of the line of them: 10¹² would be 1012."""

_SPELLINGS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"√\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s?(\w)", r"\\sqrt{\1}"),
        (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:text)?color\s?\{\w+\}", ""),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|rm)\s?\{([eid])\}", r"\1"),  # upright constants are no units
        (r"\\(?:textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|hbox)(?![A-Za-z])", r"\\text"),
        (r"\\text\s+\{", r"\\text{"),
        (r"\\lg(?![A-Za-z])", r"\\log_{10} "),
        (r"\\leq(?:slant)?(?![A-Za-z])", r"\\le"),
        (r"\\geq(?:slant)?(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])|\\not\s?=", r"\\ne"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"(?<![\d)}])!=", r"\\ne "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\R(?![A-Za-z])|\\mathbb\s?R(?![A-Za-z])|\\Reals(?![A-Za-z])", r"\\mathbb{R}"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\{,\}", ","),
        (r"\\operatorname\*?\{(sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|gcd)\}", r"\\\1 "),
        (r"\^\s?\{\\circ\}|\^\s?\\circ(?![A-Za-z])|\\degree(?![A-Za-z])", r"\\degree "),
        (r"\\text\{\s?(?:degrees?|deg)\s?\}", r"\\degree "),
        (r"(?<=\d)\s?degrees?(?![A-Za-z])", r"\\degree "),
        (r"\\%|\\text\{\s?(?:\\?%|percent|per cent|percentage|pct)\s?\}|(?<=\d)\s?(?:percent|pct)\b", "%"),
        (r"\\!\s*", ""),
        (r"(?<!\\)\\(?:[,;:> \n]|(?:quad|qquad|thinspace|enspace)(?![A-Za-z]))|~", " "),
        (r"(?<=\d)\s*\\Omega(?![A-Za-z])", r"\\text{Ω}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\d?overline\s*(\d)", r"\\overline{\1}"),
        (r"\\text\{\s?(?:positive )?infinity\s?\}|(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty "),
        (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|ln|log|pi)(?![A-Za-z])", r"\\\1 "),
        (r"\b(?:[Oo]ption|[Cc]hoice)\s+(?=\(?[A-J]\b)", ""),
        (r"^\s*\\text\s*\{(?![^{}]*(?:\bnot\b|\bnever\b|n't|\d|\bor\b))[^{}]*\b(?:is|are|equals|be)\s?:?\s*\}", ""),
        (r"^\s*(?:=|\\approx(?![A-Za-z]))", ""),
        (r"\)\s*\^\s?\{?\s?(?:T|\\top|\\intercal)\s?\}?\s*$", ")"),  # a row that is transposed is a vector
        (r"\s+", " "),
        (r"(?<![\d.}])(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
    ]
]
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,])")


def answer_text(response: str, meta: Meta) -> str:
    r"""What is judged: the last ``\boxed{}`` of the final answer, or its only formula where it holds no box at all.

    ``Unscorable`` where there is neither: in prose without a mark no reader knows which number is meant (it would
    take one from the reasoning), and a policy that never boxes is taught to. With ``meta.bare_answer`` all of an answer
    without a box is judged.
    """
    text = final_answer(response, meta)
    boxed = last_boxed(text)
    if boxed is None:
        if _HAS_BOX.search(text):
            raise Unscorable(Reason.TRUNCATED if meta.finish_reason == "length" else Reason.UNREADABLE)
        boxed = text if meta.bare_answer else _only_formula(text)
    if not boxed.strip():
        raise Unscorable(Reason.NO_ANSWER)
    return boxed


def _only_formula(text: str) -> str:
    formulas: set[str] = set()
    for formula in _formulas(text):
        formulas.add(formula.strip())
        if len(formulas) > 1:
            raise Unscorable(Reason.SEVERAL)
    if not formulas:
        raise Unscorable(Reason.NO_ANSWER)
    return formulas.pop()


def _formulas(text: str) -> Iterator[str]:
    r"""What stands between ``$``, ``$$``, ``\(...\)`` or ``\[...\]``; each sign is looked at once."""
    marks = [found.span() for found in islice(_DOLLARS.finditer(text), MAX_MARKS + 1)]
    if len(marks) > MAX_MARKS:
        raise Unscorable(Reason.SEVERAL)
    for (_, start), (end, _) in zip(marks[::2], marks[1::2], strict=False):
        yield text[start:end]
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        place = text.find(opening)
        while place >= 0 and (end := text.find(closing, place)) >= 0:
            yield text[place + 2 : end]
            place = text.find(opening, end)


def clean(text: str) -> str:
    """One spelling for what is written in many: signs, digits, sizes, spaces, groups of three digits."""
    check_characters(text)
    text = _SIGN.sub(lambda found: _SIGNS[found.group()], text)
    text = _SCRIPTS.sub(lambda found: f"{'^' if found.group(1) else '_'}{{{found.group().translate(_TO_ASCII)}}}", text)
    text = _ascii_digits(plain(text))
    check_characters(text)  # again: NFKC makes 18 characters of one
    dollars = [found.start() for found in _DOLLARS.finditer(text)]
    text = "\\" + text if dollars == [0] else _DOLLARS.sub(" ", text)  # one at the start is a currency
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return trim(_GROUPED.sub(_joined, text))


def _joined(group: re.Match[str]) -> str:
    """``1,234`` as ``1234``, except where it is all that brackets hold: (100,200) is a pair."""
    text, start = group.string, group.start()
    is_bracketed = text[:start].endswith(("(", "[", r"\{")) and text[group.end() :].startswith((")", "]", r"\}"))
    return group.group() if is_bracketed and "," in group.group() else re.sub("[ ,]", "", group.group())


def trim(text: str) -> str:
    """Without outer spaces, full stops, and braces that hold the whole."""
    text = text.strip().rstrip(".,;").strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _ascii_digits(text: str) -> str:
    return "".join(
        str(unicodedata.decimal(sign)) if not sign.isascii() and unicodedata.category(sign) == "Nd" else sign
        for sign in text
    )


# ---- places at the top level -----------------------------------------------------------------------------------------

_OPEN, _CLOSE = "([{", ")]}"
_TOKEN = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)


def closing(text: str, start: int) -> int:
    r"""Where the bracket that opens at ``start`` closes, of any kind, as half-open intervals have two; -1 if never.

    Braces and ``\{ \}`` close only their own kind.
    """
    depth = 0
    for token, _, after in tokens(text, start):
        if token in ("{", "(", "[", r"\{", r"\langle") or token.startswith(r"\begin"):
            depth += 1
        elif token in ("}", ")", "]", r"\}", r"\rangle") or token.startswith(r"\end"):
            depth -= 1
            if depth == 0:
                return after - 1
        if depth < 0:
            return -1
    return -1


def tokens(text: str, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """(token, start, end); a command is one token."""
    for found in _TOKEN.finditer(text, start):
        yield found.group(), found.start(), found.end()


def split_top(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    """[(part, the separator before it)] at bracket depth 0; parts are stripped."""
    parts: list[tuple[str, str]] = []
    depth, begin, separator = 0, 0, ""
    for token, place, after in tokens(text):
        if token in ("{", "(", "[", r"\{", r"\langle") or token.startswith(r"\begin"):
            depth += 1
        elif token in ("}", ")", "]", r"\}", r"\rangle") or token.startswith(r"\end"):
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append((text[begin:place].strip(), separator))
            begin, separator = after, token
    parts.append((text[begin:].strip(), separator))
    return parts
