"""What the guard refuses, and that it does so in milliseconds for any text up to the size limit of an item."""

import random
import time

import pytest

from mimo_megatron.reward import math_library, math_rule
from mimo_megatron.reward.answer import Unscorable
from mimo_megatron.reward.math_guard import check, check_characters, tower
from mimo_megatron.reward.math_rule import MathGold, read_gold, score
from mimo_megatron.reward.math_text import answer_text, clean
from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import MAX_ITEM_BYTES, Meta
from tests.math_pairs import math_pairs

META = Meta()
GUARD_SECONDS = 0.1  # four times what the slowest takes alone on a core; what is quadratic takes seconds

REFUSED = [
    "9^{9^{9^9}}", "9^9^9^9", "9^{9^9}", "10^{10^{10}}", "2^{-10^{12}}", "2^{100000}", "7^{77777}", "1.5^{99999999}",
    "(10^9)!", "1000000!", "(((9!)!)!)!", "9!!!", "9" * 39 + "!", r"\Gamma(10^9)",
    r"\binom{10^9}{5\cdot 10^8}", r"\binom{1000000000}{500000000}", "C(1000000,500000)",
    r"\operatorname{eye}(20000)", r"\operatorname{zeros}(9000,9000)", r"\operatorname{ones}(9000,9000)",
    r"\operatorname{diag}(1,2)", r"\operatorname {eye} (60000)", r"\sum_{k=1}^{10^9} k", r"\prod_{k=1}^{10^8} k",
    r"\int e^{x^7}\sin x dx", r"\lim_{n\to\infty} n^{1/n}", r"\det(A)", r"\max(1,2)",
    r"\frac{1}{" * 300 + "1" + "}" * 300, "(" * 500 + "1" + ")" * 500, r"\sqrt{" * 100 + "2" + "}" * 100,
    "1" * 10**5, "0." + "1" * 10**5, "1," + "000," * 50_000 + "000", "1" * 41, "{" * 200, "1e999999", "1e9999",
    "e^{e^{e^{10}}}", r"\exp(\exp(\exp(99)))", r"\sin(10^{10000})", r"\ln(10^{100000})", r"\cos^{9999999}(1)",
    "x^{x^{x^{x}}}", "x^" * 200, "10^{" * 60 + "2" + "}" * 60, "(1+10^{-99})^{10^{99}}", r"\frac" * 120,
    "|" * 300, ",".join("1" * 300), r"\text{" * 100 + "a" + "}" * 100, "2^{x^{9999}}",
]  # fmt: skip


@pytest.mark.parametrize("answer", REFUSED, ids=lambda text: text[:30])
@pytest.mark.parametrize("gold", ["5", "x^2"])
def test_a_bomb_is_refused_before_the_library(answer: str, gold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("reached the parser of the library")

    monkeypatch.setattr(math_library, "latex2sympy", fail)
    true = read_gold(gold, META)
    start = time.perf_counter()
    verdict = score(f"\\boxed{{{answer}}}", true, META)
    assert time.perf_counter() - start < 1.0  # measured: under 5 ms; a busy machine is slower
    assert verdict.status == "invalid" or verdict.reward == 0.0


def test_what_the_gold_holds_is_let_pass() -> None:
    gold = r"\sum_{k=1}^{n} k"
    check(clean(r"\sum_{j=1}^{n} j"), clean(gold))
    with pytest.raises(Unscorable):
        check(clean(r"\prod_{j=1}^{n} j"), clean(gold))


@pytest.mark.parametrize(
    ("text", "height"),
    [("x^2", 1), ("2^{3^2}", 2), ("9^{9^{9^9}}", 3), ("9^9^9^9", 3), ("x^2+y^2", 1), ("x^2y^3", 1), ("e^{-x^2}", 2)],
)
def test_towers_are_measured(text: str, height: int) -> None:
    assert tower(text) == height


@pytest.mark.parametrize(
    ("good", "bad"),
    [("1" * 512, "1" * 513), ("(" * 64 + ")" * 64, "(" * 65 + ")" * 65), ("{" * 64, "{" * 65)],
)
def test_length_and_depth_end_where_they_should(good: str, bad: str) -> None:
    check_characters(good)
    with pytest.raises(Unscorable):
        check_characters(bad)


LONG = {
    "braces": "{" * 10**5, "open boxes": r"\boxed{" * 10**4, "boxes": r"\boxed{1}" * 10**4, "spaces": " " * 10**6,
    "a box of spaces": r"\boxed" + " " * 10**6, "dollars": "$" * 10**5, "formulas": "$a" * 10**5,
    "brackets": r"\(" * 10**5, "pairs of brackets": r"\(a\)" * 50_000, "displays": r"\[" * 10**5,
    "think": "<think>" * 30_000, "end of think": "</think>" * 30_000, "backslashes": "\\" * 256_000,
    "backslashes in a box": r"\boxed{" + "\\" * 256_000, "nested boxes": r"\boxed{" * 2_000 + "}" * 2_000,
    "invisible": "\\boxed{" + "\u200b" * 80_000 + "5}", "digits": r"\boxed{" + "1" * 256_000 + "}",
}  # fmt: skip


def seconds(text: str) -> float:
    """CPU time of everything before algebra, the best of three as the machine is shared."""

    def once() -> float:
        start = time.thread_time()
        try:
            cleaned = clean(answer_text(text, META))
            check(cleaned)
            math_rule.read_form(cleaned)
        except Unscorable:
            pass
        return time.thread_time() - start

    return min(once() for _ in range(3))


@pytest.mark.parametrize("name", LONG)
def test_long_texts_cost_milliseconds(name: str) -> None:
    assert seconds(LONG[name]) < GUARD_SECONDS


def test_random_texts_cost_milliseconds() -> None:
    random_ = random.Random(5)
    pieces = [*"0123456789.,;:aA=<>()[]{}|^_-+/*!%$&~' \\", r"\text{", r"\frac", r"\sqrt", r"\cup ", r"\pm ", "(a) ",
              "A. ", r"\begin{matrix}", r"\\", r"\{", "1 ", "1,000", r"\left(", "√", "²", "5 m", "or "]  # fmt: skip
    slowest = 0.0
    for _ in range(400):
        unit = "".join(random_.choices(pieces, k=random_.randint(1, 4)))
        size = random_.choice([512, MAX_ITEM_BYTES])
        wrap = random_.choice(["{}", r"\boxed{{{}}}", "</think>{}", "${}$"])
        slowest = max(slowest, seconds(wrap.format((unit * size)[: size - 20])))
    assert slowest < GUARD_SECONDS


@pytest.mark.slow
def test_mutated_answers_always_get_a_verdict() -> None:
    random_ = random.Random(11)
    pairs = math_pairs()
    pool = [text for pair in pairs for text in (pair.gold, pair.answer)]
    signs = [
        *"0123456789+-*/^_(){}[]|!,.;:=<>%$&~ xyekiEC",
        r"\frac",
        r"\sqrt",
        r"\pm",
        r"\cup",
        r"\in",
        r"\infty",
        "²",
        "٣",
    ]
    golds: list[MathGold] = [read_gold(pair.gold, META) for pair in pairs[::6]]
    for _ in range(1500):
        text = list(random_.choice(pool))
        for _ in range(random_.randint(0, 6)):
            place = random_.randint(0, len(text))
            text[place : place + random_.randint(0, 2)] = random_.choice([random_.choice(signs), *random_.choice(pool)])
        verdict = score(f"\\boxed{{{''.join(text)}}}", random_.choice(golds), META)
        assert verdict.reason != Reason.INTERNAL
        assert verdict.reward is None or 0.0 <= verdict.reward <= 1.0
