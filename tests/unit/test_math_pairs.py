"""The math rule on a table whose verdicts were decided by people, beside bare Math-Verify on the same table."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import math_verify
import pytest

from mimo_megatron.reward.math_expr import read_tree
from mimo_megatron.reward.math_forms import read_form
from mimo_megatron.reward.math_library import parse
from mimo_megatron.reward.math_rule import read_gold, score
from mimo_megatron.reward.math_value import value_at
from mimo_megatron.reward.verdict import Verdict
from mimo_megatron.reward.wire import Meta
from tests.math_pairs import Pair, math_pairs

META = Meta()
PAIRS = math_pairs()
# Known misses: right answers that are not read. A change of this list is a change of verdicts.
EXPECTED_MISSES = {
    (r"3.5 \times 10^{-5} \text{ m}", r"35 \text{ }\mu\text{m}"),
    (r"\text{Friday}", r"\text{It is Friday}"),
    (r"\text{isosceles}", r"\text{Isosceles triangle}"),
    ("(3,4)", r"3\mathbf{i}+4\mathbf{j}"),
    (r"\overline{AB}", r"\overline{BA}"),
    ("(-1)^n", r"\cos(n\pi)"),
    ("x^2=4", r"x=\pm 2"),
    ("(-3,3)", "|x|<3"),
    ("y=2x", r"\frac{y}{x}=2"),
    ("(1,3)", r"(1,2]\cup(2,3)"),
    (r"\frac{x^3}{3}+C", r"\frac{x^3}{3}+c"),
    (r"k<-2 \text{ or } k>2", "|k|>2"),
    (r"7 \pmod{12}", "7"),
    (r"\binom{10}{3}", "{}_{10}C_3"),
    ("B", "b"),
    ("B", r"\text{The answer is B}"),
    ("ABD", "A, B, D"),
    ("ABD", "BAD"),
    (r"\text{yes}", r"\text{Yes, because } 3>2"),
    (r"\begin{pmatrix}2&0\\0&2\end{pmatrix}", "2I"),
    (r"\begin{pmatrix}\frac12&0\\0&\frac12\end{pmatrix}", r"\frac{1}{2}\begin{pmatrix}1&0\\0&1\end{pmatrix}"),
    ("[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\frac{3}{4}", "3 out of 4"),
    (r"\text{red, blue}", r"\text{blue, red}"),
    ("3元", r"3\text{ yuan}"),
}
# Known false rights: what is below 10^-40 is taken for rounding, decimals agree to 1e-6, and letters commute.
EXPECTED_FALSE_RIGHT = {
    ("0", "e^{-100}"),
    ("e^{-100}", "0"),
    ("x+1", "x+1.0000001"),
    ("x", "x+0.0000001"),
    ("x^2", "x^{2.0000001}"),
    ("A^{-1}B", "BA^{-1}"),
}


def judge(pair: Pair) -> Verdict:
    return score(pair.response, read_gold(pair.gold, META), META)


@lru_cache(maxsize=1)
def verdicts() -> list[Verdict]:
    return [judge(pair) for pair in PAIRS]


def bare_verdict(pair: Pair) -> bool:
    """Math-Verify as it comes."""
    gold, answer = math_verify.parse(f"\\boxed{{{pair.gold}}}"), math_verify.parse(pair.response)
    return bool(math_verify.verify(gold, answer))


def misses(found: list[bool]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """(false right, false wrong) by gold and answer."""
    wrong = [(pair, right) for pair, right in zip(PAIRS, found, strict=True) if right is not pair.is_right]
    return {(pair.gold, pair.answer) for pair, right in wrong if right}, {
        (pair.gold, pair.answer) for pair, right in wrong if not right
    }


def test_the_table_is_large_and_says_every_pair_once() -> None:
    assert len(PAIRS) >= 500
    assert len({(pair.gold, pair.answer) for pair in PAIRS}) == len(PAIRS)
    assert all(pair.why for pair in PAIRS)


def test_verdicts_are_those_of_the_table_but_for_the_known_misses() -> None:
    false_right, false_wrong = misses([verdict.reward == 1.0 for verdict in verdicts()])
    assert false_right == EXPECTED_FALSE_RIGHT
    assert false_wrong == EXPECTED_MISSES
    num_right = sum(pair.is_right for pair in PAIRS)
    assert len(false_right) <= 0.02 * (len(PAIRS) - num_right)
    assert len(false_wrong) <= 0.08 * num_right


def test_no_verdict_of_the_table_is_unknown() -> None:
    assert [verdict.reason for verdict in verdicts() if verdict.reward is None] == []


def test_bare_math_verify_misses_more_of_the_same_table() -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    false_right, false_wrong = misses([bare_verdict(pair) for pair in PAIRS])
    print(f"bare Math-Verify: {len(false_right)} false right, {len(false_wrong)} false wrong of {len(PAIRS)}")
    assert len(false_right) >= 40
    assert len(false_wrong) >= 80


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.is_right], ids=lambda pair: pair.answer)
def test_a_gold_judges_itself_right(pair: Pair) -> None:
    gold = read_gold(pair.gold, META)
    assert score(f"\\boxed{{{pair.gold}}}", gold, META).reward == 1.0


def test_verdicts_are_equal_from_64_threads_with_cold_caches() -> None:
    """Every pair from eight threads at once: thread n judges pairs n, n + 8, ... (n mod 8)."""
    expected = verdicts()
    for cached in (read_tree, value_at, read_form, parse):
        cached.cache_clear()
    start = threading.Barrier(64)

    def run(number: int) -> list[Verdict]:
        start.wait()
        return [judge(pair) for pair in PAIRS[number % 8 :: 8]]

    with ThreadPoolExecutor(64) as pool:
        for number, found in enumerate(pool.map(run, range(64))):
            assert found == expected[number % 8 :: 8]
