"""Math-Verify behind our own limits: the only file that touches the computer algebra system.

What our own reader does not know (integrals, sums, unknown functions) is parsed by latex2sympy2_extended and compared
by Math-Verify's grader. Both run without their timeouts, which are alarm signals; the process above holds the clock.
Nothing here ever gives text to ``eval``: LaTeX goes through the ANTLR grammar alone, names become symbols.
"""

import logging
import re
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify.grader import should_treat_as_complex, verify
from sympy import Expr

from mimo_megatron.reward.math_guard import check_library

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off, as they must be

_CONFIG = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_POINT = (3, 2, 5, 4, 7, 6)
"""Small whole numbers, so that sums up to a variable stay sums."""
_LETTERS = re.compile(r"\\[A-Za-z]+|([A-Za-z])")


class LibraryError(Exception):
    """The library failed on a pair that both of them parsed."""


def library_equal(gold: str, answer: str) -> bool:
    """Math-Verify's strict verdict. ``ValueError`` where the answer does not parse, ``LibraryError`` if it gives up."""
    check_library(answer)
    if _letters(gold) != _letters(answer) and _letters(gold.lower()) == _letters(answer.lower()):
        return False  # the library takes R and r for one symbol
    true = parse(gold)
    said = parse(answer)
    if getattr(true, "free_symbols", None) != getattr(said, "free_symbols", None):
        return False  # and nothing is simplified: logarithms of other letters beside 3 * 10^8 took minutes
    try:
        if _differ(true, said):
            return False
        return bool(verify([true], [said], strict=True, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception as error:  # whatever sympy raises, recursion included
        raise LibraryError(type(error).__name__) from error


def _differ(true: Any, said: Any) -> bool:
    """Whether values at one whole point do, by more than any rounding: most wrong answers are, without simplifying."""
    if not (isinstance(true, Expr) and isinstance(said, Expr)) or true.is_Matrix or said.is_Matrix:
        return False
    names = sorted(true.free_symbols, key=str)
    if len(names) > len(_POINT):
        return False
    point = dict(zip(names, _POINT, strict=False))
    try:
        one, other = (complex(side.subs(point).evalf(20)) for side in (true, said))
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return False  # no number there: nothing is said
    return abs(one - other) > 1e-5 * max(abs(one), abs(other))


@lru_cache(maxsize=1024)
def parse(text: str) -> Any:
    """A sympy object; ``ValueError`` where there is none."""
    try:
        tree = latex2sympy(
            normalize_latex(text, _CONFIG),
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError("not read by the library") from error
    if tree is None or isinstance(tree, list | dict):
        raise ValueError("not read by the library")
    return tree


def _letters(text: str) -> set[str]:
    return {found.group(1) for found in _LETTERS.finditer(text) if found.group(1)}
