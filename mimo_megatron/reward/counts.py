r"""Counting: the last ``\boxed{}`` holds the digits of the true number, and nothing else but a listed unit word.

With ``meta.bare_answer`` the whole answer may be the digits.
"""

import re
from typing import Any

from mimo_megatron.reward.answer import Unscorable, check_length, final_answer, last_boxed, plain
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.rule import scoring
from mimo_megatron.reward.verdict import Reason, Verdict, judged
from mimo_megatron.reward.wire import Meta

MAX_COUNT = 999_999
_MAX_CHARS = 64
# Not int(): it takes 1_000 and every script's digits. NFKC has turned full-width digits into these before.
_COUNT = re.compile(r"([0-9]{1,6})(?: +(\S.*))?")


def read_gold(gold: Any, meta: Meta) -> int:
    if type(gold) is not int or not 0 <= gold <= MAX_COUNT:
        raise GoldError(f"{gold!r} is not a count: give a whole number from 0 to {MAX_COUNT:,}")
    return gold


def read_answer(response: str, meta: Meta) -> int:
    answer = final_answer(response, meta)
    boxed = last_boxed(answer)
    if boxed is None and meta.bare_answer:
        boxed = answer
    if boxed is None or not boxed.strip():
        raise Unscorable(Reason.NO_ANSWER)
    check_length(boxed, _MAX_CHARS)
    text = plain(boxed)
    found = _COUNT.fullmatch(text)
    if found is None or (found[2] and found[2].casefold() not in {plain(unit).casefold() for unit in meta.units}):
        raise Unscorable(Reason.UNREADABLE, text)
    return int(found[1])


@scoring
def score(response: str, gold: int, meta: Meta) -> Verdict:
    count = read_answer(response, meta)
    return judged(float(count == gold), str(count), count=count)
