r"""The math rule: a response and a gold -> 1, 0, or no verdict.

Response -> last ``\boxed{}`` -> one spelling -> limits -> shape -> leaves: exact numbers and identities by our own
reader, the rest by Math-Verify. Pure functions; time is bounded by the guard except where Math-Verify works, so that
callers that face models run this in a process they can kill. Safe from any thread: a lock covers the arithmetic.
"""

import logging
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mimo_megatron.reward.answer import Unscorable
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.math_compare import texts_match
from mimo_megatron.reward.math_expr import Unread
from mimo_megatron.reward.math_forms import (
    Form,
    Matrix,
    Quantity,
    Relation,
    Sequence,
    Union,
    Value,
    Without,
    read_form,
)
from mimo_megatron.reward.math_guard import check
from mimo_megatron.reward.math_leaves import check_readable
from mimo_megatron.reward.math_library import LibraryError
from mimo_megatron.reward.math_probes import PROBES, library_problems
from mimo_megatron.reward.math_text import answer_text, clean
from mimo_megatron.reward.math_value import ARITHMETIC, NoValue
from mimo_megatron.reward.verdict import Reason, Verdict, invalid, judged, unknown
from mimo_megatron.reward.wire import Meta

logger = logging.getLogger(__name__)

MATH_RULE_VERSION = "math-1"
MAX_GOLDS = 32


@dataclass(frozen=True)
class MathGold:
    """Cleaned texts, any of which an answer may equal."""

    texts: tuple[str, ...]


def read_gold(gold: Any, meta: Meta) -> MathGold:
    """A string, a number, or a list of strings. ``GoldError`` where one is unreadable or does not equal itself."""
    golds = list(gold) if isinstance(gold, list | tuple) else [gold]
    if not 1 <= len(golds) <= MAX_GOLDS:
        raise GoldError(f"{len(golds)} golds for one question; give 1 to {MAX_GOLDS}")
    return MathGold(tuple(_read_one(one) for one in golds))


def _read_one(gold: Any) -> str:
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise GoldError(f"a gold of type {type(gold).__name__}; give a string, a number, or a list of strings")
    if isinstance(gold, float) and not math.isfinite(gold):
        raise GoldError(f"the gold {gold} is not a number; correct it or drop the sample")
    shown = str(gold)[:80]
    try:
        text = _cleaned_gold(str(gold))
    except (Unscorable, ValueError, Unread, NoValue, LibraryError, RecursionError) as error:
        reason = error.reason.value if isinstance(error, Unscorable) else str(error)
        raise GoldError(f"the gold {shown!r} cannot be used ({reason}); correct it or drop the sample") from error
    if not text:
        raise GoldError(f"the gold {shown!r} is empty; correct it or drop the sample")
    return text


@lru_cache(maxsize=4096)
def _cleaned_gold(gold: str) -> str:
    text = clean(_unboxed(gold))
    check(text, text)
    with ARITHMETIC:
        for leaf in _leaves(read_form(text)):
            check_readable(leaf)
        if not texts_match(text, text):
            raise ValueError("it does not equal itself")
    return text


def _unboxed(gold: str) -> str:
    return answer_text(gold, Meta()) if "\\boxed" in gold or "\\fbox" in gold else gold


def _leaves(form: Form | None) -> list[str]:
    """The formulas in it."""
    if isinstance(form, Value | Quantity):
        return [form.text]
    if isinstance(form, Relation):
        return []
    if isinstance(form, Sequence | Union):
        return [leaf for part in form.parts for leaf in _leaves(part)]
    if isinstance(form, Matrix):
        return [leaf for row in form.rows for cell in row for leaf in _leaves(cell)]
    return [*_leaves(form.whole), *_leaves(form.hole)] if isinstance(form, Without) else []


def score(response: str, gold: MathGold, meta: Meta) -> Verdict:
    """``ok`` with 1 or 0; ``invalid`` for what is not read; ``unknown`` where the library gave up.

    Raises nothing but ``MemoryError``.
    """
    answer = ""
    try:
        answer = answer_text(response, meta)
        text = clean(answer)
        with ARITHMETIC:
            return _best(text, gold, answer)
    except Unscorable as error:
        return invalid(error.reason, error.answer or answer)
    except RecursionError:
        return invalid(Reason.TOO_LARGE, answer)
    except LibraryError:
        return unknown(Reason.NO_VERDICT)
    except MemoryError:  # in a worker, the sign that its limit was reached: whoever runs it judges
        raise
    except Exception:  # a mistake of ours must not cost the caller its worker; the fuzz tests let none pass
        logger.exception("the math rule failed on an answer of %d characters", len(answer))
        return unknown(Reason.INTERNAL)


def _best(text: str, gold: MathGold, answer: str) -> Verdict:
    """Right if any gold matches; else the first gold's fault decides what is said."""
    fault: Exception | None = None
    wrong = 0
    for one in gold.texts:
        try:
            check(text, one)
            if texts_match(one, text):
                return judged(1.0, answer)
            wrong += 1
        except (Unscorable, LibraryError) as error:
            fault = fault or error
    if fault is not None and not wrong:
        raise fault
    return judged(0.0, answer)


def self_test() -> list[str]:
    """What is wrong with the libraries or with verdicts that are known; empty where the rule may judge."""
    with ARITHMETIC:
        problems = list(library_problems())
    for gold, response, is_right in PROBES:
        verdict = score(response, read_gold(gold, Meta()), Meta())
        if (verdict.reward == 1.0) is not is_right:
            problems.append(f"{response!r} for {gold!r} is judged {verdict.reason.value}")
    return problems
